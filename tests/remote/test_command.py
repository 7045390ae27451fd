"""The commands as typed: local paths are rewritten, and one command rents, runs, fetches and destroys."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tomli_w

from lorasmith.cli.remote.command import read_command
from lorasmith.cli.remote.rentals import needs
from lorasmith.errors import UsageError
from lorasmith.files.atomic import write_record
from lorasmith.options import FollowupOptions, RunOptions
from lorasmith.options.base import path_fields
from lorasmith.records.release import StageTiming, TimingRecord
from lorasmith.remote.rental.job import estimate
from lorasmith.remote.rental.provider import Offer
from tests.remote.machines import SSHD, Machine, machine
from tests.remote.rented_machine import vast_for
from tests.remote.vast_server import KEY, FakeVast, SimulatedClock, serve
from tests.tiny import save_adapter, save_base, tiny_rows

SPLIT = ["testset", "split", "--train", "rows.jsonl", "--output", "test.jsonl", "--size", "4"]
MERGE = ["merge", "--base", "base", "--adapter", "adapter", "--output", "merged"]


@pytest.fixture(autouse=True)
def _own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORASMITH_STATE", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)


def test_paths_become_places_there() -> None:
    typed = (
        "run --base m/base --adapter a --test-set t.jsonl --train x.jsonl --train y.jsonl --output run"
        " --no-end-of-turn --device cuda --seed 7"
    )
    found = read_command(typed.split())
    assert found.arguments[0] == "run"
    pairs = dict(zip(found.arguments[1:], found.arguments[2:], strict=False))
    assert pairs["--base"] == "in/0/base"
    assert pairs["--output"] == "out/0/run"
    assert pairs["--seed"] == "7"
    assert "--no-end-of-turn" in found.arguments and "--end-of-turn" not in found.arguments
    assert [found.arguments[i + 1] for i, word in enumerate(found.arguments) if word == "--train"] == [
        "in/3/x.jsonl",
        "in/4/y.jsonl",
    ]
    here = Path.cwd()
    assert [item.local for item in found.inputs[:2]] == [str(here / "m/base"), str(here / "a")]
    assert [item.local for item in found.outputs] == [str(here / "run")]
    assert found.needs_gpu


def test_the_price_of_the_machine_reaches_the_command_unless_one_was_given() -> None:
    words = ["run", "--base", "b", "--adapter", "a", "--test-set", "t", "--output", "o"]
    found = read_command(words)
    assert found.at_price(0.75) == ["run", "--price-per-hour", "0.75", *found.arguments[1:]]
    assert found.at_price(None) == found.arguments
    own = read_command([*words, "--price-per-hour", "2"])
    assert own.at_price(0.75) == own.arguments and own.arguments.count("--price-per-hour") == 1
    assert read_command(MERGE).at_price(0.75) == read_command(MERGE).arguments
    Path("run.toml").write_text('price_per_hour = 3.5\nbase = "b"\nadapter = "a"\ntest_set = "t"\n')
    written = read_command(["run", "--config", "run.toml", "--output", "o"]).at_price(0.75)
    assert written[written.index("--price-per-hour") + 1] == "3.5"


def test_the_cost_of_a_run_is_estimated_from_its_sizes() -> None:
    save_adapter(Path("adapter"), save_base(Path("base")))
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(40)))
    words = ["run", "--base", "base", "--adapter", "adapter", "--test-set", "t.jsonl", "--output", "o"]
    fast = Offer(1, "H100", 1, 80, 1.5, 0.0, 0.0, 0.0, 1, 500, 1e3, 1e3, "", flops=5e13)
    need = needs(read_command(words), None, None)
    slow = replace(fast, flops=1e6)
    assert "tokens" in need.basis and need.work_hours(slow) > need.work_hours(fast) > 0
    assert need.estimate(fast).hours == pytest.approx(0.15 + need.work_hours(fast), abs=0.001)
    assert need.work_hours(replace(fast, flops=0.0)) == 0.5  # the provider does not say how fast it is
    assert needs(read_command(words), 2.0, None).work_hours(fast) == 2.0
    assert needs(read_command(MERGE), None, None).work_hours(fast) == 0.5


@pytest.mark.parametrize(
    ("line", "extras"),
    [
        ("run --base b --adapter a --test-set t --output o", []),
        ("run --base b --adapter a --test-set t --output o --tasks", ["benchmarks"]),
        ("run --base b --adapter a --test-set t --output o --followup respond,compress", ["compress"]),
        ("validate --model b --test-set t --output o --executor ray", ["cluster"]),
    ],
)
def test_what_a_command_needs_besides_is_installed_there(line: str, extras: list[str]) -> None:
    assert read_command(line.split()).extras == extras


def test_one_path_given_twice_is_sent_once() -> None:
    found = read_command(["report", "a", "b", "a", "--output", "o.html"])
    assert found.arguments == ["report", "--output", "out/0/o.html", "in/0/a", "in/1/b", "in/0/a"]
    assert len(found.inputs) == 2


def test_a_model_of_the_hub_is_not_sent() -> None:
    found = read_command([*MERGE[:2], "hub:Qwen/Qwen3-8B@main", *MERGE[3:]])
    assert [(model.repository, model.revision) for model in found.hub] == [("Qwen/Qwen3-8B", "main")]
    assert "in/hub-0/Qwen3-8B" in found.arguments and len(found.inputs) == 1


def test_the_paths_of_a_config_file_are_this_machines() -> None:
    folder = Path("somewhere")
    folder.mkdir()
    (folder / "run.toml").write_text(
        'base = "b"\nadapter = "a"\ntest_set = "t.jsonl"\noutput = "r"\ntrain = "tr.jsonl"\nseed = 3\n'
    )
    found = read_command(["run", "--config", "somewhere/run.toml", "--output", "elsewhere"])
    here = Path.cwd()
    sent = {item.local for item in found.inputs}
    assert {str(here / "somewhere" / name) for name in ("b", "a", "t.jsonl", "tr.jsonl")} < sent
    assert [item.local for item in found.outputs] == [str(here / "elsewhere")]
    (config,) = [item.local for item in found.inputs if item.local.endswith("run.toml")]
    assert Path(config).read_text() == "seed = 3\n"


def test_paths_of_what_follows_the_release_are_seen_from_the_config_file() -> None:
    Path("run.toml").write_text(
        'base = "b"\nadapter = "a"\ntest_set = "t"\n[followup.respond]\ndata = "sub/rows.jsonl"\n'
        '[followup.draft]\nfrom_model = "small"\nepochs = 1.0\n'
    )
    found = read_command(["run", "--config", "run.toml", "--output", "o"])
    places = {item.local: item.remote for item in found.inputs}
    (config,) = [local for local in places if local.endswith("run.toml")]
    asked = tomllib.loads(Path(config).read_text())["followup"]
    here = Path.cwd()
    for named, local in (
        (asked["respond"]["data"], here / "sub" / "rows.jsonl"),
        (asked["draft"]["from_model"], here / "small"),
    ):
        assert os.path.normpath(Path(places[config]).parent / named) == places[str(local)]
    assert asked["draft"]["epochs"] == 1.0


def test_every_path_that_a_config_can_name_is_sent() -> None:
    """A new key with a path in it, of the run or of what follows, is known to this command, too."""

    tables = {name: get_args(field.annotation)[0] for name, field in FollowupOptions.model_fields.items()}
    body: dict[str, Any] = {name: f"files/of/{name}" for name in path_fields(RunOptions)}
    body["followup"] = {
        name: {key: f"files/of/{key}" for key in path_fields(kind)} for name, kind in tables.items()
    }
    Path("run.toml").write_text(tomli_w.dumps(body))
    found = read_command(["run", "--config", "run.toml"])
    moved = {item.local for item in [*found.inputs, *found.outputs]}
    keys = {*path_fields(RunOptions), *(key for kind in tables.values() for key in path_fields(kind))}
    assert {"base", "train", "data", "from_model"} < keys
    assert {str(Path.cwd() / "files" / "of" / key) for key in keys} <= moved


def test_a_config_may_name_a_base_of_the_hub() -> None:
    Path("run.toml").write_text('base = "hub:Qwen/Qwen3-8B@v1"\nadapter = "a"\ntest_set = "t"\n')
    found = read_command(["run", "--config", "run.toml", "--output", "o"])
    assert [(model.repository, model.revision) for model in found.hub] == [("Qwen/Qwen3-8B", "v1")]
    assert not any("Qwen" in item.local for item in found.inputs)


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "no command"),
        (["nonsense"], "no command"),
        (["remote", "status"], "no command"),
        (["demo", "--output", "x"], "no command"),
        (["compare", *MERGE[1:5], "--merged", "m", "--test-set", "t"], "nothing to fetch"),
        (["testset", "split", "--train", "t", "--output", "o", "--remove"], "changes a file here"),
        ([*MERGE[:2], "hub:Qwen", *MERGE[3:]], "no model of the hub"),
    ],
)
def test_commands_that_cannot_run_elsewhere(words: list[str], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        read_command(words)


def test_the_estimate_is_the_formula() -> None:
    offer = Offer(1, "H100", 1, 80, 1.50, 0.02, 0.03, 0.01, 0.99, 500, 800.0, 1600.0, "")
    found = estimate(offer, 0.5, 16.0, 32.0)
    # 0.15 h of set-up, 0.5 h of work, 16 GB at 1600 Mbit/s = 80 s, 32 GB at 800 Mbit/s = 320 s
    assert found.hours == pytest.approx(0.65 + 400 / 3600)
    assert found.dollars == pytest.approx(found.hours * 1.5 + 16 * 0.01 + 32 * 0.03)


needs_sshd = pytest.mark.skipif(not Path(SSHD).exists(), reason="needs Debian's openssh-server and rsync")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    lines = [
        f'{{"prompt": "{n} + 2?", "response": "{n + 2}", "metadata": {{"source": "x"}}}}\n' for n in range(20)
    ]
    path.write_text("".join(lines))
    return path


@pytest.fixture
def other(tmp_path: Path) -> Iterator[Machine]:
    with machine(tmp_path / "machine") as found:
        yield found


def lorasmith(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lorasmith.cli.main", *words],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


@needs_sshd
def test_a_command_elsewhere_gives_the_bytes_of_the_command_here(other: Machine, rows: Path) -> None:
    assert lorasmith(*SPLIT, "--seed", "3").returncode == 0
    here = Path("test.jsonl").read_bytes()
    Path("test.jsonl").unlink()
    where = ["--host", other.address, "--identity", str(other.key), "--fingerprint", other.fingerprint]
    there = ["--remote-python", sys.executable, "--", *SPLIT, "--seed", "3"]
    done = lorasmith("remote", "run", *where, *there)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "done: results fetched and verified" in done.stdout
    assert Path("test.jsonl").read_bytes() == here
    Path("test.jsonl").unlink()
    again = lorasmith("remote", "attach")  # the whole log, then the results once more
    assert again.returncode == 0 and Path("test.jsonl").read_bytes() == here, again.stdout + again.stderr
    status = lorasmith("remote", "status")
    assert "ended, exit code 0" in status.stdout and "verified" in status.stdout


@needs_sshd
def test_one_command_rents_runs_fetches_verifies_and_destroys(
    other: Machine, tmp_path: Path, rows: Path
) -> None:
    with serve() as use:
        vast = vast_for(other)
        use(vast)
        variables = {"LORASMITH_VAST_URL": vast.url, "VAST_API_KEY": KEY}
        listed = lorasmith("remote", "list", "--past", **variables)
        assert "Rentals that have ended" in listed.stdout, listed.stdout + listed.stderr
        shown = lorasmith("remote", "offers", "--hours", "1", "--disk", "30", **variables)
        # 1.15 h at $0.80; nothing is sent
        assert re.search(r"7\s+1 × H100.*\$0\.800.*1\.15 h\s+\$0\.92", shown.stdout), (
            shown.stdout + shown.stderr
        )
        no_cap = lorasmith("remote", "run", "--vast", "num_gpus=1", "--", *SPLIT, **variables)
        assert no_cap.returncode == 2 and "--max-cost" in no_cap.stderr
        assert not vast.bought
        done = lorasmith(
            *("remote", "run", "--vast", "num_gpus=1", "--max-cost", "1", "--disk", "30"),
            *("--remote-python", sys.executable, "--", *SPLIT),
            **variables,
        )
        vast.bills = {next(iter(vast.instances)): 0.5}
        vast.instances[next(iter(vast.instances))].created = time.time() - 60
        listed = lorasmith("remote", "list", "--past", **variables)
    assert re.search(r"5000 .* \$0\.500 +\$\+0\.\d+", listed.stdout), listed.stdout + listed.stderr
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "test.jsonl").read_text().count("\n") == 4
    assert len(vast.bought) == 1 and not vast.running()
    assert f"{other.fingerprint}: as the machine's log at vast.ai tells" in done.stdout
    assert "destroyed, and confirmed to be gone" in done.stdout
    for path in (other.home / ".lorasmith").rglob("*"):
        assert not path.is_file() or KEY.encode() not in path.read_bytes(), path


def test_keys_and_offers_that_are_none_as_typed(rows: Path, tmp_path: Path) -> None:
    rented = ["remote", "run", "--vast", "gpu_name=H100_SXM", "--max-cost", "1", "--", *SPLIT]
    none = lorasmith(*rented, VAST_API_KEY="", XDG_CONFIG_HOME=str(tmp_path))
    assert none.returncode == 2 and "there is no key for Vast.ai" in none.stderr
    with serve() as use:
        vast = FakeVast(SimulatedClock())
        use(vast)
        wrong = lorasmith(*rented, LORASMITH_VAST_URL=vast.url, VAST_API_KEY="wrong")
        assert wrong.returncode == 2 and "the key is not accepted" in wrong.stderr
        typo = lorasmith(*rented[:-6], "--train", "typo.jsonl", *rented[-4:], LORASMITH_VAST_URL=vast.url)
        assert typo.returncode == 2 and "it does not exist" in typo.stderr
        unset = lorasmith(*rented[:6], "--env", "NOWHERE_SET", *rented[6:], LORASMITH_VAST_URL=vast.url)
        assert unset.returncode == 2 and "NOWHERE_SET is not set" in unset.stderr
        Path("test.jsonl").touch()
        taken = lorasmith(*rented, LORASMITH_VAST_URL=vast.url, VAST_API_KEY=KEY)
        assert taken.returncode == 2 and "the place for the results is taken" in taken.stderr
        Path("test.jsonl").unlink()
        empty = lorasmith(*rented, LORASMITH_VAST_URL=vast.url, VAST_API_KEY=KEY)
    assert empty.returncode == 2 and "nothing is offered" in empty.stderr
    assert not vast.bought and not list((tmp_path / "state" / "rentals").glob("*"))


def test_a_budget_that_is_spent_already_stops_before_any_work(tmp_path: Path) -> None:
    save_adapter(Path("adapter"), save_base(Path("base")))
    Path("t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in tiny_rows(8)))
    spent = StageTiming(stage="merge", wall_seconds=3600.0, cpu_seconds=1.0, peak_rss_bytes=1, started="x")
    Path("run").mkdir()
    write_record(Path("run/timing.json"), TimingRecord(hardware={}, stages=[spent]))
    words = ["run", "--base", "base", "--adapter", "adapter", "--test-set", "t.jsonl", "--output", "run"]
    stopped = lorasmith(*words, "--price-per-hour", "1.5", "--budget", "1")
    assert stopped.returncode == 1, stopped.stdout + stopped.stderr
    assert "the budget of $1 is spent" in stopped.stderr and "larger --budget" in stopped.stderr
    assert not Path("run/validation").exists() and not Path("run/merged").exists()
