"""The package: complete, the same bytes each time, without forbidden text, checkable by common tools."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lorasmith.errors import CheckpointError, DataError, DiskError, UsageError
from lorasmith.files.atomic import read_record, write_record
from lorasmith.packaging import pack as pack_module
from lorasmith.packaging.pack import pack
from lorasmith.records.release import PackageManifest, salted_sha256
from lorasmith.records.scoring import ValidationResult
from tests.samples import ROLES, SECRET, sample_examples, sample_run, write_merged


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run."""
    return sample_run(tmp_path / "run")


def _page(run: Path, page: Path) -> None:
    page.write_text(f"report of {len(list(run.iterdir()))} entries")


def _members(archive: Path) -> dict[str, bytes]:
    with tarfile.open(archive) as tar:
        return {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]


def _bytes(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_system_tools_unpack_and_check_the_package(run: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    pack(run, package, report=_page)
    assert sorted(_bytes(package)) == [
        "SHA256SUMS",
        "bom.cdx.json",
        "manifest.json",
        "merged_model.tar.gz",
        "validation_results.tar.gz",
    ]
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=package, check=True)
    assert len((package / "SHA256SUMS").read_text().splitlines()) == 4
    subprocess.run(["tar", "-xzf", package / "merged_model.tar.gz"], cwd=tmp_path, check=True)
    for file in (run / "merged").iterdir():
        assert (tmp_path / "merged_model" / file.name).read_bytes() == file.read_bytes()


def test_the_evidence_is_complete_and_holds_no_times(run: Path, tmp_path: Path) -> None:
    (run / "stages").mkdir()
    (run / "stages" / "merge.json").write_text("{}")
    pack(run, tmp_path / "package", report=_page)
    names = set(_members(tmp_path / "package" / "validation_results.tar.gz"))
    assert names == {
        f"validation_results/{name}"
        for name in (
            "run.json",
            "gates.json",
            "report.html",
            "testset/test_set.jsonl",
            "testset/statistics.json",
            "testset/contamination.json",
            *(f"validation/{role}.{kind}" for role in ROLES for kind in ("json", "parquet")),
            "merged/lorasmith_merge.json",
            "proof/weights.json",
            "proof/behaviour.json",
            "proof/comparison.json",
        )
    }


def test_date_user_and_place_do_not_show(run: Path, tmp_path: Path) -> None:
    pack(run, tmp_path / "first", report=_page)
    other = tmp_path / "elsewhere" / "copy"
    shutil.copytree(run, other)
    for index, file in enumerate(sorted(other.rglob("*"))):
        os.utime(file, (1e9 + index, 1e9 + index))
        file.chmod(0o700)
    pack(other, tmp_path / "second", report=_page)
    assert _bytes(tmp_path / "first") == _bytes(tmp_path / "second")
    with tarfile.open(tmp_path / "second" / "merged_model.tar.gz") as tar:
        infos = list(tar)
    assert [info.name for info in infos] == sorted(info.name for info in infos)
    assert {(info.uid, info.gid, info.uname, info.mtime, info.mode) for info in infos} == {
        (0, 0, "", 0, 0o644)
    }
    header = (tmp_path / "second" / "merged_model.tar.gz").read_bytes()[:10]
    assert header[3] == 0, "the gzip header carries a name"
    assert header[4:8] == bytes(4), "the gzip header carries a time"


def test_the_number_of_cores_does_not_show(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(0)
    write_merged(run, weights=bytes(chance.getrandbits(7) for _ in range(3_500_000)))
    found = set()
    for cores in (1, 2, 3, 7):
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid, cores=cores: set(range(cores)))
        pack(run, tmp_path / "package")
        found.add(hashlib.sha256((tmp_path / "package" / "merged_model.tar.gz").read_bytes()).hexdigest())
    assert len(found) == 1


def test_the_manifest_describes_what_is_inside(run: Path, tmp_path: Path) -> None:
    package = tmp_path / "package"
    assert pack(run, package, report=_page) == read_record(package / "manifest.json", PackageManifest)
    manifest = read_record(package / "manifest.json", PackageManifest)
    for archive in manifest.archives:
        content = (package / archive.path).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (archive.bytes, archive.sha256)
        assert hashlib.sha256(gzip.decompress(content)).hexdigest() == manifest.stream_sha256[archive.path]
        assert {m.path: (m.bytes, m.sha256) for m in manifest.contents[archive.path]} == {
            name: (len(data), hashlib.sha256(data).hexdigest())
            for name, data in _members(package / archive.path).items()
        }


def test_forbidden_text_stays_behind(run: Path, tmp_path: Path) -> None:
    assert SECRET in (run / "testset" / "test_set.jsonl").read_text()
    manifest = pack(run, tmp_path / "package")
    members = _members(tmp_path / "package" / "validation_results.tar.gz")
    assert not [name for name, data in members.items() if SECRET.encode() in data]

    rows = [json.loads(line) for line in members["validation_results/testset/test_set.jsonl"].splitlines()]
    originals = {example.id: example for example in sample_examples(40)}
    assert [row["id"] for row in rows] == list(originals)
    for row in rows:
        example = originals[row["id"]]
        if example.metadata.source == "GPQA":
            assert set(row) == {"id", "redacted", "metadata"}
            assert "sha256" not in row["metadata"], "the hash of the source row is not salted"
            salt = row["redacted"]["salt"]
            assert row["redacted"]["sha256"] == salted_sha256(salt, example.prompt, example.response)
        else:
            assert (row["prompt"], row["response"]) == (example.prompt, example.response)

    for role in ROLES:
        table = pq.read_table(
            io.BytesIO(members[f"validation_results/validation/{role}.parquet"])
        ).to_pylist()
        for row in table:
            hidden = row["source"] == "GPQA"
            assert (row["token_ids"] is None) == hidden
            assert (row["worst"] is None) == hidden
            assert row["loss"] > 0
            assert len(row["logprobs"]) == row["tokens"]
    flips = json.loads(members["validation_results/proof/behaviour.json"])["flips"]
    assert {flip["example"].split("-")[0] for flip in flips} == {"drop", "humaneval", "math", "mmlu"}
    changed = set(manifest.redacted)
    assert changed == {
        "validation_results/testset/test_set.jsonl",
        "validation_results/proof/behaviour.json",
        *(f"validation_results/validation/{role}.parquet" for role in ROLES),
    }


def test_without_forbidden_rows_every_file_is_the_run_s_own(tmp_path: Path) -> None:
    rows = [row for row in sample_examples(20) if row.metadata.source != "GPQA"]
    run = sample_run(tmp_path / "run", rows=rows)
    assert pack(run, tmp_path / "package").redacted == {}
    for name, data in _members(tmp_path / "package" / "validation_results.tar.gz").items():
        assert (run / name.split("/", 1)[1]).read_bytes() == data


def test_another_test_set_than_the_one_used_is_refused(run: Path, tmp_path: Path) -> None:
    path = run / "validation" / "merged.json"
    record = read_record(path, ValidationResult)
    used = record.test_set.model_copy(update={"sha256": "0" * 64})
    write_record(path, record.model_copy(update={"test_set": used}))
    with pytest.raises(DataError, match="another test set"):
        pack(run, tmp_path / "package")
    assert not (tmp_path / "package").exists()


@pytest.mark.parametrize("damage", ["changed", "missing", "extra"])
def test_a_merged_folder_that_is_not_the_merge_is_refused(run: Path, tmp_path: Path, damage: str) -> None:
    weights = run / "merged" / "model.safetensors"
    if damage == "changed":
        content = bytearray(weights.read_bytes())
        content[12345] ^= 1
        weights.write_bytes(content)
    elif damage == "missing":
        weights.unlink()
    else:
        (run / "merged" / "model-00002.safetensors").write_bytes(b"stale")
    with pytest.raises(CheckpointError, match="merge"):
        pack(run, tmp_path / "package")
    assert list(tmp_path.iterdir()) == [run], "something was left behind"


@pytest.mark.parametrize("missing", ["run.json", "testset/test_set.jsonl", "validation/adapter.json"])
def test_an_unfinished_run_is_refused(run: Path, tmp_path: Path, missing: str) -> None:
    (run / missing).unlink()
    with pytest.raises(DataError, match=missing):
        pack(run, tmp_path / "package")


def test_an_older_package_is_replaced_and_nothing_else(run: Path, tmp_path: Path) -> None:
    inside = run / "package"
    pack(run, inside)
    (inside / "stale.txt").write_text("of an older package")
    pack(run, inside)
    assert not (inside / "stale.txt").exists()
    home = tmp_path / "home"
    home.mkdir()
    (home / "thesis.tex").write_text("years of work")
    with pytest.raises(UsageError, match="no package"):
        pack(run, home)
    assert (home / "thesis.tex").read_text() == "years of work"
    for place in (run, run.parent, run / "merged"):
        with pytest.raises(UsageError):
            pack(run, place)


def test_too_little_space_is_told_before_anything_is_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(folder: Path, needed: int, doing: str) -> None:
        raise DiskError(f"too little disk space to {doing}", where=folder)

    monkeypatch.setattr(pack_module, "require_disk", full)
    with pytest.raises(DiskError):
        pack(run, tmp_path / "package")
    assert list(tmp_path.iterdir()) == [run]


def test_an_unknown_compression_names_those_that_exist(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="gzip, none"):
        pack(run, tmp_path / "package", compression="rar")


def test_a_long_or_foreign_name_survives(run: Path, tmp_path: Path) -> None:
    folder = run / "merged" / ("deep" * 30) / "größe"
    folder.mkdir(parents=True)
    (folder / "vocab.txt").write_text("ok")
    write_merged(run)
    pack(run, tmp_path / "package")
    subprocess.run(["tar", "-xzf", tmp_path / "package" / "merged_model.tar.gz"], cwd=tmp_path, check=True)
    assert (tmp_path / "merged_model" / ("deep" * 30) / "größe" / "vocab.txt").read_text() == "ok"
