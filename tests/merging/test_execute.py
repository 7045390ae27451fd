"""A merge is right to the last bit, the same everywhere, whole, and refuses what it would do wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from lorasmith.errors import AdapterError, BusyError, CheckpointError, DiskError, LorasmithError, UsageError
from lorasmith.files.digests import digest_folder
from lorasmith.files.lock import only_one
from lorasmith.merging import disk, lowrank
from lorasmith.merging.execute import merge
from tests.merging.reference import merged_value, nearest
from tests.tiny import save_adapter, save_base

PREFIX = "base_model.model."
NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base") / "model", max_shard_size="30KB")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> Path:
    return save_adapter(tmp_path_factory.mktemp("adapter") / "adapter", base)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(torch.randint(5, 290, (2, 24))).logits.double()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 3, "lora_alpha": 5},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 6}, "alpha_pattern": {"down_proj": 1}},
        {
            "rank_pattern": {r"layers\.\d+\.self_attn\..*": 5},
            "alpha_pattern": {"model.layers.0.mlp.up_proj": 24},
        },
        {"target_modules": ["q_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": "all-linear", "exclude_modules": ["q_proj"]},
    ],
    ids=["plain", "rslora", "patterns", "regex-patterns", "one-layer", "excluded"],
)
def test_the_merged_model_computes_what_the_adapter_does(
    tmp_path: Path, base: Path, settings: dict[str, Any]
) -> None:
    adapter = save_adapter(tmp_path / "adapter", base, **settings)
    merge(base, adapter, tmp_path / "out", precision="float32")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    alone = logits(plain)
    unmerged = logits(PeftModel.from_pretrained(plain, adapter).eval())
    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32))
    assert (unmerged - alone).std() > 0.01 * alone.std(), "an adapter that does nothing tests nothing"
    # Two float32 forwards of one function differ by some ulps that the layers amplify.
    assert (merged - unmerged).abs().max() < 1e-4 * unmerged.std()


def plant(folder: Path, dtype: torch.dtype, *, low_bits: bool) -> tuple[Path, Path]:
    """Base and adapter whose one target holds ties, subnormals and zeros."""
    save_base(folder / "base", dtype=dtype)
    save_adapter(folder / "adapter", folder / "base", target_modules=["q_proj"], r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(3)
    weights = load_file(folder / "base" / "model.safetensors")
    factors = load_file(folder / "adapter" / "adapter_model.safetensors")
    for layer in range(2):
        target = f"model.layers.{layer}.self_attn.q_proj.weight"
        values = torch.randn(32, 32, generator=generator)
        values[0] = 0
        values[1] *= 1e-6
        values[2, ::2] = -0.0
        values[3] = 2.0 ** torch.randint(-14, 3, (32,), generator=generator)
        weights[target] = values.to(dtype)
        down = factors[PREFIX + target.replace(".weight", ".lora_A.weight")]
        up = factors[PREFIX + target.replace(".weight", ".lora_B.weight")]
        if low_bits:
            down.copy_(torch.randint(-2, 3, down.shape, generator=generator).float())
            up.copy_(2.0 ** -torch.randint(4, 14, up.shape, generator=generator))
            up[4] = 0
            down[:, 5] = 0
        up[5] *= 1e-5
    save_file(weights, folder / "base" / "model.safetensors", metadata={"format": "pt"})
    save_file(factors, folder / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("low_bits", [False, True], ids=["random", "ties"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_every_element_is_the_correctly_rounded_formula(
    tmp_path: Path, stored: torch.dtype, precision: str, low_bits: bool
) -> None:
    base, adapter = plant(tmp_path, stored, low_bits=low_bits)
    record = merge(base, adapter, tmp_path / "out", precision=precision)
    dtype = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[precision]
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    factors = load_file(adapter / "adapter_model.safetensors")
    for result in record.tensors:
        weights = before[result.name].double().tolist()
        up = factors[PREFIX + result.name.replace(".weight", ".lora_B.weight")].double().tolist()
        down = factors[PREFIX + result.name.replace(".weight", ".lora_A.weight")].double().T.tolist()
        exact = [
            [merged_value(weights[row][col], [(2.0, 1.0, up[row], down[col])]) for col in range(32)]
            for row in range(32)
        ]
        expected = [[nearest(value, dtype) for value in values] for values in exact]
        assert after[result.name].dtype == NAMES[dtype]
        assert after[result.name].double().tolist() == expected
        changed = sum(
            new != nearest(merged_value(old, []), dtype)
            for olds, news in zip(weights, expected, strict=True)
            for old, new in zip(olds, news, strict=True)
        )
        touched = sum(
            any(a * b for a, b in zip(up[row], down[col], strict=True))
            for row in range(32)
            for col in range(32)
        )
        assert (result.changed, result.swallowed) == (changed, touched - changed)
        if low_bits and stored != torch.float32 and precision != "float32":
            assert result.exact_redone > 0, "the planted factors make ties"
    for name in set(before) - {result.name for result in record.tensors}:
        assert torch.equal(after[name], before[name].to(NAMES[dtype])), name


def test_two_adapters_add_up_with_their_weights(tmp_path: Path, base: Path) -> None:
    first = save_adapter(tmp_path / "a", base, seed=1, r=3, lora_alpha=7, target_modules=["q_proj", "o_proj"])
    second = save_adapter(tmp_path / "b", base, seed=2, r=2, use_rslora=True, target_modules=["q_proj"])
    weights = [0.7, -1.3]
    record = merge(base, [first, second], tmp_path / "out", weights=weights)
    before, after = tensors_of(base), tensors_of(tmp_path / "out")
    scales = [7 / 3, 8 / 2**0.5]
    name = "model.layers.0.self_attn.q_proj.weight"
    pairs = []
    for folder in (first, second):
        factors = load_file(folder / "adapter_model.safetensors")
        up = factors[PREFIX + name.replace(".weight", ".lora_B.weight")].double().tolist()
        down = factors[PREFIX + name.replace(".weight", ".lora_A.weight")].double().T.tolist()
        pairs.append((up, down))
    for row in range(32):
        for col in range(32):
            products = [
                (scale, weight, up[row], down[col])
                for scale, weight, (up, down) in zip(scales, weights, pairs, strict=True)
            ]
            value = merged_value(before[name][row, col].item(), products)
            assert after[name][row, col].item() == nearest(value, "BF16")
    assert record.adapter_weights == weights
    assert {tensor.name.split(".")[-2] for tensor in record.tensors} == {"q_proj", "o_proj"}


def test_neither_threads_nor_block_sizes_change_a_byte(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = set()
    before = torch.get_num_threads()
    try:
        for number, (threads, block, chunk) in enumerate(
            [(1, 1 << 17, 1 << 24), (2, 100, 1 << 12), (3, 7, 1 << 13)]
        ):
            torch.set_num_threads(threads)
            monkeypatch.setattr(lowrank, "BLOCK_ELEMENTS", block)
            monkeypatch.setattr(disk, "BUFFER_BYTES", chunk)
            monkeypatch.setattr("os.sched_getaffinity", lambda _, count=threads: range(count))
            merge(base, adapter, tmp_path / f"out{number}")
            digests.add(digest_folder(tmp_path / f"out{number}"))
    finally:
        torch.set_num_threads(before)
    assert len(digests) == 1


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
    links = tmp_path / "snapshot"
    links.mkdir()
    for file in base.iterdir():
        (links / file.name).symlink_to(file)
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
    with pytest.raises(UsageError, match="does not hold a model"):
        merge(base, adapter, tmp_path / "out")
    assert (tmp_path / "out" / "thesis.txt").exists()


def test_two_merges_into_one_output_at_once(tmp_path: Path, base: Path, adapter: Path) -> None:
    with only_one(tmp_path / "out", "merge"), pytest.raises(BusyError, match="another merge"):
        merge(base, adapter, tmp_path / "out")
    merge(base, adapter, tmp_path / "out")


def test_a_full_disk_is_found_before_anything_is_written(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr("os.statvfs", lambda _: Full)
    with pytest.raises(DiskError, match="too little disk space"):
        merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_float16_overflow_is_an_error_that_offers_bfloat16(tmp_path: Path) -> None:
    base, adapter = plant(tmp_path, torch.float32, low_bits=False)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.self_attn.q_proj.weight"
    factors = load_file(adapter / "adapter_model.safetensors")
    factors[PREFIX + name.replace(".weight", ".lora_B.weight")][7] = 0
    save_file(factors, adapter / "adapter_model.safetensors")
    for value, fits in ((65519.99, True), (65520.0, False)):
        weights[name][7, 7] = value
        save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
        if fits:
            merge(base, adapter, tmp_path / "out", precision="float16")
            assert tensors_of(tmp_path / "out")[name][7, 7].item() == 65504
        else:
            with pytest.raises(CheckpointError, match=name) as caught:
                merge(base, adapter, tmp_path / "out", precision="float16")
            assert "bfloat16" in str(caught.value)


def test_an_untouched_tensor_that_overflows_float16_is_an_error(tmp_path: Path) -> None:
    base, adapter = plant(tmp_path, torch.bfloat16, low_bits=False)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][3] = 1e5
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        merge(base, adapter, tmp_path / "out", precision="float16")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["lora_A", "lora_B", "base"])
def test_numbers_that_are_not_finite_name_their_tensor(
    tmp_path: Path, base: Path, adapter: Path, value: float, where: str
) -> None:
    own_base = shutil.copytree(base, tmp_path / "base")
    own_adapter = shutil.copytree(adapter, tmp_path / "adapter")
    module = "model.layers.1.self_attn.k_proj"
    if where == "base":
        file = next(file for file in own_base.glob("*.safetensors") if f"{module}.weight" in load_file(file))
        name = f"{module}.weight"
    else:
        file, name = own_adapter / "adapter_model.safetensors", f"{PREFIX}{module}.{where}.weight"
    tensors = load_file(file)
    tensors[name][1, 2] = value
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(LorasmithError, match="NaN or infinite") as caught:
        merge(own_base, own_adapter, tmp_path / "out")
    assert name in caught.value.found
    assert not (tmp_path / "out").exists()


def rewrite(adapter: Path, change: Any) -> None:
    tensors = change(load_file(adapter / "adapter_model.safetensors"))
    save_file(tensors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})


def without(fragment: str) -> Any:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if fragment not in name}


def renamed(old: str, new: str) -> Any:
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


Q = "layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(f"{Q}.lora_A"), "has no use without its partner"),
        (without(f"{Q}.lora_B"), "has no use without its partner"),
        (without(f"{Q}."), "targets model.layers.1.self_attn.q_proj, the adapter has no tensors"),
        (renamed("layers.1.", "layers.7."), "no module 'model.layers.7"),
        (renamed("q_proj", "query"), "no module"),
        (renamed("lora_A.weight", "lora_A.default.weight"), "still carries the adapter's name"),
        (renamed("lora_A.weight", "lora_C.weight"), "is of no known kind"),
        (renamed("base_model.model.", "transformer."), "does not begin with"),
        (renamed("q_proj", "../../q_proj"), "no module"),
        (
            lambda t: {n: v[:, :-1].contiguous() if "q_proj.lora_A" in n else v for n, v in t.items()},
            "has the shape",
        ),
        (
            lambda t: {n: v[:2].contiguous() if "q_proj.lora_A" in n else v for n, v in t.items()},
            "has the shape",
        ),
        (lambda t: {n: v.to(torch.int8) for n, v in t.items()}, "has the type I8"),
        (lambda t: {}, "holds no tensors"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused(
    tmp_path: Path, base: Path, adapter: Path, change: Any, message: str
) -> None:
    own = shutil.copytree(adapter, tmp_path / "adapter")
    config = json.loads((own / "adapter_config.json").read_text())
    config["target_modules"] = sorted({name.split(".")[-1] for name in config["target_modules"]})
    (own / "adapter_config.json").write_text(json.dumps(config))
    rewrite(own, change)
    with pytest.raises(AdapterError, match=message):
        merge(base, own, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "int8"},
        {"rounding": "up"},
        {"weights": [1.0, 2.0]},
        {"weights": [0.0]},
        {"weights": [float("nan")]},
    ],
)
def test_impossible_arguments(tmp_path: Path, base: Path, adapter: Path, arguments: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        merge(base, adapter, tmp_path / "out", **arguments)


def test_the_same_inputs_elsewhere_give_the_same_bytes(tmp_path: Path, base: Path, adapter: Path) -> None:
    shutil.copytree(base, tmp_path / "other" / "b")
    shutil.copytree(adapter, tmp_path / "other" / "a")
    merge(base, adapter, tmp_path / "one")
    merge(tmp_path / "other" / "b", tmp_path / "other" / "a", tmp_path / "two")
    assert digest_folder(tmp_path / "one") == digest_folder(tmp_path / "two")
