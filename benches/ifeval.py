"""IFEval's verdicts beside those of lm-eval's program: `ENVIRONMENT/bin/python benches/ifeval.py`.

The environment has lorasmith and its extra `benchmarks`, and `pip install --no-deps lm-eval` with nltk,
langdetect and immutabledict. Answers are made of pieces that the instructions are about, by `--seed`; each is
put to one instruction. lm-eval counts sentences as lorasmith does here, since NLTK's data is not at hand.
"""

from __future__ import annotations

import argparse
import random
import sys
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

from lorasmith.benchmarks import ifeval

PIECES = [
    "spoon",
    "Fork",
    "SPOON",
    "the",
    "a",
    ",",
    ".",
    "!",
    "?",
    "\n",
    "\n\n",
    "***",
    "\n***\n",
    "******",
    "* item\n",
    "- item\n",
    "\t* x\n",
    "  - y\n",
    "*bold*",
    "**very bold**\n",
    "* *",
    "**",
    "[name]",
    "[]",
    "<<Title>>",
    "<< >>",
    "P.S. more",
    "P.P.S more",
    "p. s. x",
    "SECTION 1",
    "SECTION 2",
    "Section 3",
    "My answer is yes.\n",
    "My answer is no",
    '"',
    "'",
    '{"a": 1}',
    "```json\n",
    "```",
    "That is all.",
    "Describe a spoon.",
    "zigzag",
    "forked",
    "don't",
    "well-known",
    "U.S.",
    "1,000",
    "3.5\n",
    " ",
    "  ",
    "É",
    "The spoon lies on the table and the fork is beside it",
    "DER LÖFFEL",
    "\r\n",
]


def arguments(draw: random.Random, name: str) -> dict[str, Any]:
    """Small numbers and the words of the pieces, so that both verdicts come up."""
    values: dict[str, Callable[[], Any]] = {
        "keywords": lambda: draw.sample(["spoon", "fork", "table"], 2),
        "forbidden_words": lambda: draw.sample(["spoon", "fork", "table"], 2),
        "keyword": lambda: draw.choice(["spoon", "the"]),
        "letter": lambda: draw.choice("szt"),
        "language": lambda: draw.choice(["en", "de"]),
        "first_word": lambda: draw.choice(["spoon", "the", "fork", "describe"]),
        "postscript_marker": lambda: draw.choice(["P.S.", "P.P.S"]),
        "section_spliter": lambda: "SECTION",
        "prompt_to_repeat": lambda: "Describe a spoon.",
        "end_phrase": lambda: "That is all.",
        "num_words": lambda: draw.choice([3, 6]),
        "nth_paragraph": lambda: 1,
    }
    relation = draw.choice(["at least", "less than"])
    return {
        key: values[key]()
        if key in values
        else relation
        if key.endswith("relation")
        else draw.choice([1, 2, 3])
        for key in ifeval.CHECKS[name][1]
    }


def answer(draw: random.Random) -> str:
    """Up to 13 pieces, one in five in capitals."""
    pieces = [draw.choice(PIECES) for _ in range(draw.choice([1, 2, 3, 5, 8, 13]))]
    joined = draw.choice(["", " "]).join(pieces)
    return joined if draw.random() < 0.8 else joined.upper()


def reference() -> dict[str, Any]:
    """Instruction → class of lm-eval's program; of the package only these files are imported."""
    import nltk
    from nltk.tokenize.destructive import NLTKWordTokenizer

    found = find_spec("lm_eval")
    if found is None or not found.submodule_search_locations:
        sys.exit("lm-eval is not installed in this environment")
    for name in ("lm_eval", "lm_eval.tasks", "lm_eval.tasks.ifeval"):
        package = sys.modules[name] = ModuleType(name)
        package.__path__ = [
            found.submodule_search_locations[0] + name.removeprefix("lm_eval").replace(".", "/")
        ]
    nltk.data.find = nltk.download = lambda *_, **__: True
    nltk.word_tokenize = NLTKWordTokenizer().tokenize
    from lm_eval.tasks.ifeval import instructions_registry, instructions_util

    instructions_util.count_sentences = ifeval.sentences
    return dict(instructions_registry.INSTRUCTION_DICT)


def main() -> None:
    """Print, for each instruction, the verdicts and how many of them differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--answers", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, classes = random.Random(asked.seed), reference()
    import langdetect

    langdetect.DetectorFactory.seed = 0  # else its verdicts on short texts differ from run to run
    verdicts: Counter[str] = Counter()
    differing: Counter[str] = Counter()
    for _ in range(asked.answers):
        name = draw.choice(list(ifeval.CHECKS))
        given, said = arguments(draw, name), answer(draw)
        if not said.strip():
            continue
        theirs = classes[name](name)
        theirs.build_description(**given)
        ours = ifeval._follows({"id": name, "arguments": given}, said)
        verdicts[name] += 1
        differing[name] += ours != bool(theirs.check_following(said))
    for name in ifeval.CHECKS:
        print(f"{name:45} {verdicts[name]:6} verdicts, {differing[name]:4} differ")
    print(f"{'all':45} {verdicts.total():6} verdicts, {differing.total():4} differ")


if __name__ == "__main__":
    main()
