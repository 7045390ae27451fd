"""The folder that a merge leaves: whole, replaced as a whole, never within an input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.errors import BusyError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.files.output_folder import only_one
from lorasmith.merging.merge import merge
from tests.merging.planted import tensors_of
from tests.tiny import save_adapter, save_base


def test_the_folder_stands_alone(tmp_path: Path, base: Path, adapter: Path) -> None:
    record = merge(base, adapter, tmp_path / "out", precision="float16")
    out = tmp_path / "out"
    names = {file.name for file in base.glob("*.safetensors")}
    assert {file.name for file in out.glob("*.safetensors")} == names
    assert len(names) > 1
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float16"
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors_of(out).values())
    for tensor, shard in index["weight_map"].items():
        with safe_open(out / shard, "pt") as file:
            assert tensor in file.keys()  # noqa: SIM118
            assert file.metadata() == {"format": "pt"}
    assert AutoTokenizer.from_pretrained(out).chat_template
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.dtype == torch.float16
    for file in out.iterdir():
        assert file.stat().st_mode & 0o444 == 0o444, f"{file.name} cannot be read by others"
    listed = {file.path for file in record.files} | {"lorasmith_merge.json"}
    assert listed == {file.name for file in out.iterdir()}
    assert str(tmp_path) not in (out / "lorasmith_merge.json").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["out"], "nothing is left beside the output"


def test_untouched_tensors_are_copied_byte_for_byte(tmp_path: Path, base: Path, adapter: Path) -> None:
    record = merge(base, adapter, tmp_path / "out")
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    changed = {tensor.name for tensor in record.tensors}
    assert record.copied == len(before) - len(changed) > 0
    for name, tensor in before.items():
        same = torch.equal(tensor.view(torch.int16), after[name].view(torch.int16))
        assert same == (name not in changed), name


def test_integer_buffers_are_never_cast(tmp_path: Path, base: Path, adapter: Path) -> None:
    copy = shutil.copytree(base, tmp_path / "base")
    shard = next(iter(sorted(copy.glob("*.safetensors"))))
    extra = torch.arange(7)
    save_file({**load_file(shard), "model.counter": extra}, shard, metadata={"format": "pt"})
    merge(copy, adapter, tmp_path / "out", precision="float16")
    assert torch.equal(tensors_of(tmp_path / "out")["model.counter"], extra)


def test_the_adapters_tokenizer_goes_first(tmp_path: Path, base: Path, adapter: Path) -> None:
    own = shutil.copytree(adapter, tmp_path / "adapter")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = "{{ 'adapter' }}"
    tokenizer.save_pretrained(own)
    merge(base, own, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "{{ 'adapter' }}"


def test_a_merge_close_to_a_no_op_says_so(tmp_path: Path, base: Path) -> None:
    weak = save_adapter(tmp_path / "adapter", base, std=1e-4)
    record = merge(base, weak, tmp_path / "out")
    assert record.swallowed_fraction > 0.5
    assert [finding.code for finding in record.findings] == ["close-to-no-op"]
    assert (
        record.elements_swallowed + sum(tensor.changed for tensor in record.tensors)
        == record.elements_updated
    )


def test_an_existing_merge_is_replaced(tmp_path: Path, base: Path, adapter: Path) -> None:
    merge(base, adapter, tmp_path / "out", precision="float32")
    (tmp_path / "out" / "stale.txt").write_text("old")
    merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out" / "stale.txt").exists()
    assert tensors_of(tmp_path / "out")["lm_head.weight"].dtype == torch.bfloat16


def test_a_partial_folder_of_another_merge_is_not_taken_up(tmp_path: Path, base: Path, adapter: Path) -> None:
    merge(base, adapter, tmp_path / "expected")
    stale = tmp_path / ".out.partial"
    stale.mkdir()
    shutil.copytree(tmp_path / "expected", stale, dirs_exist_ok=True)
    first = next(iter(sorted(stale.glob("*.safetensors"))))
    first.write_bytes(first.read_bytes()[::-1])
    merge(base, adapter, tmp_path / "out")
    assert digest_folder(tmp_path / "out") == digest_folder(tmp_path / "expected")


def test_symlinked_cache_folders_work(tmp_path: Path, base: Path, adapter: Path) -> None:
    blobs = Path(shutil.copytree(base, tmp_path / "models--org--name" / "blobs"))
    links = blobs.parent / "snapshots" / ("a" * 40)
    links.mkdir(parents=True)
    for file in blobs.iterdir():
        (links / file.name).symlink_to(f"../../blobs/{file.name}")
    merge(links, adapter, tmp_path / "out")
    assert not any(file.is_symlink() for file in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("place", ["base", "base/inside", "adapter", "adapter/deep/inside", "."])
def test_an_output_within_an_input_is_refused(tmp_path: Path, base: Path, adapter: Path, place: str) -> None:
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    before = digest_folder(tmp_path)
    with pytest.raises(UsageError, match="input"):
        merge(tmp_path / "base", tmp_path / "adapter", tmp_path / place)
    assert digest_folder(tmp_path) == before


def test_a_folder_that_is_no_model_is_not_replaced(tmp_path: Path, base: Path, adapter: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match="did not write"):
        merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_two_merges_into_one_output_at_once(tmp_path: Path, base: Path, adapter: Path) -> None:
    with only_one(tmp_path / "out", "merge"), pytest.raises(BusyError, match="another merge"):
        merge(base, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "out")


@pytest.mark.parametrize("where", [None, "config.json", "tokenizer_config.json"])
def test_code_of_the_base_goes_along_only_where_a_config_names_it(tmp_path: Path, where: str | None) -> None:
    base = save_base(tmp_path / "base")
    adapter = save_adapter(tmp_path / "adapter", base)
    (base / "modeling_x.py").write_text("raise SystemExit('this must never run')")
    if where is not None:
        config = json.loads((base / where).read_text())
        (base / where).write_text(json.dumps({**config, "auto_map": {"AutoTokenizer": "modeling_x.X"}}))
    record = merge(base, adapter, tmp_path / "merged")
    (finding,) = (one for one in record.findings if "code" in one.code)
    assert "modeling_x.py" in finding.message
    assert (finding.severity, finding.code) == (
        ("note", "code-left-out") if where is None else ("warning", "model-code")
    )
    assert (tmp_path / "merged" / "modeling_x.py").exists() == (where is not None)
