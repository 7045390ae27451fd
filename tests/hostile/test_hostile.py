"""Each hostile or broken input gets its message, exit code 2, and bounded memory."""

from __future__ import annotations

import json
import pickle
import shutil
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lorasmith.checkpoint.adapter import open_adapter, parse_config
from lorasmith.checkpoint.header import read_header
from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.errors import AdapterError, CheckpointError, ExitCode, LorasmithError
from lorasmith.merging.merge import merge
from tests.hostile.files import CONFIGS, FILES
from tests.tiny import save_adapter, save_base

MEMORY = 200 << 20
"""No broken header may cost more; the million-digit ones cost some tens of MB."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("inputs")
    base = save_base(folder / "base", max_shard_size="30KB")
    return base, save_adapter(folder / "adapter", base)


@pytest.fixture
def base(tmp_path: Path, inputs: tuple[Path, Path]) -> Path:
    return Path(shutil.copytree(inputs[0], tmp_path / "base"))


@pytest.fixture
def adapter(tmp_path: Path, inputs: tuple[Path, Path]) -> Path:
    return Path(shutil.copytree(inputs[1], tmp_path / "adapter"))


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, *_ in FILES])
def test_a_hostile_file(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as caught:
            read_header(path)
        assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    assert message in caught.value.found
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("name", "content", "message"), FILES, ids=[name for name, *_ in FILES])
def test_a_hostile_adapter(
    adapter: Path, inputs: tuple[Path, Path], name: str, content: bytes, message: str
) -> None:
    (adapter / "adapter_model.safetensors").write_bytes(content)
    with pytest.raises(AdapterError) as caught:
        merge(inputs[0], adapter, adapter.parent / "out")
    assert message in caught.value.found


@pytest.mark.parametrize(("name", "fields", "message"), CONFIGS, ids=[name for name, *_ in CONFIGS])
def test_a_config_that_cannot_be_merged(
    adapter: Path, inputs: tuple[Path, Path], name: str, fields: dict[str, Any], message: str
) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    with pytest.raises(AdapterError) as caught:
        merge(inputs[0], adapter, adapter.parent / "out")
    assert message in caught.value.found
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert not (adapter.parent / "out").exists()


def edit_index(base: Path, change: Any) -> None:
    path = base / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


def set_map(name: str, value: Any) -> Any:
    def change(index: dict[str, Any]) -> None:
        index["weight_map"][name] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (set_map("model.norm.weight", "../secret.safetensors"), "places 'model.norm.weight' in '../secret"),
        (set_map("model.norm.weight", "/etc/passwd"), "places 'model.norm.weight' in '/etc/passwd'"),
        (set_map("model.norm.weight", "a/b.safetensors"), "places"),
        (set_map("model.norm.weight", "..\\b.safetensors"), "places"),
        (set_map("model.norm.weight", ".."), "places"),
        (set_map("model.norm.weight", ""), "places"),
        (set_map("model.norm.weight", 3), "places"),
        (set_map("model.norm.weight", "pytorch_model.bin"), "names 'pytorch_model.bin'"),
        (set_map("model.norm.weight", "model-00009-of-00003.safetensors"), "which is missing"),
        (set_map("model.extra.weight", "model-00001-of-00003.safetensors"), "does not hold it"),
        (lambda index: index.pop("weight_map"), "no weight_map"),
        (lambda index: index.update(weight_map={}), "no weight_map"),
        (lambda index: index.update(weight_map=[1]), "no weight_map"),
    ],
)
def test_an_index_that_lies(base: Path, adapter: Path, change: Any, message: str) -> None:
    edit_index(base, change)
    with pytest.raises(CheckpointError) as caught:
        merge(base, adapter, base.parent / "out")
    assert message in caught.value.found
    assert caught.value.exit_code == ExitCode.BAD_INPUT


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe", b"null", b"[" * 200_000])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json", "adapter_config.json"])
def test_broken_json(base: Path, adapter: Path, name: str, content: bytes) -> None:
    folder = adapter if name.startswith("adapter") else base
    (folder / name).write_bytes(content)
    with pytest.raises((CheckpointError, AdapterError)) as caught:
        merge(base, adapter, base.parent / "out")
    assert name in str(caught.value.where)


def test_truncated_shards(base: Path, adapter: Path) -> None:
    shard = max(base.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="the file at"):
        merge(base, adapter, base.parent / "out")


def test_a_tensor_in_two_shards(base: Path) -> None:
    shards = sorted(base.glob("*.safetensors"))
    tensors = load_file(shards[0])
    name = next(iter(tensors))
    save_file({**load_file(shards[1]), name: tensors[name]}, shards[1], metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"is in .* and in"):
        open_checkpoint(base)


@pytest.mark.parametrize(
    "quantization",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "awq"},
        {"quant_method": "fp8"},
        {"quant_method": "mxfp4"},
        {"quant_method": "compressed-tensors"},
    ],
)
def test_a_quantized_base(base: Path, adapter: Path, quantization: dict[str, Any]) -> None:
    path = base / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
    with pytest.raises(CheckpointError, match=f"quantized.*{quantization['quant_method']}") as caught:
        merge(base, adapter, base.parent / "out")
    assert "16-bit" in str(caught.value)


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_a_pickled_adapter_is_not_opened(adapter: Path, inputs: tuple[Path, Path], tmp_path: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(AdapterError, match="pickle"):
        merge(inputs[0], adapter, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_a_pickled_base_is_not_opened(base: Path, adapter: Path, tmp_path: Path) -> None:
    for file in base.glob("model*"):
        file.unlink()
    (base / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"holds pytorch_model\.bin, but no safetensors"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_code_in_the_base_is_copied_and_never_run(base: Path, adapter: Path, tmp_path: Path) -> None:
    (base / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "ran").exists()


def test_folders_given_the_wrong_way_round(base: Path, adapter: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="adapter folder, not a model"):
        merge(adapter, adapter, tmp_path / "out")
    with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
        merge(base, base, tmp_path / "out")
    with pytest.raises(CheckpointError, match="no such model folder"):
        merge(tmp_path / "nowhere", adapter, tmp_path / "out")
    with pytest.raises(AdapterError, match="no such adapter folder"):
        merge(base, tmp_path / "nowhere", tmp_path / "out")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        "r",
        "lora_alpha",
        "rank_pattern",
        "alpha_pattern",
        "bias",
        "use_dora",
        "target_modules",
        "modules_to_save",
        "other",
        "use_rslora",
        "trainable_token_indices",
        "init_lora_weights",
        "target_parameters",
        "peft_version",
    ]
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(FIELDS, JSON, max_size=4))
def test_any_config_is_read_or_refused(fields: dict[str, Any]) -> None:
    try:
        config = parse_config({"peft_type": "LORA", **fields}, Path("adapter_config.json"))
    except AdapterError:
        return
    assert config.r > 0
    assert config.scale("model.layers.0.q_proj") == config.scale("model.layers.0.q_proj")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_an_adapter_with_one_byte_changed_is_refused_or_merged(
    tmp_path_factory: pytest.TempPathFactory, inputs: tuple[Path, Path], data: st.DataObject
) -> None:
    """Never a crash; in the header mostly a refusal, in the numbers another adapter."""
    base, adapter = inputs
    folder = tmp_path_factory.mktemp("flip")
    broken = Path(shutil.copytree(adapter, folder / "adapter"))
    file = broken / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        open_adapter(broken)
        merge(base, broken, folder / "out")
    except LorasmithError as error:
        assert error.exit_code == ExitCode.BAD_INPUT
        assert not (folder / "out").exists()
