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

from lorasmith.errors import AdapterError, CheckpointError, MemoryLimitError, UsageError, os_errors
from lorasmith.models.absent import absent, absent_file
from lorasmith.models.attach import attach, first_line, require_resident, some_names
from lorasmith.models.memory import is_out_of_memory
from lorasmith.models.unpack import gguf_file, unpacking

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
    """Of the base model, tied tensors once; the adapter's are not counted."""
    vocabulary: int
    """Rows of the embedding."""
    context: int | None
    """Longest sequence the model was made for, in tokens, where its config says so."""
    device: torch.device
    """Where it takes its tokens; of a spread model, that of its embedding."""


def check_device_map(asked: str | None) -> None:
    """Raises `UsageError` for anything but `auto` or none."""
    if asked not in (None, "auto"):
        raise UsageError(f"there is no device map {asked!r}", expected="auto, or none")


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

    Weights in compressed-tensors or GGUF are unpacked to `dtype`.
    `device_map` spreads the layers over all devices, memory and disk (accelerate; `auto`, or which module
    goes where) instead of putting all of them on `device`. The tokenizer is that of `tokenizer_from`, else
    the adapter's where it has one, else the model's. Raises `CheckpointError` or `AdapterError` for a folder
    that does not load in full, and for a tokenizer of another vocabulary.
    """
    device = device or torch.device("cpu")
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
    """The adapter's tokenizer where its folder has one, else the model's."""
    from transformers import AutoTokenizer

    place = adapter if adapter is not None and has_tokenizer(adapter) else folder
    if not has_tokenizer(place):
        raise CheckpointError(
            "the folder has no tokenizer",
            where=place,
            expected="tokenizer.json beside the model",
            remedy="copy the tokenizer files of the base model into it",
        )
    try:
        return AutoTokenizer.from_pretrained(place, local_files_only=True, trust_remote_code=False)
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
    # The GGUF reader draws a bar of its own.
    quiet: AbstractContextManager[Any] = (
        redirect_stderr(io.StringIO()) if "gguf_file" in how else nullcontext()
    )
    try:
        with quiet:
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
    missing = sorted(report["missing_keys"]) + (sorted(report["unexpected_keys"]) if how else [])
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
