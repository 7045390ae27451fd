"""Rate and memory of the hold-out split: `python benches/split.py --rows 10000000`.

Writes a training file of that many short rows, then holds out 200 of them, twice: without and with removal.
The second line of each pair is the same work on a tenth of the rows: memory must not grow with them.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from lorasmith.machine.resources import human_bytes, peak_memory, require_disk, reset_peak_memory
from lorasmith.testset.split import split

_ROW_BYTES = 200


def make(path: Path, rows: int) -> None:
    """Rows of 36 strata of very different sizes."""
    with path.open("w") as handle:
        for number in range(rows):
            row = {
                "id": f"r{number}",
                "prompt": f"What is {number} times {number % 97}, and why is it so?",
                "response": f"It is {number * (number % 97)}.",
                "metadata": {"difficulty": "emh"[number % 3], "domain": f"d{(number * number) % 12}"},
            }
            handle.write(json.dumps(row) + "\n")


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=None, help="where the training file goes")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        require_disk(folder, 3 * _ROW_BYTES * asked.rows, "write the training file and its copies")
        print(f"{'rows':>12}{'removal':>9}{'seconds':>9}{'rows/s':>10}{'peak memory':>13}{'held out':>10}")
        for rows in (asked.rows // 10, asked.rows):
            train = folder / f"train{rows}.jsonl"
            make(train, rows)
            for remove in (False, True):
                reset_peak_memory()
                began = time.perf_counter()
                output = folder / f"{rows}{remove}" / "test.jsonl"
                record = split(train, output, size=200, remove=remove, backup=False)
                seconds = time.perf_counter() - began
                held = sum(counts["held_out"] for counts in record.strata.values())
                print(
                    f"{rows:>12,}{remove!s:>9}{seconds:>9.1f}{rows / seconds:>10,.0f}"
                    f"{human_bytes(peak_memory()):>13}{held:>10}"
                )
            train.unlink()


if __name__ == "__main__":
    main()
