"""IFEval: prompts with instructions that a program can verify, such as a number of words or a last sentence.

Source: github.com/google-research/google-research/tree/master/instruction_following_eval (Zhou et al., 2023,
arXiv:2311.07911), 541 prompts, Apache-2.0. Layout of the original and the hub, with an invented prompt:

    {"key": 1000, "prompt": "Describe a spoon in at least 20 words, without commas.",
     "instruction_id_list": ["length_constraints:number_words", "punctuation:no_comma"],
     "kwargs": [{"relation": "at least", "num_words": 20}, {}]}           (hub: every other name as null)

Four metrics, as published: strict reads the answer as it is; loose tries it without asterisks, without its
first and without its last line as well. Over prompts all instructions have to hold, over instructions each
counts by itself. The checks are written from the paper's descriptions; where its program uses NLTK for
sentences and capital words, and langdetect for languages, docs/benchmarks.md says what stands here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Annotated, Any, ClassVar

from annotated_types import MinLen

from lorasmith.benchmarks.base import Benchmark, Item, RowError, Scores, Source, SourceRow, Unscored, text
from lorasmith.records.dataset import Example

NO_REFERENCE = "(IFEval has no reference answers: any answer that follows the instructions is right.)"


class IFEval(Benchmark):
    """541 prompts with one to three of 25 instructions."""

    name = "IFEval"
    domain = "instruction following"
    source = "https://huggingface.co/datasets/google/IFEval"
    licence = "Apache-2.0"
    columns = "prompt, instruction_id_list, kwargs"
    hub = Source(
        "google/IFEval",
        "966cd89545d6b6acfd7638bc708b98261ca58e84",
        ("ifeval_input_data.jsonl",),
    )
    references = False
    max_new_tokens = 1280
    metrics = ("prompt_strict", "instruction_strict", "prompt_loose", "instruction_loose")
    needs: ClassVar[Mapping[str, Any]] = {"instructions": Annotated[list[dict[str, Any]], MinLen(1)]}

    def recognises(self, row: SourceRow) -> bool:
        return row.value.keys() >= {"prompt", "instruction_id_list", "kwargs"}

    def read(self, row: SourceRow, *, seed: int) -> Item:
        prompt, names, kwargs = text(row, "prompt"), row.value["instruction_id_list"], row.value["kwargs"]
        if (
            not isinstance(names, list)
            or not isinstance(kwargs, list)
            or len(names) != len(kwargs)
            or not names
        ):
            raise RowError("instruction_id_list and kwargs are not two lists of one length")
        instructions = [
            {"id": name, "arguments": _arguments(name, given)}
            for name, given in zip(names, kwargs, strict=True)
        ]
        return Item(
            record_id=str(row.value.get("key", row.sha256[:16])),
            prompt=prompt,
            response=NO_REFERENCE,
            question=prompt,
            subdomain=str(names[0]).partition(":")[0],
            extra={"instructions": instructions, "reference": False},
        )

    def guide_difficulty(self, item: Item) -> tuple[str, str]:
        count = len(item.extra["instructions"])
        return {1: "easy", 2: "medium"}.get(count, "hard"), "instructions"

    def judge(self, example: Example, answer: str) -> Scores:
        instructions = example.metadata.extra()["instructions"]
        strict = [_follows(one, answer) for one in instructions]
        loose = [any(_follows(one, said) for said in _readings(answer)) for one in instructions]
        return {
            "prompt_strict": float(all(strict)),
            "instruction_strict": sum(strict) / len(strict),
            "prompt_loose": float(all(loose)),
            "instruction_loose": sum(loose) / len(loose),
        }

    def weight(self, example: Example, metric: str) -> float:
        """Over instructions, a row counts as often as it has some."""
        return float(len(example.metadata.extra()["instructions"])) if "instruction" in metric else 1.0


def _arguments(name: object, given: object) -> dict[str, Any]:
    """Those that the instruction needs; raises `RowError` for an unknown instruction or a missing one."""
    if not isinstance(name, str) or name not in CHECKS:
        raise RowError("an instruction is none of the paper's 25")
    if not isinstance(given, Mapping):
        raise RowError(f"the arguments of {name} are no object")
    arguments: dict[str, Any] = {}
    for key, kind in CHECKS[name][1].items():
        value = given.get(key)
        if kind is int and isinstance(value, float) and value.is_integer():
            value = int(value)  # a column with gaps
        listed = kind is list and isinstance(value, list) and all(isinstance(one, str) for one in value)
        if isinstance(value, bool) or not (listed if kind is list else isinstance(value, kind)):
            raise RowError(f"{name} lacks its argument {key}")
        if key.endswith("relation") and value not in ("at least", "less than"):
            raise RowError(f"the {key} of {name} is neither 'at least' nor 'less than'")
        arguments[key] = value
    return arguments


def _follows(instruction: Mapping[str, Any], answer: str) -> bool:
    try:
        arguments = _arguments(instruction.get("id"), instruction.get("arguments"))
    except RowError as error:
        raise Unscored(str(error)) from error
    return bool(answer.strip()) and CHECKS[instruction["id"]][0](answer, **arguments)


def _readings(answer: str) -> list[str]:
    """The answer with and without asterisks, its first line, its last line."""
    lines = answer.split("\n")
    cuts = [(1, 0), (0, 1), (1, 1)]
    parts = ["\n".join(lines[start : len(lines) - end]).strip() for start, end in cuts]
    return [answer, *parts, *(part.replace("*", "") for part in (answer, *parts))]


# What is counted in an answer, and the 25 instructions in the order of the paper's table.

_ABBREVIATION = re.compile(r"\b(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|vs|etc|e\.g|i\.e|[A-Z])\.$")
_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*(?=\s|$)|[。！？।]+")


def sentences(answer: str) -> int:
    """Pieces that end with a full stop, a question or exclamation mark; the last may go without.

    A stop behind an abbreviation or an initial, or before a small letter, ends none.
    """
    count, start = 0, 0
    for match in _SENTENCE_END.finditer(answer):
        piece, rest = answer[start : match.end()], answer[match.end() :].lstrip()
        going_on = rest[:1].islower() or _ABBREVIATION.search(piece[-20:].rstrip("\"'”’)]"))
        if re.search(r"\w", piece) and not (rest and going_on and match.group().startswith(".")):
            count, start = count + 1, match.end()
    return count + bool(re.search(r"\w", answer[start:]))


def _compare(found: int, relation: str, wanted: int) -> bool:
    return found >= wanted if relation == "at least" else found < wanted


def _language(answer: str) -> str:
    if find_spec("py3langid") is None:
        raise Unscored("py3langid is not installed: pip install 'lorasmith[benchmarks]'")
    import py3langid

    # Capitals are rare in what it learnt from.
    return str(py3langid.classify(answer.lower())[0])


def _keywords(answer: str, keywords: list[str]) -> bool:
    return all(word.lower() in answer.lower() for word in keywords)


def _keyword_frequency(answer: str, keyword: str, frequency: int, relation: str) -> bool:
    return _compare(answer.lower().count(keyword.lower()), relation, frequency)


def _forbidden(answer: str, forbidden_words: list[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", answer, re.IGNORECASE) for word in forbidden_words)


def _letters(answer: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _compare(answer.lower().count(letter.lower()), let_relation, let_frequency)


def _in_language(answer: str, language: str) -> bool:
    """An answer without a single letter counts as followed, as in the paper's program."""
    return not any(sign.isalpha() for sign in answer) or _language(answer) == language


def _paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Paragraphs parted by `***`; only before the first and behind the last may nothing stand."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", answer)]
    if not parts[0]:
        parts = parts[1:]
    if parts and not parts[-1]:
        parts = parts[:-1]
    return all(parts) and len(parts) == num_paragraphs


def _words(answer: str, num_words: int, relation: str) -> bool:
    return _compare(len(re.findall(r"\w+", answer)), relation, num_words)


def _sentences(answer: str, num_sentences: int, relation: str) -> bool:
    return _compare(sentences(answer), relation, num_sentences)


def _first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = answer.split("\n\n")
    count = sum(bool(part.strip()) for part in parts)
    if not 1 <= nth_paragraph <= count or not (words := parts[nth_paragraph - 1].split()):
        return False
    word = re.split(r"[.,?!'\"]", words[0].lstrip("'\""))[0]
    return count == num_paragraphs and word.lower() == first_word.lower()


def _placeholders(answer: str, num_placeholders: int) -> bool:
    return sum(map(_brackets, answer.split("\n"))) >= num_placeholders


def _brackets(line: str) -> int:
    """Pairs of square brackets, each from an opening one to the next that closes."""
    count, end = 0, 0
    while (start := line.find("[", end)) >= 0 and (end := line.find("]", start)) >= 0:
        count += 1
    return count


def _postscript(answer: str, postscript_marker: str) -> bool:
    marks = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    mark = marks.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(mark, answer.lower()) is not None


def _bullets(answer: str, num_bullets: int) -> bool:
    # Of many blank lines one says as much, and each of them begins a search anew.
    answer = re.sub(r"\n(?:[^\S\n]*\n){2,}", "\n\n", answer)
    stars = re.findall(r"^\s*\*[^*].*$", answer, re.MULTILINE)
    return len(stars) + len(re.findall(r"^\s*-.*$", answer, re.MULTILINE)) == num_bullets


def _one_of_three(answer: str) -> bool:
    return any(f"My answer is {word}." in answer for word in ("yes", "no", "maybe"))


def _highlights(answer: str, num_highlights: int) -> bool:
    found = re.findall(r"\*[^\n*]*\*", answer) + re.findall(r"\*\*[^\n*]*\*\*", answer)
    return sum(bool(one.strip("*").strip()) for one in found) >= num_highlights


def _sections(answer: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter.strip())}\s?\d+", answer)) >= num_sections


def _json(answer: str) -> bool:
    plain = re.sub(r"^```(?:json)?|```$", "", answer.strip(), flags=re.IGNORECASE)
    try:
        json.loads(plain)
    except (ValueError, RecursionError):
        return False
    return True


def _title(answer: str) -> bool:
    return any(
        0 <= start < line.rfind(">>") - 2 and line[start : line.rfind(">>")].strip("<>").strip()
        for line in answer.split("\n")
        if (start := line.find("<<")) >= 0
    )


def _two_answers(answer: str) -> bool:
    parts = [part.strip() for part in answer.split("******")]
    inner = [part for place, part in enumerate(parts) if part or 0 < place < len(parts) - 1]
    return len(inner) == 2 and all(inner) and inner[0] != inner[1]


def _repeats(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quoted(answer: str) -> bool:
    plain = answer.strip()
    return len(plain) > 1 and plain[0] == plain[-1] == '"'


def _capital_words(answer: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"\w+(?:['’.-]\w+)*", answer)
    return _compare(sum(word.isupper() for word in words), capital_relation, capital_frequency)


def _capitals(answer: str) -> bool:
    return answer.isupper() and _language(answer) == "en"


def _small_letters(answer: str) -> bool:
    return answer.islower() and _language(answer) == "en"


def _no_comma(answer: str) -> bool:
    return "," not in answer


_PARAGRAPH = {"num_paragraphs": int, "nth_paragraph": int, "first_word": str}

CHECKS: dict[str, tuple[Callable[..., bool], dict[str, type]]] = {
    "keywords:existence": (_keywords, {"keywords": list}),
    "keywords:frequency": (_keyword_frequency, {"keyword": str, "frequency": int, "relation": str}),
    "keywords:forbidden_words": (_forbidden, {"forbidden_words": list}),
    "keywords:letter_frequency": (_letters, {"letter": str, "let_frequency": int, "let_relation": str}),
    "language:response_language": (_in_language, {"language": str}),
    "length_constraints:number_paragraphs": (_paragraphs, {"num_paragraphs": int}),
    "length_constraints:number_words": (_words, {"num_words": int, "relation": str}),
    "length_constraints:number_sentences": (_sentences, {"num_sentences": int, "relation": str}),
    "length_constraints:nth_paragraph_first_word": (_first_word, _PARAGRAPH),
    "detectable_content:postscript": (_postscript, {"postscript_marker": str}),
    "detectable_content:number_placeholders": (_placeholders, {"num_placeholders": int}),
    "detectable_format:number_bullet_lists": (_bullets, {"num_bullets": int}),
    "detectable_format:title": (_title, {}),
    "detectable_format:constrained_response": (_one_of_three, {}),
    "detectable_format:number_highlighted_sections": (_highlights, {"num_highlights": int}),
    "detectable_format:multiple_sections": (_sections, {"section_spliter": str, "num_sections": int}),
    "detectable_format:json_format": (_json, {}),
    "combination:repeat_prompt": (_repeats, {"prompt_to_repeat": str}),
    "combination:two_responses": (_two_answers, {}),
    "change_case:capital_word_frequency": (
        _capital_words,
        {"capital_frequency": int, "capital_relation": str},
    ),
    "change_case:english_capital": (_capitals, {}),
    "change_case:english_lowercase": (_small_letters, {}),
    "startend:end_checker": (_ends, {"end_phrase": str}),
    "startend:quotation": (_quoted, {}),
    "punctuation:no_comma": (_no_comma, {}),
}
"""Instruction → its check, and the arguments that it needs."""
