#!/usr/bin/env python3
"""The guide's manual step 1 by its own name: hold out a stratified test set from a training file.

Writes --output_file, and test_split_statistics.json beside it. Other than the guide's script, it leaves the
training file as it is unless --remove is given. See `lorasmith testset split`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lorasmith.cli.main import run
from lorasmith.files.atomic import write_record
from lorasmith.testset.rows import describe

KEPT = (
    "note: this differs from the guide: the training file keeps all its rows, the test set's among them. "
    "Give --remove to take them out (a backup is kept unless --no_backup)."
)


def main() -> int:
    """Returns the exit code of `lorasmith testset split`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--train_file", required=True)
    parser.add_argument("--output_file", type=Path, required=True)
    parser.add_argument("--test_size", type=int)
    parser.add_argument("--stratify_by")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--no_backup", action="store_true")
    parser.add_argument("--remove", action="store_true")
    asked = parser.parse_args()
    arguments = ["testset", "split", "--train", asked.train_file, "--output", str(asked.output_file)]
    given = {"--size": asked.test_size, "--stratify-by": asked.stratify_by, "--seed": asked.seed}
    arguments += [text for flag, value in given.items() if value is not None for text in (flag, str(value))]
    arguments += ["--no-backup"] if asked.no_backup else []
    arguments += ["--remove"] if asked.remove else []
    code = run(arguments)
    if code == 0:
        statistics = asked.output_file.parent / "test_split_statistics.json"
        write_record(statistics, describe(asked.output_file))
        print(f"Test set:   {asked.output_file}\nStatistics: {statistics}")
        if not asked.remove:
            print(KEPT)
    return code


if __name__ == "__main__":
    sys.exit(main())
