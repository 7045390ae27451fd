"""Rows, templates and settings whose tokens and loss TRL gives.

`python -m tests.scoring.trl_cases` makes `trl.json`, run by an interpreter that has TRL as well as what the
tests need; the file says which versions made it.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from tests.tiny import CHAT_TEMPLATE, save_base

FILE = Path(__file__).with_name("trl.json")
SIZES = {"max_position_embeddings": 1024}

CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<|start|>assistant\n"
    "{% generation %}{{ m.content }}<|end|>\n{% endgeneration %}"
    "{% else %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""As Qwen2.5 and SmolLM2 write turns, with marks."""
LLAMA = (
    "{% for m in messages %}<|start|>{{ m.role }}<|head|>\n\n"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<|end|>{% endgeneration %}"
    "{% else %}{{ m.content | trim }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|head|>\n\n{% endif %}"
)
"""As Llama 3 writes them."""
THINKS = (
    "{% set ns = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% generation %}"
    "{% if loop.index0 > ns.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|end|>\n{% endgeneration %}"
    "{% else %}{{ m.content }}<|end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
"""As Qwen3 writes them: the last answer begins with what was thought."""

ASKED = ("say the cat ", "where is it? ", "and then")
SAID = (" sat on a mat", "over there", "it ran in rain ")
PAIRS = [
    {"prompt": [{"role": "user", "content": a}], "completion": [{"role": "assistant", "content": b}]}
    for a, b in zip(ASKED, SAID, strict=True)
]
TALKS = [
    {
        "messages": [
            {"role": "system", "content": "be kind"},
            *({"role": "user", "content": ASKED[place]}, {"role": "assistant", "content": SAID[place]}),
            *({"role": "user", "content": ASKED[0]}, {"role": "assistant", "content": SAID[2 - place]}),
        ]
    }
    for place in range(3)
]
PLAIN = [{"prompt": a, "completion": b} for a, b in zip(ASKED, SAID, strict=True)]
TEXTS = [{"text": a + b} for a, b in zip(ASKED, SAID, strict=True)]

CASES: dict[str, tuple[str | None, list[dict[str, Any]], str]] = {
    "a template without marks, single turns": (CHAT_TEMPLATE, PAIRS, "completion"),
    "a template without marks, whole text": (CHAT_TEMPLATE, TALKS, "all"),
    **{
        f"{name}, {what}": (template, rows, loss)
        for name, template in (("ChatML", CHATML), ("Llama 3", LLAMA), ("Qwen3", THINKS))
        for what, rows, loss in (
            ("single turns", PAIRS, "completion"),
            ("several turns", TALKS, "assistant"),
            ("whole text", TALKS, "all"),
        )
    },
    "no template, prompt and completion": (None, PLAIN, "completion"),
    "no template, raw text": (None, TEXTS, "all"),
}
"""Name → chat template, rows, and what is learnt, in the words of `benches/trl_eval.py`."""


def main() -> None:
    """Ask TRL, and write the file, or another one that is named."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benches"))
    from trl_eval import evaluate  # beside the other benches

    made: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        base = save_base(Path(place) / "model", **SIZES)
        for name, (template, rows, loss) in CASES.items():
            made[name] = evaluate(str(base), rows, loss, template)
    versions = [one.pop("versions") for one in made.values()].pop()
    file = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    file.write_text(json.dumps({"versions": versions, "cases": made}, indent=1) + "\n")


if __name__ == "__main__":
    main()
