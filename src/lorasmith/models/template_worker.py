"""The other process of `models.chat_template`: renders what it is sent, a JSON object a line, within limits.

Started as `python -P -m lorasmith.models.template_worker SECONDS`, the processor time of one rendering. It
ends when its input does.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from pathlib import Path
from typing import Any

MEMORY_BYTES = 512 << 20
"""Memory beyond what the process has at its start."""
LONGEST = 64 << 20
"""Characters of what is rendered: a longer text is no prompt."""


def main() -> None:
    """Answer line by line: `{"text": …, "answers": [[start, stop], …]}` or `{"error": …}`."""
    from transformers.utils.chat_template_utils import render_jinja_template

    # Not a handler but the signal's own effect: it also ends a computation within C, such as 10 ** 10 ** 8,
    # and it does so when nobody waits for the answer any more.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _limit_memory()
    template = ""
    for line in sys.stdin:
        request = json.loads(line)
        template = request.get("template", template)
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))
        answer = _answer(render_jinja_template, template, request)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def _answer(render: Any, template: str, request: dict[str, Any]) -> dict[str, Any]:
    try:
        # Names that a template gets anyway cannot be given again: they are refused in `models.chat_template`.
        rendered, answers = render(
            conversations=[request["messages"]],
            tools=request.get("tools"),
            chat_template=template,
            add_generation_prompt=request["start_answer"],
            return_assistant_tokens_mask=request.get("mark_answers", False),
            **request["special_tokens"],
            **request.get("arguments", {}),
        )
    except MemoryError:
        return {"error": f"it needs more than {MEMORY_BYTES >> 20} MiB of memory"}
    except Exception as error:  # a template may raise anything, its own messages among it
        return {"error": str(error)[:2000] or type(error).__name__}
    if len(rendered[0]) > LONGEST:
        return {"error": f"its text is longer than {LONGEST:,} characters"}
    return {"text": rendered[0], "answers": [list(span) for span in answers[0]] if answers else []}


def _limit_memory() -> None:
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    except OSError:
        used = 2 << 30  # no Linux: room for the interpreter and its libraries
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    wanted = used + MEMORY_BYTES
    resource.setrlimit(
        resource.RLIMIT_AS, (wanted if hard == resource.RLIM_INFINITY else min(wanted, hard), hard)
    )
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
