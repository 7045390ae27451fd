"""A base by its name on the hub: from the cache or downloaded, the same merge, and plain messages."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import lorasmith
from lorasmith.errors import CheckpointError, DiskError, MachineError, UsageError
from lorasmith.files.jsonl import write_rows
from lorasmith.hub.cache import Origin, hub_name, origin_of
from lorasmith.hub.models import base_of, local_model
from tests.model_hub import COMMIT, ModelHub, fill_cache, serving
from tests.tiny import save_adapter, save_base, tiny_rows
from tests.typed import Typed

NAME = "owner/tiny-llama"
OTHER = "89abcdef0123456789abcdef0123456789abcdef"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "base", max_shard_size="40KB")


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub, and no network."""
    import huggingface_hub.constants as constants

    folder = tmp_path / "hub-cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def hub(cache: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelHub]:
    """A server with the base on it, and files that nobody needs."""
    import huggingface_hub.constants as constants

    with serving(NAME) as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        server.load(base)
        for unwanted in ("pytorch_model.bin", "consolidated.safetensors", "training_args.bin", "big.onnx"):
            server.files[unwanted] = b"not needed"
        yield server


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in folder.iterdir()}


def shards(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("*.safetensors"))


def test_a_cached_base_merges_without_network_to_the_same_weights(
    cache: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    fill_cache(cache, NAME, base)
    lorasmith.merge(base, adapter, tmp_path / "from-folder")
    record = lorasmith.merge(NAME, adapter, tmp_path / "from-hub")
    assert (record.base_repository, record.base_commit) == (NAME, COMMIT)
    ours, theirs = contents(tmp_path / "from-hub"), contents(tmp_path / "from-folder")
    assert ours.pop("lorasmith_merge.json") != theirs.pop("lorasmith_merge.json")
    assert ours == theirs
    assert lorasmith.prove(NAME, adapter, tmp_path / "from-hub").grade == "exact"


def test_the_record_depends_on_the_name_and_not_on_where_the_cache_lies(
    cache: Path, base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    fill_cache(cache, NAME, base)
    lorasmith.merge(NAME, adapter, tmp_path / "one")
    fill_cache(tmp_path / "elsewhere", NAME, base)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    lorasmith.merge(NAME, adapter, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_revisions_are_branches_tags_and_commits(cache: Path, base: Path, tmp_path: Path) -> None:
    main = fill_cache(cache, NAME, base)
    other = fill_cache(cache, NAME, base, commit=OTHER, ref="v1.0")
    assert local_model(NAME) == main
    assert local_model(f"{NAME}@v1.0") == other == local_model(f"{NAME}@{OTHER}")
    assert origin_of(other) == Origin(NAME, OTHER)
    with pytest.raises(MachineError, match="HF_HUB_OFFLINE"):
        local_model(f"{NAME}@v2.0")


def test_the_adapters_revision_counts_where_none_is_given(
    cache: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    main = fill_cache(cache, NAME, base)
    other = fill_cache(cache, NAME, base, commit=OTHER, ref="v1.0")
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    config = json.loads((own / "adapter_config.json").read_text())
    written = {**config, "base_model_name_or_path": NAME, "revision": "v1.0"}
    (own / "adapter_config.json").write_text(json.dumps(written))
    assert local_model(NAME, [own]) == other
    assert local_model(f"{NAME}@main", [own]) == main
    assert local_model(NAME, [adapter]) == main
    assert base_of(own) == f"{NAME}@v1.0"
    # A base at another commit than the one that the adapter names is told.
    (own / "adapter_config.json").write_text(json.dumps({**written, "revision": OTHER}))
    record = lorasmith.merge(f"{NAME}@main", own, tmp_path / "merged")
    assert "base-revision" in {finding.code for finding in record.findings}
    record = lorasmith.merge(NAME, own, tmp_path / "right")
    assert "base-revision" not in {finding.code for finding in record.findings}


def test_a_download_takes_what_is_needed_and_nothing_else(
    hub: ModelHub, cache: Path, base: Path, adapter: Path, tmp_path: Path
) -> None:
    record = lorasmith.merge(NAME, adapter, tmp_path / "merged")
    assert record.base_commit == COMMIT
    fetched = [name for name in hub.asked if name != "api"]
    assert fetched[-len(shards(base)) :] == shards(base)
    assert set(fetched) == {file.name for file in base.iterdir()}
    hub.asked.clear()
    lorasmith.merge(NAME, adapter, tmp_path / "again")
    assert hub.asked == []
    assert contents(tmp_path / "merged") == contents(tmp_path / "again")


def test_a_download_that_was_cut_off_goes_on_with_the_shard_that_is_missing(
    hub: ModelHub, base: Path, tmp_path: Path
) -> None:
    last = shards(base)[-1]
    hub.broken.add(last)
    with pytest.raises(MachineError, match="cannot be reached"):
        local_model(NAME)
    hub.broken.clear()
    hub.asked.clear()
    snapshot = local_model(NAME)
    assert hub.asked == ["api", last]
    assert contents(snapshot) == contents(base)


def test_a_damaged_file_is_not_kept(hub: ModelHub, base: Path) -> None:
    last = shards(base)[-1]
    hub.damaged.add(last)
    with pytest.raises(CheckpointError, match="arrived damaged"):
        local_model(NAME)
    hub.damaged.clear()
    assert contents(local_model(NAME)) == contents(base)


def test_progress_counts_every_byte(hub: ModelHub, base: Path) -> None:
    from contextlib import contextmanager

    totals: list[int] = []
    done: list[int] = []

    @contextmanager
    def watch(label: str, *, total: int, unit: str) -> Iterator[object]:
        totals.append(total)
        yield done.append

    local_model(NAME, progress=watch)  # type: ignore[arg-type]
    assert sum(totals) == sum(done) == sum(file.stat().st_size for file in base.iterdir())


def test_the_disk_is_looked_at_before_the_weights_are_fetched(
    hub: ModelHub, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nearly:
        f_bavail = f_bfree = f_blocks = 40
        f_frsize = 1024

    monkeypatch.setattr("os.statvfs", lambda _: Nearly)
    with pytest.raises(DiskError, match=f"download {NAME}"):
        local_model(NAME)
    assert not [name for name in hub.asked if name.endswith(".safetensors")]


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ("owner/other", "gives no model of that name"),
        (f"{NAME}@nowhere", "has no revision 'nowhere'"),
    ],
)
def test_what_the_hub_does_not_have(hub: ModelHub, named: str, says: str) -> None:
    with pytest.raises(CheckpointError, match=says):
        local_model(named)


def test_a_gated_model_says_what_to_do(hub: ModelHub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.gated = True
    with pytest.raises(CheckpointError, match=r"gated, and there is no token[\s\S]*accept the conditions"):
        local_model(NAME)
    monkeypatch.setenv("HF_TOKEN", "hf_something")
    assert (local_model(NAME) / "config.json").is_file()


@pytest.mark.parametrize("weights", ["pytorch_model.bin", "model.gguf"])
def test_a_model_without_safetensors_is_refused_before_anything_large(hub: ModelHub, weights: str) -> None:
    hub.files = {"config.json": hub.files["config.json"], weights: b"x" * 100}
    with pytest.raises(CheckpointError, match=f"{weights}, but no safetensors"):
        local_model(NAME)
    assert weights not in hub.asked


def test_an_adapter_repository_is_no_base(hub: ModelHub) -> None:
    hub.files = {"adapter_config.json": b"{}", "adapter_model.safetensors": b"x"}
    with pytest.raises(CheckpointError, match=r"holds no config\.json"):
        local_model(NAME)


def test_an_index_that_names_what_is_not_there_or_outside(hub: ModelHub, base: Path) -> None:
    index = "model.safetensors.index.json"
    body = json.loads(hub.files[index])
    first = next(iter(body["weight_map"]))
    for name in ("../../../outside.safetensors", "model-9.safetensors"):
        hub.files[index] = json.dumps({**body, "weight_map": {**body["weight_map"], first: name}}).encode()
        hub.revisions = {"main": hashlib.sha1(name.encode()).hexdigest()}
        with pytest.raises(CheckpointError):
            lorasmith.checkpoint.model.open_checkpoint(local_model(NAME))


HOSTILE: dict[str, tuple[dict[str, object], dict[str, str]]] = {
    "a commit that climbs": ({"sha": "../../../outside"}, {}),
    "a commit that is a path": ({"sha": "/tmp/outside"}, {}),
    "no commit": ({"sha": None}, {}),
    "a size below nothing": ({"siblings": [{"rfilename": "config.json", "size": -(10**15)}]}, {}),
    "a size in words": ({"siblings": [{"rfilename": "config.json", "size": "huge"}]}, {}),
    "files without names": ({"siblings": [{"size": 3}]}, {}),
    "no list of files": ({"siblings": 3}, {}),
    "a file's name that is a number": ({"siblings": [{"rfilename": 7, "size": 3}]}, {}),
    "another commit in the answer for a file": ({}, {"X-Repo-Commit": "../../../../outside"}),
    "a tag that climbs": ({}, {"X-Linked-Etag": '"../../../outside"'}),
    "a tag that is a path": ({}, {"X-Linked-Etag": '"/nowhere/outside"'}),
    "a smaller size in the answer for a file": ({}, {"X-Linked-Size": "7"}),
    "a tag that is the folder above": ({}, {"X-Linked-Etag": '".."'}),
    "a tag of another kind that climbs": ({}, {"ETag": 'W/"../../../outside"'}),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_hub_is_refused_and_writes_nothing_outside_the_cache(
    hub: ModelHub, cache: Path, tmp_path: Path, what: str
) -> None:
    hub.told, hub.headers = HOSTILE[what]
    with pytest.raises((CheckpointError, MachineError)):
        local_model(NAME)
    assert not list(tmp_path.rglob("*outside*"))
    assert set(tmp_path.iterdir()) <= {cache}
    hub.told, hub.headers = {}, {}
    assert set(hub.files) > {file.name for file in local_model(NAME).iterdir()}


def test_no_network_names_both_readings_of_the_path(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="no folder 'models/bse' here, and the hub cannot be reached"):
        local_model("models/bse")


def test_a_folder_wins_over_a_name(cache: Path, base: Path, tmp_path: Path) -> None:
    fill_cache(cache, NAME, base)
    (tmp_path / "owner" / "tiny-llama").mkdir(parents=True)
    assert local_model(NAME) == Path(NAME)


@pytest.mark.parametrize(
    "named",
    ["base", "/a/b", "./a/b", "../a/b", "a/b/c", "a/../b", "~/b", "a/b@", "a/b@../c", "a/b@c/../d", ""],
)
def test_these_are_no_names_of_the_hub(named: str) -> None:
    assert hub_name(named) is None


def test_an_adapter_that_names_no_base(adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    shutil.copytree(adapter, own)
    for named in (None, "/not/here", 7):
        (own / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
        with pytest.raises(UsageError, match="give it with --base"):
            base_of(own)


def test_the_commands_as_typed(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Merge, prove and a whole run of a base that is only on the hub, then without the hub."""
    write_rows(tmp_path / "test.jsonl", tiny_rows(4))
    (tmp_path / "run.toml").write_text(
        f'base = "{NAME}"\nadapter = "{adapter}"\ntest_set = "test.jsonl"\noutput = "run"\n'
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}

    def typed(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "lorasmith.cli.main", *map(str, arguments)]
        return subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    with serving(NAME) as server:
        server.load(base)
        environment["HF_ENDPOINT"] = server.url
        given = ("--base", NAME, "--adapter", adapter)
        done = typed("merge", *given, "--output", "merged")
        assert done.returncode == 0, done.stderr
        assert f"Download {NAME} (weights)" in done.stderr
    done = typed("prove", *given, "--merged", "merged")
    assert done.returncode == 0, done.stderr
    done = typed("run", "--config", "run.toml")
    assert done.returncode == 1 and "Step 9" in done.stdout, done.stderr
    record = json.loads((tmp_path / "run" / "merged" / "lorasmith_merge.json").read_text())
    assert (record["base_repository"], record["base_commit"]) == (NAME, COMMIT)


def test_a_base_that_the_hub_has_not_is_wrong_usage_and_a_hub_that_is_away_is_not(
    hub: ModelHub, adapter: Path, here: Typed, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub.constants as constants

    asked = ("merge", "--base", "owner/none", "--adapter", adapter, "--output", "none")
    missing = here(*asked)
    assert missing.returncode == 2 and "Traceback" not in missing.stderr
    # Port 9 of this machine, where nobody listens.
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    offline = here(*asked)
    assert offline.returncode == 3 and "cannot be reached" in offline.stderr


MODEL_CODE = {"modeling_x.py": b"import os", "configuration_x.py": b"", "setup.py": b""}


@pytest.mark.parametrize("named", [False, True])
def test_code_is_fetched_only_where_a_config_names_it(cache: Path, hub: ModelHub, named: bool) -> None:
    hub.files |= MODEL_CODE
    if named:
        config = json.loads(hub.files["config.json"])
        hub.files["config.json"] = json.dumps({**config, "auto_map": {"AutoModel": "modeling_x.X"}}).encode()
    folder = local_model(NAME)
    assert {file.name for file in folder.glob("*.py")} == (set(MODEL_CODE) if named else set())
