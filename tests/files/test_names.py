"""Names that somebody else chose: what leads out of a folder, or means two things, is never taken."""

from __future__ import annotations

import pytest

from lorasmith.errors import DamageError
from lorasmith.files.names import safe_member, safe_members, unsafe_name

_HOSTILE = {
    "climbing": "../precious.txt",
    "climbing in the middle": "run/../../precious.txt",
    "the folder itself": ".",
    "a dot within": "run/./a",
    "absolute": "/etc/passwd",
    "twice absolute": "//host/share",
    "an empty part": "run//a",
    "an empty end": "run/",
    "empty": "",
    "a drive": "C:/windows",
    "a drive's folder": "C:relative",
    "a stream": "a.txt:hidden",
    "a backslash": "..\\precious.txt",
    "a NUL": "a\0b",
    "a line break": "a\nb",
    "an escape sequence": "a\x1b[2Jb",
    "a C1 control": "a\x9bb",
    "half a surrogate pair": "a\ud800",
    "a line separator": "a\u2028b",
    "writing turned round": "a\u202egnp.exe",
    "a long part": "a" * 256,
    "a part long in bytes": "é" * 128,
    "long in all": "/".join(["a" * 200] * 11),
    "no text": 7,
    "nothing": None,
}


@pytest.mark.parametrize("name", _HOSTILE.values(), ids=_HOSTILE)
def test_a_name_that_leads_out_of_its_folder_or_hides_is_refused(name: object) -> None:
    assert unsafe_name(name)
    with pytest.raises(DamageError, match="a listed name") as caught:
        safe_member(name)
    assert str(caught.value).isascii()  # whatever the terminal makes of it, it can be shown
    with pytest.raises(DamageError):
        safe_members(["run/fine", name])


@pytest.mark.parametrize(
    "name",
    ["a", "run/report.html", "run/.hidden", "..a", "a..", "模型/权重.safetensors", "é" * 127, 'a b/c\'d "e"'],
)
def test_a_plain_name_is_taken_as_it_is(name: str) -> None:
    assert safe_member(name) == name


def test_a_name_must_lie_below_the_folder_that_is_asked_for() -> None:
    assert safe_member("run/a", below="run") == "run/a"
    for name in ("run", "runs/a", "other/a"):
        with pytest.raises(DamageError, match="does not lie below run/"):
            safe_member(name, below="run")


@pytest.mark.parametrize(
    "names",
    [
        ["a", "a"],
        ["Model.bin", "model.BIN"],
        ["straße", "STRASSE"],
        ["caf\u00e9", "cafe\u0301"],
        ["a", "a/b"],
        ["a/b", "A"],
        ["a/b/c", "a/b"],
    ],
)
def test_names_that_a_file_system_may_take_for_one_are_refused(names: list[str]) -> None:
    with pytest.raises(DamageError, match="collide"):
        safe_members(names)


def test_names_of_one_folder_stand_side_by_side() -> None:
    assert safe_members(["a/b", "a/c", "b", "a.b"]) == ["a/b", "a/c", "b", "a.b"]
