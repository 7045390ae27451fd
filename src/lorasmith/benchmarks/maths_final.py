"""The final answer in what a model wrote to a problem of MATH: boxed, stated, or its last expression."""

from __future__ import annotations

import re

from lorasmith.benchmarks.maths_text import with_base_in_index

_END = 8000
"""Signs of an answer in which its last word is looked for: some patterns take the square of it."""


def final_answers(answer: str) -> list[str]:
    """What an answer gives as its last word: in a box, else behind "the answer is", else all that it says.

    Of words without a box the last expression follows, which counts where they are not the answer as a whole.
    """
    boxed = last_boxed(answer)
    if boxed is not None:
        return [boxed]
    answer = with_base_in_index(answer[-_END:])
    stated = _stated(answer)
    expression = last_expression(stated or answer)
    return [said for said in (stated or answer, expression) if said is not None]


def last_boxed(solution: str) -> str | None:
    """What stands in the last \\boxed{…} (or \\fbox{…}), braces matched; None where there is none."""
    start = max(solution.rfind("\\boxed"), solution.rfind("\\fbox"))
    if start < 0:
        return None
    rest = solution[solution.index("box", start) + 3 :].removeprefix("ed")
    if not rest.startswith("{"):
        # `\boxed 5` is legal TeX: the next sign alone is boxed.
        return rest.strip().split("$")[0].split()[0] if rest.strip() and rest[0].isspace() else None
    depth = 0
    for index, sign in enumerate(rest):
        if sign in "{}" and rest[index - 1 : index] != "\\":
            depth += 1 if sign == "{" else -1
            if depth == 0:
                return rest[1:index].strip() or None
    return None


_STATES = re.compile(
    r"(?:final\s+)?answer\s*(?:is|:|=)\s*:?\s*\**\s*(.+?)\s*\**\s*(?:\.(?=\s|$)|\n|$)", re.IGNORECASE
)


def _stated(answer: str) -> str | None:
    """What the last "the answer is …" names; None where nothing is stated so."""
    found = _STATES.findall(answer)
    return found[-1] if found else None


_MATHS = r"\$\$.+?\$\$|\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\]"
_TEXT_GROUP = r"\\(?:text|textbf|mbox|mathrm|operatorname)\s*\{[^{}]*\}"
_PART = re.compile(rf"{_MATHS}|(?:{_TEXT_GROUP}|[^\s$])+|\$")
_NAMES = re.compile(rf"{_TEXT_GROUP}|\\[A-Za-z]+|sqrt|pi|infty|sin|cos|tan|log|ln")
_JOINS = re.compile(r",?\s+(?:and|or)\s+")


def last_expression(answer: str) -> str | None:
    """The last formula or number of an answer, which is all of it where it is one expression alone.

    A formula stands between TeX's signs, or is a run of words without letters side by side, such as
    `2\\sqrt{3}` or `x + 1`; a line's end ends it. None where nothing is like that.
    """
    lines = [line for line in answer.strip().splitlines() if line.strip()]
    if len(lines) == 1 and len(lines[0].split()) == 1 and not re.search(_MATHS, lines[0]):
        return lines[0].strip().strip("*")
    found: str | None = None
    for part in re.split(rf"({_MATHS})|\n", answer.strip(), flags=re.DOTALL):
        if part and re.fullmatch(_MATHS, part, re.DOTALL):
            found = re.sub(r"^(?:\$\$?|\\[(\[])|(?:\$\$?|\\[)\]])$", "", part).strip()
        elif part:
            found = _last_run(part) or found
    return found


def _last_run(line: str) -> str | None:
    """The last run of a line's words that are signs of a formula rather than of a sentence."""
    runs: list[list[str]] = [[]]
    for part in _PART.findall(line):
        if _is_formula(part) or (runs[-1] and part in ("and", "or")):
            runs[-1].append(part)
        else:
            runs.append([])
    for run in reversed(runs):
        while run and run[-1] in ("and", "or"):
            run.pop()
        while run and run[0] in ("a", "I"):
            run.pop(0)
        written = _JOINS.sub(", ", " ".join(run)).strip("*").rstrip(".,;:!?*")
        if re.search(r"[A-Za-z0-9√π∞½¼¾⅓⅔]", written):
            return written
    return None


def _is_formula(part: str) -> bool:
    return not re.search(r"[^\W\d_]{2}", _NAMES.sub("", part))
