"""The process that runs math-verify: a JSON line `{gold, answer}` in, a line `{verdict}` out."""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import sys
from contextlib import suppress
from typing import Any

_MEMORY_BYTES = 4 << 30
"""A tower of powers in an answer must not take the machine's memory."""
_ALARM_SECONDS = 60


def main() -> None:
    """Import, lock up, say that it is ready, then answer until the input ends."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # Whatever a library prints about an answer is no verdict: the pipe belongs to this loop alone.
    verdicts = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _lock()
    # The prompt asks for a box: where there is one, it counts before everything else.
    targets = (LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig())

    def compare(question: dict[str, Any]) -> dict[str, Any]:
        gold = parse(question["gold"], parsing_timeout=None)
        if not gold:
            return {"verdict": None, "reason": "math-verify cannot read the reference answer"}
        answer = parse(question["answer"], extraction_config=targets, parsing_timeout=None)
        return {"verdict": bool(verify(gold, answer, timeout_seconds=None))}

    print("ready", file=verdicts, flush=True)
    for line in sys.stdin:
        # Should the parent be gone, nobody else ends a comparison that never does.
        signal.alarm(_ALARM_SECONDS)
        try:
            told = compare(json.loads(line))
        except Exception as error:  # whatever sympy raises, the answer stays unscored and says why
            told = {"verdict": None, "reason": f"math-verify failed: {type(error).__name__}"}
        signal.alarm(0)
        print(json.dumps(told), file=verdicts, flush=True)


def _lock() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    if sys.platform.startswith("linux"):
        from lorasmith.benchmarks.sandbox import kernel

        with suppress(OSError):  # older kernels: the limits above and the deadline remain
            kernel.filter_calls()


if __name__ == "__main__":
    main()
