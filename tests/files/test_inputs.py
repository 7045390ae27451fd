"""Nothing but regular files is read, and no link is followed out of a folder that somebody else made."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lorasmith.checkpoint.adapter import open_adapter
from lorasmith.checkpoint.header import read_header, read_object
from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.data.rows import read_examples
from lorasmith.errors import CheckpointError, InputError
from lorasmith.files.atomic import read_record
from lorasmith.files.digests import digest_folder, hash_file, read_sums
from lorasmith.files.inputs import open_input, require_own_links
from lorasmith.hub.models import local_model
from lorasmith.records.dataset import DatasetStatistics
from lorasmith.runs.config import load_gates
from tests.tiny import save_adapter, save_base


@pytest.fixture(autouse=True)
def ends() -> Iterator[None]:
    """Fail a test that hangs at a pipe instead of hanging with it."""

    def hung(number: int, frame: object) -> None:
        raise AssertionError("the reader hangs")

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def pipe(path: Path) -> None:
    os.mkfifo(path)


def listening(path: Path) -> None:
    # Bound below the folder it is in: the name of a socket may have some 100 characters only.
    before = Path.cwd()
    os.chdir(path.parent)
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(before)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


READERS: dict[str, Callable[[Path], object]] = {
    "open_input": open_input,
    "header": read_header,
    "JSON": lambda path: read_object(path, CheckpointError),
    "record": lambda path: read_record(path, DatasetStatistics),
    "digest": hash_file,
    "rows": read_examples,
    "config": load_gates,
    "sums": lambda path: read_sums(path.parent),
}


@pytest.mark.parametrize("make", [pipe, listening, device], ids=["pipe", "socket", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_what_is_no_file_is_refused_at_once(
    tmp_path: Path, make: Callable[[Path], None], reader: str
) -> None:
    place = tmp_path / "SHA256SUMS"
    make(place)
    with pytest.raises(InputError, match=r"this is a (pipe|socket|device), not a file"):
        READERS[reader](place)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("inputs") / "base")


OPENERS: dict[str, Callable[[Path], object]] = {
    "checkpoint": open_checkpoint,
    "digest": digest_folder,
    "by name": local_model,
}


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("make", [pipe, listening, device], ids=["pipe", "socket", "device"])
def test_a_model_that_holds_something_else_than_files_is_refused(
    tmp_path: Path, model: Path, make: Callable[[Path], None], opener: str
) -> None:
    copy = copied(model, tmp_path / "base")
    make(copy / "NOTICE")
    with pytest.raises(InputError, match=r"not a file|leads out"):
        OPENERS[opener](copy)


@pytest.mark.parametrize("opener", OPENERS)
@pytest.mark.parametrize("name", ["LICENSE", "tokenizer.json", "additional_chat_templates"])
def test_a_link_that_leads_out_of_a_model_is_an_error(
    tmp_path: Path, model: Path, name: str, opener: str
) -> None:
    copy = copied(model, tmp_path / "base")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id_ed25519").write_text("secret")
    (copy / name).unlink(missing_ok=True)
    (copy / name).symlink_to(
        tmp_path / "private" / ("" if name == "additional_chat_templates" else "id_ed25519")
    )
    with pytest.raises(InputError, match="the link leads out of its folder") as refused:
        OPENERS[opener](copy)
    assert name in str(refused.value.where)


def test_a_link_that_leads_out_of_an_adapter_is_an_error(tmp_path: Path, model: Path) -> None:
    adapter = save_adapter(tmp_path / "adapter", model)
    (adapter / "chat_template.jinja").symlink_to("../elsewhere")
    (tmp_path / "elsewhere").write_text("secret")
    with pytest.raises(InputError, match="the link leads out of its folder"):
        open_adapter(adapter)
    with pytest.raises(InputError, match="the link leads out of its folder"):
        local_model(model, [adapter])


def test_links_within_a_folder_and_into_the_cache_of_the_hub_are_followed(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    stored = tmp_path / "cache" / "models--org--name" / "blobs"
    snapshot = stored.parent / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    copied(model, stored)
    plain = tmp_path / "plain"
    plain.mkdir()
    for file in stored.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
        (plain / file.name).symlink_to(snapshot / file.name)
    (plain / "LICENSE").symlink_to("config.json")
    linked = tmp_path / "linked"
    linked.symlink_to(snapshot)
    for folder in (snapshot, plain, linked):
        require_own_links(folder)
        open_checkpoint(folder)
    # The same cache, copied to another place.
    moved = tmp_path / "cache" / "models--org--name"
    moved.rename(tmp_path / "models--org--name")
    require_own_links(tmp_path / "models--org--name" / "snapshots" / ("a" * 40))


def test_a_link_to_itself_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(InputError, match="link"):
        require_own_links(tmp_path)


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    return to
