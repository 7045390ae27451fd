"""`python -m tests.golden.make [PART …] [--keep FOLDER]`: write `expected.json` anew, wholly or in parts."""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

EXPECTED = Path(__file__).with_name("expected.json")


def main() -> None:
    """Make the parts that are named, or all, and put them into `expected.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="as in PARTS of made.py; all if none is named"
    )
    parser.add_argument("--keep", type=Path, help="leave what was made in this folder")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        os.environ["LORASMITH_CACHE"] = f"{temporary}/cache"
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        from tests.golden.made import PARTS  # after the environment is set, as the tests do

        expected = json.loads(EXPECTED.read_text()) if EXPECTED.exists() and asked.parts else {}
        for name in asked.parts or PARTS:
            folder = (asked.keep or Path(temporary)) / name.replace(" ", "-")
            folder.mkdir(parents=True)
            started = time.perf_counter()
            expected[name] = PARTS[name](folder)
            print(f"{name}: {time.perf_counter() - started:.1f} s")
    EXPECTED.write_text(json.dumps(expected, indent=1, ensure_ascii=False, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
