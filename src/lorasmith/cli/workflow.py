"""The guide's automated workflow: a run under its headings, and the results in its places.

`scripts/vastai_validate_and_merge.sh` calls this with the paths of a workspace.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorasmith.cli.main import guarded
from lorasmith.errors import ExitCode, UsageError, os_errors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorasmith.progress import Progress
    from lorasmith.runs.results import RunResult

_LINE = "━" * 39
_BANNER = "=" * 40
STEPS: dict[str, str] = {
    "Test set": "Validate LoRA Model",
    "Merge LoRA weights": "Merge LoRA Weights",
    "Prove the weights": "Verify Merged Weights",
    "Validate merged model": "Validate Merged Model",
    "Gates": "Results Summary & Packaging",
}
"""The step of a run that each of the guide's begins with."""
RESULTS: dict[str, str] = {
    "validation/base.json": "base_validation.json",
    "validation/adapter.json": "lora_validation.json",
    "validation/merged.json": "merged_validation.json",
    "proof/weights.json": "weights.json",
    "proof/behaviour.json": "behaviour.json",
    "proof/comparison.json": "comparison.json",
    "gates.json": "gates.json",
    "report.html": "report.html",
}
"""What a run calls its results, and what the guide does."""


class GuideWatcher:
    """Follows a run under the guide's five headings."""

    def __init__(self) -> None:
        from lorasmith.cli.views.run import TerminalWatcher

        self._inner = TerminalWatcher()
        self.progress: Progress = self._inner.progress
        self.screen = self._inner.screen
        self._number = 0

    def step(self, number: int, total: int, title: str) -> None:
        """A heading where one of the guide's steps begins, else a line."""
        heading = STEPS.get(title)
        if heading is not None:
            self._number += 1
            text = f"\n{_LINE}\nStep {self._number}/{len(STEPS)}: {heading}\n{_LINE}"
            self.screen.print(text, markup=False)
        self.screen.print(f"{title} ...", markup=False)

    def finished(self, stage: str, *, reused: bool, seconds: float) -> None:
        """Whether the step ran, and how long it took."""
        self._inner.finished(stage, reused=reused, seconds=seconds)

    def show(self, stage: str, record: Any) -> None:
        """What the step found."""
        self._inner.show(stage, record)

    def generated(self, tokens: int) -> None:
        """The guide shows rows."""


def workflow(asked: argparse.Namespace) -> RunResult:
    """Run, then put merged model, results and archives where the guide has them."""
    import lorasmith
    from lorasmith.cli.views.run import show_summary
    from lorasmith.hub.models import base_of
    from lorasmith.runs.config import load_config

    for place in (asked.merged_path, asked.package_dir):
        _check_replaceable(place)
    base = asked.base_model or base_of(asked.lora_path, flag="BASE_MODEL")
    watcher = GuideWatcher()
    screen = watcher.screen
    screen.print(f"{_BANNER}\nPhase 1D: Validation & Merge (Vast.ai)\n{_BANNER}", markup=False)
    flags = {
        "base": Path(base),
        "adapter": asked.lora_path,
        "test_set": asked.test_file,
        "output": asked.run_dir,
        "train": tuple(asked.train_file),
        "precision": asked.precision,
        "rounding": asked.rounding,
        "batch_size": asked.batch_size,
        "device": asked.device,
    }
    result = lorasmith.run(load_config(asked.config, flags), watcher=watcher)
    show_summary(result, screen)
    _publish(result.folder / "merged", asked.merged_path)
    _publish(result.folder / "package", asked.package_dir)
    with os_errors(asked.results_dir, "write"):
        asked.results_dir.mkdir(parents=True, exist_ok=True)
        for name, guide_name in RESULTS.items():
            shutil.copyfile(result.folder / name, asked.results_dir / guide_name)
    screen.print(f"\nMerged model: {asked.merged_path}", markup=False, soft_wrap=True)
    screen.print(f"Results:      {asked.results_dir}", markup=False, soft_wrap=True)
    screen.print(f"Download:     {asked.package_dir}/*.tar.gz", markup=False, soft_wrap=True)
    word = "All validations passed!" if result.exit_code == ExitCode.OK else "NOT all validations passed"
    screen.print(f"\n{'✓' if result.exit_code == ExitCode.OK else '✗'} {word}", markup=False)
    return result


def _check_replaceable(place: Path) -> None:
    """What lies there may be replaced if it is missing, empty, or came from a run or a merge of ours."""
    if not place.exists():
        return
    ours = any((place / name).is_file() for name in ("lorasmith_merge.json", "manifest.json"))
    if not place.is_dir() or (not ours and any(place.iterdir())):
        raise UsageError(
            "something else lies where the results are to go",
            where=place,
            expected="nothing, or the results of an earlier workflow",
            remedy="move it away, or set MERGED_PATH or PACKAGE_DIR to another place",
        )


def _publish(source: Path, place: Path) -> None:
    """A folder under another name, as hard links where the file system can: the weights lie on disk once."""
    from lorasmith.files.atomic import aside, publish_folder

    temporary = aside(place)
    with os_errors(place, "write"):
        shutil.rmtree(temporary, ignore_errors=True)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, temporary, copy_function=_link_or_copy)
    publish_folder(temporary, place)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0, 1 when a gate failed or the weights are different, or the exit code of an error."""
    parser = argparse.ArgumentParser(prog="vastai_validate_and_merge", description=__doc__)
    for name in ("lora_path", "test_file", "merged_path", "results_dir", "package_dir", "run_dir"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--base_model", help="a folder or org/name; as adapter_config.json says by default")
    parser.add_argument("--train_file", type=Path, action="append", default=[])
    parser.add_argument("--config", type=Path, help="run.toml with further options, such as gates")
    for name in ("precision", "rounding", "device"):
        parser.add_argument(f"--{name}")
    parser.add_argument("--batch_size", type=int)
    parsed = parser.parse_args(arguments)
    return guarded(lambda: workflow(parsed).exit_code)


if __name__ == "__main__":
    sys.exit(main())
