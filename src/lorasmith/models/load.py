"""Load a model folder, with an adapter or without, such that nothing can go wrong unseen.

transformers initialises tensors that a checkpoint lacks at random and PEFT only warns of adapter tensors that
are missing or fit nowhere; both are errors here. Code from a folder is never run and nothing is downloaded.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorasmith.checkpoint.header import read_object
from lorasmith.checkpoint.patterns import require_quick
from lorasmith.errors import (
    AdapterError,
    CheckpointError,
    InputError,
    MemoryLimitError,
    os_errors,
)
from lorasmith.files.inputs import read_input, require_own_links
from lorasmith.models.chat_template import use_template
from lorasmith.models.decoded import load_decoded, quantized_base
from lorasmith.models.device import is_out_of_memory
from lorasmith.parsing import parse_json

# Which file of a model or adapter folder is not there: the libraries that load it say so in their words.


_WEIGHTS = ("model.safetensors", "pytorch_model.bin")
_ADAPTER_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")


def absent_file(folder: Path) -> Path | None:
    """The first file that a model folder lacks: the folder itself, its config, its weights or one shard."""
    if not (folder / "config.json").is_file():
        return folder / "config.json" if folder.is_dir() else folder
    for name in _WEIGHTS:
        index = folder / f"{name}.index.json"
        if index.is_file():
            return next((shard for shard in _shards(index) if not shard.is_file()), None)
    if any((folder / name).is_file() for name in _WEIGHTS):
        return None
    return folder / _WEIGHTS[0]


def absent_adapter_file(folder: Path) -> Path | None:
    """The same for an adapter."""
    if not (folder / "adapter_config.json").is_file():
        return folder / "adapter_config.json" if folder.is_dir() else folder
    if any((folder / name).is_file() for name in _ADAPTER_WEIGHTS):
        return None
    return folder / _ADAPTER_WEIGHTS[0]


def absent(kind: type[InputError], what: str, file: Path) -> InputError:
    """The error for such a file of a `model` or an `adapter`, to be raised from what the library said."""
    return kind(
        f"a file of the {what} is not there",
        where=file,
        expected=f"a whole {what} folder that stays as it is while it is read",
        remedy="copy the file again, then give the same command",
    )


def _shards(index: Path) -> list[Path]:
    try:
        named = parse_json(read_input(index))["weight_map"].values()
    except (
        OSError,
        InputError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
    ):  # a damaged index is told by who loads it
        return []
    return [index.with_name(str(name)) for name in sorted(set(named))]


# Put an adapter unmerged onto a loaded model: PEFT's own forward, and nothing of the file left unused.
#
# PEFT only warns of adapter tensors that are missing or fit nowhere; both are errors here.


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

    require_own_links(adapter)
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


# Folders in GGUF or compressed-tensors: what tells transformers to multiply their integers out while it loads
# them. Other quantized formats are decoded by `decoded.py`.


_PACKED = "compressed-tensors"


def gguf_file(folder: Path) -> Path | None:
    """The GGUF file of a folder that has no other weights; its metadata stand for config.json."""
    files = sorted(folder.glob("*.gguf"))
    return files[0] if files and not (folder / "config.json").is_file() else None


def unpacking(folder: Path) -> dict[str, Any]:
    """Arguments of `from_pretrained` for a folder in GGUF or compressed-tensors; none for any other.

    The stored integers are multiplied out once. So the model computes with the weights that are stored, and
    what is measured on it is not the error of a kernel.
    """
    file = gguf_file(folder)
    if file is not None:
        from transformers import GgufConfig

        return {"gguf_file": file.name, "quantization_config": GgufConfig(dequantize=True)}
    config = read_object(folder / "config.json", CheckpointError)
    quantized = config.get("quantization_config")
    if isinstance(quantized, dict) and quantized.get("quant_method") == _PACKED:
        from transformers import CompressedTensorsConfig

        return {"quantization_config": CompressedTensorsConfig(dequantize=True)}
    return {}


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model", "tekken.json")

DeviceMap = str | dict[str, str | int] | None


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to compute, with the tokenizer that goes with it."""

    model: Any
    """A causal language model in evaluation mode; a `PeftModel` when an adapter was given."""
    tokenizer: Any
    architecture: str
    parameters: int
    """Parameters of the base model, tied tensors counted once and the adapter's not at all."""
    vocabulary: int
    """Rows of the embedding."""
    context: int | None
    """Longest sequence the model was made for, in tokens, where its config says so."""
    device: torch.device
    """Where it takes its tokens; of a spread model, that of its embedding."""


def load_model(
    folder: Path,
    *,
    adapter: Path | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    tokenizer_from: Path | None = None,
    device_map: DeviceMap = None,
) -> LoadedModel:
    """Load the model in `folder`, and `adapter` unmerged on top of it: PEFT's own forward.

    Weights in a quantized format are decoded to `dtype`.
    `device_map` spreads the layers over all devices, memory and disk (accelerate; `auto`, or which module
    goes where) instead of putting all of them on `device`. The tokenizer is that of `tokenizer_from`, else
    the adapter's where it has one, else the model's. Raises `CheckpointError` or `AdapterError` for a folder
    that does not load in full, and for a tokenizer of another vocabulary.
    """
    device = device or torch.device("cpu")
    # Before a library opens anything: they follow every link, and wait at a pipe.
    require_own_links(folder)
    if gguf_file(folder) is None:
        require_file(folder, "config.json", CheckpointError)
    if adapter is not None:
        require_file(adapter, "adapter_config.json", AdapterError)
    with quiet_libraries():
        tokenizer = load_tokenizer(tokenizer_from or folder, adapter=adapter)
        model = _load_base(folder, device, dtype, device_map)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        architecture = type(model).__name__
        if adapter is not None:
            require_resident(model, adapter)
            model = attach(model, adapter, folder, None if device_map else str(device))
    model.eval()
    if device_map:
        device = _entrance(model)
    rows = model.get_input_embeddings().weight.shape[0]
    _check_vocabulary(tokenizer, rows, adapter or folder)
    context = context_of(model.config)
    return LoadedModel(model, tokenizer, architecture, parameters, rows, context, device)


def context_of(config: Any) -> int | None:
    """Longest sequence in tokens, where a transformers config names one."""
    text = config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None)


def has_tokenizer(folder: Path) -> bool:
    """Whether the folder holds the files of a tokenizer."""
    return any((folder / name).is_file() for name in _TOKENIZER_FILES)


def load_tokenizer(folder: Path, *, adapter: Path | None = None) -> Any:
    """The adapter's tokenizer where its folder has one, else the model's with the adapter's chat template."""
    from transformers import AutoTokenizer

    place = adapter if adapter is not None and has_tokenizer(adapter) else folder
    require_own_links(place)
    if not has_tokenizer(place):
        raise CheckpointError(
            "the folder has no tokenizer",
            where=place,
            expected="tokenizer.json beside the model",
            remedy="copy the tokenizer files of the base model into it",
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        if not has_tokenizer(place):
            raise CheckpointError(
                "the tokenizer is gone",
                where=place,
                expected="a whole model folder that stays as it is while it is read",
                remedy="copy the files again, then give the same command",
            ) from error
        raise CheckpointError(
            f"the tokenizer does not load: {first_line(error)}",
            where=place,
            remedy="copy the tokenizer files again",
        ) from error
    legacy = place / "chat_template.json"
    if not getattr(tokenizer, "chat_template", None) and legacy.is_file():
        # Processors of some years ago kept it there, where a tokenizer by itself does not look.
        use_template(tokenizer, legacy)
    if adapter is not None and place != adapter:
        # A merge takes it over, so that the adapter is asked in it as well.
        own = (adapter / name for name in ("chat_template.jinja", "chat_template.json"))
        use_template(tokenizer, next((file for file in own if file.is_file()), None))
    return tokenizer


def tokenizer_for_both(base: Path, adapter: Path) -> Path | None:
    """The folder by whose tokenizer base and adapter can be asked the same; None where the base's own does.

    Adapters are saved with the tokenizer and the chat template of their training, and a base often has no
    template or another. Where the adapter has tokens that the base's embedding has no row for, the base
    keeps its own.
    """
    if not has_tokenizer(adapter):
        return None
    with quiet_libraries():
        own, theirs = load_tokenizer(base), load_tokenizer(adapter)
    ours, others = own.get_vocab(), theirs.get_vocab()
    if ours == others and own.chat_template == theirs.chat_template:
        return None
    return adapter if max(others.values(), default=0) <= max(ours.values(), default=0) else None


def require_file(folder: Path, name: str, kind: type[CheckpointError] | type[AdapterError]) -> None:
    """Raise `kind` unless `folder` is a folder that holds `name`."""
    with os_errors(folder, "read"):
        if not folder.exists():
            raise kind("there is no such folder", where=folder, remedy="check the path")
        if not (folder / name).is_file():
            raise kind(f"the folder has no {name}", where=folder, expected=f"a folder with {name}")


def _load_base(folder: Path, device: torch.device, dtype: torch.dtype, device_map: DeviceMap) -> Any:
    from transformers import AutoModelForCausalLM

    how = unpacking(folder)
    quantized = None if how else quantized_base(folder)
    # The GGUF reader draws a bar of its own.
    quiet: AbstractContextManager[Any] = (
        redirect_stderr(io.StringIO()) if "gguf_file" in how else nullcontext()
    )
    try:
        with quiet:
            if quantized is not None:
                model, report = load_decoded(quantized, dtype, device_map)
            else:
                model, report = AutoModelForCausalLM.from_pretrained(
                    folder,
                    dtype=dtype,
                    attn_implementation="sdpa",
                    local_files_only=True,
                    trust_remote_code=False,
                    output_loading_info=True,
                    device_map=device_map,
                    **how,
                )
        if device_map is None:
            model = model.to(device)
    except Exception as error:  # transformers lets errors of many libraries through
        if is_out_of_memory(error):
            raise MemoryLimitError(
                f"too little memory to load the model in {str(dtype).removeprefix('torch.')}",
                where=folder,
                remedy="use a machine with more memory, or another device",
            ) from error
        gone = None if "gguf_file" in how else absent_file(folder)
        if gone is not None:
            raise absent(CheckpointError, "model", gone) from error
        raise CheckpointError(f"the model does not load: {first_line(error)}", where=folder) from error
    # A packed format names its tensors otherwise: one that is left over is one that was not unpacked.
    unpacked = bool(how) or quantized is not None
    missing = sorted(report["missing_keys"]) + (sorted(report["unexpected_keys"]) if unpacked else [])
    if missing:
        raise CheckpointError(
            f"{len(missing)} tensors of the model are not in the folder: {some_names(missing)}",
            where=folder,
            expected="every tensor of the architecture",
            remedy="copy the missing shards, or check that config.json belongs to these weights",
        )
    return model


def _entrance(model: Any) -> torch.device:
    """Where a spread model takes its tokens: an offloaded embedding itself lies on no device."""
    embedding = model.get_input_embeddings()
    place = getattr(getattr(embedding, "_hf_hook", None), "execution_device", None)
    return torch.device(embedding.weight.device if place is None else place)


def _check_vocabulary(tokenizer: Any, rows: int, place: Path) -> None:
    # Tokens added by hand may lie beyond the embedding in a sound model (placeholders that text never holds);
    # an id that is really used is checked row by row before scoring.
    if tokenizer.vocab_size > rows:
        raise CheckpointError(
            f"the tokenizer has {tokenizer.vocab_size:,} tokens, the model's embedding {rows:,} rows",
            where=place,
            expected="the tokenizer that the model was trained with",
            remedy="copy the tokenizer files of the base model into the folder",
        )


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """What the libraries warn about while loading is either an error above or of no use to the reader."""
    loggers = [logging.getLogger(name) for name in ("transformers", "peft")]
    levels = [logger.level for logger in loggers]
    from transformers.utils import logging as hub_logging

    bars = hub_logging.is_progress_bar_enabled()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        hub_logging.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            hub_logging.enable_progress_bar()
