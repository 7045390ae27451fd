"""What the run comes to: gates, the model's card, the report, the package."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from lorasmith.files.atomic import write_record
from lorasmith.files.digests import CARD
from lorasmith.gates import evaluate, split_costs
from lorasmith.progress import Watcher
from lorasmith.records.release import Gate, GateRecord, PackageManifest
from lorasmith.results import ROLES, load_measured
from lorasmith.stages import Stage
from lorasmith.steps.base import MEASURED, RunContext, Step
from lorasmith.steps.followup import packed_records


def judge(run: RunContext) -> Step:
    """Every gate but those on costs, which are no function of the inputs."""
    gates, _ = split_costs(run.config.resolved_gates())
    answered = [f"validation/{role}_tasks.json" for role in ROLES if run.config.tasks]
    stage = Stage(
        name="gates",
        inputs={name: run.folder / name for name in (*MEASURED, *answered)},
        parameters={"gates": [gate.model_dump(mode="json") for gate in gates]},
        outputs=["gates.json"],
        action=lambda: write_record(run.folder / "gates.json", evaluate(gates, load_measured(run.folder))),
    )
    return Step("Gates", stage, {"gates.json": GateRecord})


def judge_costs(run: RunContext, watch: Watcher) -> None:
    """`cost_gates.json`: judged after every command, outside of what is equal between two runs."""
    _, gates = split_costs(run.config.resolved_gates())
    if run.config.budget is not None:  # kept out of the gates of run.json, which money must not change
        limit = run.config.budget
        gates.append(Gate(name="--budget", metric="cost.dollars", comparison="<=", threshold=limit))
    path = run.folder / "cost_gates.json"
    if not gates:
        path.unlink(missing_ok=True)
        return
    record = evaluate(gates, load_measured(run.folder))
    write_record(path, record)
    watch.show("cost-gates", record)


def write_card(run: RunContext) -> Step:
    """The merged model's README, from the records."""
    from lorasmith.packaging import card

    config, folder = run.config, run.folder
    base_card = config.base / CARD
    names = {"base_model": config.base_model_id, "name": config.model_name}
    stage = Stage(
        name="card",
        inputs={
            **{name: folder / name for name in (*MEASURED, "gates.json")},
            **run.models,
            **({"base card": base_card} if base_card.is_file() else {}),
        },
        parameters=names,
        outputs=[f"merged/{CARD}"],
        action=lambda: card.write_card(folder, base=config.base, adapter=config.adapter, **names),
    )
    return Step("Model card", stage, {})


def package(run: RunContext) -> Step:
    """Evidence and model as archives; the report in it comes without timings, which differ between runs."""
    from lorasmith.packaging.pack import pack
    from lorasmith.reporting.page import write_report

    names = ["run.json", "testset", "validation", "merged", f"merged/{CARD}", "proof", "gates.json"]
    names += packed_records(run)
    stage = Stage(
        name="package",
        inputs={name: run.folder / name for name in names},
        parameters={"compression": run.config.compression},
        outputs=["package"],
        action=lambda: pack(
            run.folder,
            run.folder / "package",
            compression=run.config.compression,
            report=partial(write_report, timings=False),
            progress=run.progress,
        ),
    )
    return Step("Report and package", stage, {"package/manifest.json": PackageManifest})


def report(run_folder: Path) -> None:
    """The run's own page, with timings: written after every command, since those change."""
    from lorasmith.reporting.page import write_report

    write_report(run_folder, run_folder / "report.html")


def open_seal(run_folder: Path) -> None:
    """Before the first step: from here on the run has not ended."""
    from lorasmith.files import seal

    seal.open_seal(run_folder)


def seal(run_folder: Path) -> None:
    """After the last step: the checksums of all that lies there, for `lorasmith verify`."""
    from lorasmith.files import seal

    seal.seal_run(run_folder)
