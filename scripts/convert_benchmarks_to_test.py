#!/usr/bin/env python3
"""The guide's step 3 by its own name: a test set of 100 rows of each benchmark.

Reads data/benchmarks and writes data/benchmarks/validation_test.jsonl; see `lorasmith testset build`, which
has more options. Everything that this script does not know is handed on to it.
"""

from __future__ import annotations

import argparse
import sys

from lorasmith.cli.main import run


def main() -> int:
    """Returns the exit code of `lorasmith testset build`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--benchmarks-dir", default="data/benchmarks")
    parser.add_argument("--output-file", default="data/benchmarks/validation_test.jsonl")
    asked, more = parser.parse_known_args()
    return run(
        [
            *("testset", "build", "--benchmarks", asked.benchmarks_dir, "--output", asked.output_file),
            *more,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
