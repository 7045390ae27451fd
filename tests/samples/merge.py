"""A merged folder with the record of its merge; its weights are any bytes."""

from __future__ import annotations

import random
from pathlib import Path

from tokenizers import Tokenizer, decoders, models

from lorasmith.files.atomic import write_record
from lorasmith.files.digests import hash_file
from lorasmith.records.base import FileDigest
from lorasmith.records.merging import MergedTensor, MergeRecord
from tests.samples.rows import VOCABULARY, sha


def digest(path: Path, root: Path) -> FileDigest:
    """Of a file that was just written."""
    return FileDigest(
        path=path.relative_to(root).as_posix(), bytes=path.stat().st_size, sha256=hash_file(path)
    )


def write_merged(run: Path, *, layers: int = 6, weights: bytes = b"\x3f\x80" * 40_000) -> MergeRecord:
    """A `merged/` folder whose weights are any bytes, with the record of its merge."""
    folder = run / "merged"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text('{"model_type": "llama"}\n')
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, "<unk>"))
    core.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="never")
    core.add_special_tokens(["<end>"])
    core.save(str(folder / "tokenizer.json"))
    modules = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    modules += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    chance = random.Random(0)
    tensors = []
    for layer in range(layers):
        for module in modules:
            elements = 576 * 576
            swallowed = int(elements * chance.uniform(0.35, 0.8))
            name = f"model.layers.{layer}.{module}"
            tensors.append(
                MergedTensor(
                    name=f"{name}.weight",
                    formula="W + s·B·A",
                    adapter_tensors=[f"{name}.lora_A.weight", f"{name}.lora_B.weight"],
                    scale=2.0,
                    shape=[576, 576],
                    dtype_base="BF16",
                    dtype_merged="BF16",
                    elements=elements,
                    changed=elements - swallowed,
                    swallowed=swallowed,
                    relative_update=chance.uniform(1e-3, 9e-3),
                )
            )
    updated, swallowed = sum(t.elements for t in tensors), sum(t.swallowed for t in tensors)
    record = MergeRecord(
        lorasmith_version="0.1.0",
        base_sha256=sha("base"),
        adapter_sha256=[sha("adapter")],
        adapter_weights=[1.0],
        precision="base",
        rounding="nearest",
        tensors=tensors,
        copied=62,
        cast=0,
        elements_updated=updated,
        elements_swallowed=swallowed,
        swallowed_fraction=swallowed / updated,
        files=[
            digest(file, folder)
            for file in sorted(folder.rglob("*"))
            if file.is_file() and file.name != "lorasmith_merge.json"
        ],
    )
    write_record(folder / "lorasmith_merge.json", record)
    return record
