"""Another base than the adapter's is found by what names tell, and no name is taken for more than it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import lorasmith
from lorasmith.checkpoint.base_match import GivenBase, compare_base, given_base
from lorasmith.errors import AdapterError
from tests.tiny import save_adapter, save_base

COMMIT = "c" * 40
QWEN = "Qwen/Qwen2.5-7B"
SNAPSHOT = f"/root/.cache/huggingface/hub/models--Qwen--Qwen2.5-7B/snapshots/{COMMIT}"


def hub(name: str) -> GivenBase:
    return GivenBase(folder=COMMIT, repository=name, commit=COMMIT)


def local(folder: str, config_name: str | None = None) -> GivenBase:
    return GivenBase(folder=folder, config_name=config_name)


@pytest.mark.parametrize(
    ("named", "base"),
    [
        (QWEN, hub("Qwen/Qwen2.5-7B-Instruct")),
        (QWEN, hub("Qwen/Qwen2.5-14B")),
        (QWEN, hub("meta-llama/Llama-3.1-8B")),
        ("Qwen/Qwen2.5-7B-Instruct", hub(QWEN)),
        ("unsloth/Qwen2.5-7B-Instruct-bnb-4bit", hub(QWEN)),
        ("TheBloke/Qwen2.5-7B-GPTQ", hub(QWEN)),
        (SNAPSHOT, hub("Qwen/Qwen2.5-7B-Instruct")),
        ("/data/models/Qwen2.5-7B", hub("Qwen/Qwen2.5-7B-Instruct")),
        (QWEN, local("Qwen2.5-7B-Instruct")),
        (QWEN, local("qwen2.5-0.5b")),
        (QWEN, local("base", "Qwen/Qwen2.5-7B-Instruct")),
        ("google/gemma-2-2b", local("gemma-2-2b-it")),
    ],
)
def test_a_contradiction_is_a_warning(named: str, base: GivenBase) -> None:
    found = compare_base(named, None, base)
    assert [(finding.severity, finding.code) for finding in found] == [("warning", "base-name")]


@pytest.mark.parametrize(
    ("named", "base"),
    [
        (None, hub(QWEN)),
        ("", hub(QWEN)),
        (QWEN, hub(QWEN)),
        ("qwen/qwen2.5-7b", hub(QWEN)),
        ("unsloth/Qwen2.5-7B", hub(QWEN)),
        ("Qwen2.5-7B", hub(QWEN)),
        ("meta-llama/Meta-Llama-3-8B", hub("NousResearch/Llama-3-8B")),
        (SNAPSHOT, hub(QWEN)),
        (SNAPSHOT + "/", hub(QWEN)),
        (SNAPSHOT, local("Qwen2.5-7B")),
        ("/home/me/models/base", hub(QWEN)),
        ("models/base", hub(QWEN)),
        ("./base", local("model")),
        ("C:\\models\\Qwen2.5-7B", hub(QWEN)),
        (QWEN, local("base")),
        (QWEN, local("qwen")),
        (QWEN, local("my-7b")),
        (QWEN, local("Qwen2.5-7B", "/tmp/checkpoint-1200")),
        (QWEN, local("base", "/tmp/checkpoint-1200")),
        ("Qwen/Qwen2.5-7B-Instruct", local("qwen2.5-7b-instruct", "Qwen/Qwen2.5-7B")),
    ],
)
def test_names_that_do_not_contradict_are_no_alarm(named: str | None, base: GivenBase) -> None:
    assert compare_base(named, None, base) == []


@pytest.mark.parametrize("twin", ["unsloth/Qwen2.5-7B-bnb-4bit", "unsloth/qwen2.5-7b-unsloth-bnb-4bit"])
def test_the_4_bit_twin_of_the_base_is_a_note(twin: str) -> None:
    for found in (compare_base(twin, None, hub(QWEN)), compare_base(QWEN, None, hub(twin))):
        assert [(finding.severity, finding.code) for finding in found] == [("note", "base-twin")]
    assert compare_base(twin, None, hub(twin)) == []


def test_another_commit_is_a_warning_and_a_branch_tells_nothing() -> None:
    (found,) = compare_base(QWEN, "a" * 40, hub(QWEN))
    assert (found.severity, found.code) == ("warning", "base-revision")
    for revision in (COMMIT, COMMIT[:7], "main", "", None):
        assert compare_base(QWEN, revision, hub(QWEN)) == []


def test_a_snapshot_reached_by_a_link_is_known_by_its_name(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen2.5-7B" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (tmp_path / "base").symlink_to(snapshot)
    assert given_base(tmp_path / "base").repository == QWEN


def test_an_adapter_is_not_merged_into_a_model_that_it_is_merged_into(tmp_path: Path) -> None:
    base = save_base(tmp_path / "base")
    one, two = (save_adapter(tmp_path / name, base, seed=seed) for name, seed in (("one", 1), ("two", 2)))
    lorasmith.merge(base, [one, two], tmp_path / "merged")
    for adapters in (one, [two], [two, one]):
        with pytest.raises(AdapterError, match="merged into this base already"):
            lorasmith.merge(tmp_path / "merged", adapters, tmp_path / "again")
    assert not (tmp_path / "again").exists()
    three = save_adapter(tmp_path / "three", base, seed=3)
    lorasmith.merge(tmp_path / "merged", three, tmp_path / "again")
