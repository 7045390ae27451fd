"""Put an adapter unmerged onto a loaded model: PEFT's own forward, and nothing of the file left unused.

PEFT only warns of adapter tensors that are missing or fit nowhere; both are errors here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorasmith.checkpoint.jsonfile import read_object
from lorasmith.checkpoint.patterns import require_quick
from lorasmith.errors import AdapterError, MemoryLimitError
from lorasmith.models.absent import absent, absent_adapter_file


def require_resident(model: Any, adapter: Path) -> None:
    """PEFT puts an adapter only on weights that lie on a device."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise MemoryLimitError(
            "the GPUs do not hold the whole model, and an adapter needs all of it there",
            where=adapter,
            remedy="use more or larger GPUs, or --device cpu without a device map",
        )


def attach(model: Any, adapter: Path, folder: Path, device: str | None) -> Any:
    """The model in `folder` with the adapter on it, a `PeftModel`; `AdapterError` if it does not fit."""
    from peft import PeftModel

    config = adapter / "adapter_config.json"
    require_quick(read_object(config, AdapterError), [name for name, _ in model.named_modules()], config)
    try:
        _grow_embeddings(model, adapter)
        peft_model = PeftModel.from_pretrained(
            model, str(adapter), autocast_adapter_dtype=False, torch_device=device
        )
        # from_pretrained turns missing keys into a warning and drops the unexpected ones; loading the same
        # adapter again returns both lists.
        report = peft_model.load_adapter(
            str(adapter), "default", autocast_adapter_dtype=False, torch_device=device
        )
    except Exception as error:  # PEFT raises KeyError, RuntimeError, ValueError, … by the kind of damage
        gone = absent_adapter_file(adapter)
        if gone is not None:
            raise absent(AdapterError, "adapter", gone) from error
        raise AdapterError(
            f"the adapter does not load onto this base: {first_line(error)}",
            where=adapter,
            expected=f"an adapter trained on the model in {folder}",
            remedy="give the base model that the adapter was trained on",
        ) from error
    for keys, state in ((report.missing_keys, "missing from"), (report.unexpected_keys, "left over in")):
        if keys:
            raise AdapterError(
                f"{len(keys)} adapter tensors are {state} the file: {some_names(sorted(keys))}",
                where=adapter,
                expected="exactly the tensors that adapter_config.json describes, for this base",
                remedy="give the base model that the adapter was trained on, or save the adapter again",
            )
    return peft_model


def _grow_embeddings(model: Any, adapter: Path) -> None:
    """An adapter trained with added tokens carries its own, longer embeddings: make room for them first."""
    file = adapter / "adapter_model.safetensors"
    if not file.is_file():
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        rows = {
            tensors.get_slice(key).get_shape()[0]
            for key in tensors.keys()  # noqa: SIM118 - safe_open is no mapping
            if key.endswith(("embed_tokens.weight", "lm_head.weight", "wte.weight", "embed_in.weight"))
        }
    if len(rows) == 1 and rows != {model.get_input_embeddings().weight.shape[0]}:
        model.resize_token_embeddings(rows.pop(), mean_resizing=False)


def first_line(error: BaseException) -> str:
    """Type and first line of what a library says; the second where the first only announces it."""
    text = [line.strip() for line in str(error).strip().splitlines()] or [""]
    told = text[1] if text[0].endswith(":") and len(text) > 1 else text[0]
    return f"{type(error).__name__}: {told}"


def some_names(names: list[str]) -> str:
    """The first three of many names."""
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown}, …"
