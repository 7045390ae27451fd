"""Final answers of MATH as one form of text: what TeX or Unicode only writes otherwise is the same here.

Made before math-verify sees an answer, because it reads some of these wrongly: a base in the index of a
number, commas between thousands, `\\frac\\pi4`, degrees, lists of letters. Nothing here computes.
"""

from __future__ import annotations

import re

_UNICODE = {
    "−": "-", "–": "-", "×": "\\times ", "·": "\\cdot ", "÷": "\\div ", "π": "\\pi ", "∞": "\\infty ",
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "±": "\\pm ", "∪": "\\cup ", "∩": "\\cap ", "∈": "\\in ",
    "θ": "\\theta ", "°": "", "½": "\\frac{1}{2}", "¼": "\\frac{1}{4}", "¾": "\\frac{3}{4}",
    "⅓": "\\frac{1}{3}", "⅔": "\\frac{2}{3}", "²": "^{2}", "³": "^{3}", "’": "'", "\u00a0": " ",
    "\u2009": " ",
}  # fmt: skip
_DROPPED = re.compile(
    r"\\\$|\\(?:left|right|bigl|bigr|Bigl|Bigr|displaystyle|limits)(?![A-Za-z])|(?<!\\)\\[!,;:> ]|~|\$"
    r"|\^\s*\{?\s*\\circ\s*\}?|\\degree(?![A-Za-z])|\\(?:mbox|text)\s*\{\s*(?:degrees?)\s*\}"
)
_FRACTION = re.compile(r"\\(?:d|t|c)frac(?![A-Za-z])")
_SIGN = r"(?:\\[A-Za-z]+|[A-Za-z0-9])"
_SHORT_FRACTION = re.compile(rf"\\frac\s*(\{{[^{{}}]*\}}|{_SIGN})\s*(\{{[^{{}}]*\}}|{_SIGN})")
_SHORT_ROOT = re.compile(r"\\sqrt\s*([A-Za-z0-9])")
_THOUSANDS = re.compile(r"-?\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_BASED = re.compile(r"(-?[0-9A-Fa-f]+)_\{?(\d+)\}?")
_HAS_BASE = re.compile(r"\d_\{?\d")
_BASE_NAMES = {
    "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9, "ten": 10,
    "eleven": 11, "twelve": 12, "sixteen": 16,
}  # fmt: skip
_BASE = rf"(\d{{1,2}}|(?i:{'|'.join(_BASE_NAMES)}))(?![A-Za-z0-9])"
_BASE_IN_TEXT = re.compile(r"\\text\s*\{([^{}]*\bbase\b[^{}]*)\}")
_BASE_SAID = re.compile(rf"(?<=[0-9A-F])[ ,]{{0,3}}\(?\s?(?:in )?base[ -]?{_BASE}\)?")
_BASE_INDEX = re.compile(
    rf"(?<=[0-9A-F])\s?_\s?(?:\{{\s?\(?{_BASE}\)?\s?\}}|\{{\s?\\text\s?\{{\s?{_BASE}\s?\}}\s?\}}|\\text\s?\{{\s?{_BASE}\s?\}})"
)
_LETTERS = re.compile(r"[A-Z](?:(?:,|and|&)[A-Z])+")


def normalise(expression: str) -> str:
    """The expression in the form in which equal texts are equal answers; still TeX."""
    text = expression.strip()
    text = re.sub(r"√\s*\(?(\w+)\)?", r"\\sqrt{\1}", text)
    for sign, written in _UNICODE.items():
        text = text.replace(sign, written)
    # A comma that TeX sets without space stands between thousands.
    text = text.replace("{,}", ",").replace("\\!,", ",").replace(",\\!", ",")
    text = _FRACTION.sub(r"\\frac", text)
    text = _DROPPED.sub("", text)
    text = _without_wrapper(text)
    text = _SHORT_FRACTION.sub(lambda found: f"\\frac{_braced(found[1])}{_braced(found[2])}", text)
    text = _SHORT_ROOT.sub(r"\\sqrt{\1}", text)
    text = re.sub(r"\s+", " ", text).strip()
    text = re.sub(r"(?<=[\d})])[.,;]+$|(?<=[A-Za-z])\.$", "", text).strip()
    text = re.sub(r"\s*\\?%$", "", text)
    plain = text.replace(" ", "")
    return plain.replace(",", "") if _THOUSANDS.fullmatch(plain) else text


def _braced(part: str) -> str:
    return part if part.startswith("{") else f"{{{part}}}"


def _without_wrapper(text: str) -> str:
    """Without a font around the whole."""
    while found := re.fullmatch(
        r"\s*\\(?:text|textbf|mathbf|mathrm|mathit|textit|mbox|bf|rm)\s*\{([^{}]*)\}\s*", text
    ):
        text = found[1]
    return text


def compact(expression: str) -> str:
    """The normal form without spaces and without braces around single signs, to be compared as text."""
    text = re.sub(r"\s+", "", normalise(expression))
    return re.sub(r"([_^])\{(\w)\}", r"\1\2", text)


def same_base(final: str, answer: str) -> bool | None:
    """For a number with its base in the index: whether the answer is that number; None where neither has one.

    An answer without a base is taken in the one that the problem asks for; with another base it is wrong,
    even where digits or value agree. So is one that still has to be computed: math-verify ignores bases.
    """
    final, answer = (_last_side(with_base_in_index(text)) for text in (final, answer))
    one, two = _BASED.fullmatch(final), _BASED.fullmatch(answer)
    if one is None and two is None:
        return False if _HAS_BASE.search(final) or _HAS_BASE.search(answer) else None
    if one is None or two is None:
        based, bare = (one, answer) if one is not None else (two, final)
        assert based is not None
        # A reference without a base is a decimal number.
        return bare.upper() == based[1].upper() and (one is not None or based[2] == "10")
    return (one[1].upper(), one[2]) == (two[1].upper(), two[2])


def with_base_in_index(text: str) -> str:
    """The text with `32 (base 6)`, `32_{\\text{six}}` and the like written `32_6`."""

    def index(found: re.Match[str]) -> str:
        base = next(filter(None, found.groups()))
        return f"_{_BASE_NAMES.get(base.lower(), base)}"

    text = _BASE_IN_TEXT.sub(r"\1", text)
    return _BASE_INDEX.sub(index, _BASE_SAID.sub(index, text))


def _last_side(expression: str) -> str:
    """What stands behind the last equals sign, in the compact form."""
    return compact(expression).rpartition("=")[2]


def letters_of(expression: str) -> frozenset[str] | None:
    """The letters of a list of them, such as `A, C and D`, whose order says nothing; None for all else."""
    bare = re.sub(r"\\(?:text|textbf|mathrm|mathbf)|[{}()\s]", "", normalise(expression))
    if not _LETTERS.fullmatch(bare.replace(",and", ",")):
        return None
    return frozenset(re.findall(r"[A-Z]", bare))
