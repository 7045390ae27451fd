"""Configs, tokenizers and processors as a standard loader makes them: what is equal then behaves the same.

Files can say one thing in many ways: older names of a field, defaults written out or left out, tokens in one
file or another. So where files differ, transformers reads both, and the objects are compared in all that they
hold. Code that comes with a model is never run.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

State = Mapping[str, Any]
"""Path of a field, with dots, and its value."""


class NotLoaded(Exception):
    """A loader refuses what a folder holds; says why."""


def load_config(body: Mapping[str, Any]) -> State:
    """The fields of a model's config; raises `NotLoaded` where no class here knows it."""
    model_type = body.get("model_type")
    if not isinstance(model_type, str):
        raise NotLoaded("it has no model_type")
    if model_type == "mistral" and "layer_types" in body:
        model_type = "ministral"  # as AutoConfig takes it
    with _quiet("its config"):
        from transformers import CONFIG_MAPPING

        if model_type not in CONFIG_MAPPING:
            raise NotLoaded(f"transformers has no model_type {model_type!r}")
        config = CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(dict(body)))
        return dict(_fields(vars(config)))


def _fields(values: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """All fields at any depth; an object within a config counts by its own."""
    # Without recursion: a file may nest as deep as its parser allows.
    waiting = [("", values)]
    while waiting:
        prefix, values = waiting.pop()
        for key, value in values.items():
            inner = vars(value) if hasattr(value, "to_dict") else value
            if isinstance(inner, Mapping) and inner:
                waiting.append((f"{prefix}{key}.", inner))
            else:
                yield f"{prefix}{key}", str(value) if type(value).__module__ == "torch" else value


def flatten(body: Mapping[str, Any]) -> State:
    """The fields of a JSON object as they are written."""
    return dict(_fields(body))


def load_generation(folder: Path) -> State:
    """The defaults of `generate()`: from their own file, or what the model's config gives without one."""
    with _quiet("its generation config"):
        from transformers import GenerationConfig

        if (folder / "generation_config.json").is_file():
            config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        else:
            config = GenerationConfig.from_pretrained(
                folder, config_file_name="config.json", _from_model_config=True, local_files_only=True
            )
        return dict(_fields(config.to_dict()))


def load_tokenizer(files: Mapping[str, Path]) -> State:
    """All that AutoTokenizer makes of these files, which are laid in an empty folder under their names."""
    with _laid(files) as folder, _quiet("its tokenizer"):
        from transformers import AutoTokenizer

        loaded = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return dict(_fields(_tokenizer_state(loaded, folder)))


def load_processor(files: Mapping[str, Path]) -> State:
    """All that AutoProcessor makes of these files: a processor's own settings, and its tokenizer."""
    with _laid(files) as folder, _quiet("its processor"):
        from transformers import AutoProcessor

        loaded = AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        tokenizer = loaded if hasattr(loaded, "encode") else getattr(loaded, "tokenizer", None)
        state = {} if tokenizer is None else _tokenizer_state(tokenizer, folder)
        if tokenizer is not loaded:
            state |= {"processor": type(loaded).__name__, "settings": _plain(loaded.to_dict(), folder)}
            state["processor's template"] = getattr(loaded, "chat_template", None)
        return dict(_fields(state))


@contextmanager
def _laid(files: Mapping[str, Path]) -> Iterator[Path]:
    """A folder of links to these files: nothing else is read, and no path tells one folder from another."""
    with TemporaryDirectory(prefix="lorasmith-proof-") as place:
        for name, file in files.items():
            link = Path(place, name)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.resolve())
        yield Path(place)


_UNSAID = frozenset(("init_kwargs", "files_loaded", "deprecation_warnings", "verbose", "_tokenizer"))
"""Attributes of a tokenizer that tell how it was made, not what it does."""


def _tokenizer_state(tokenizer: Any, folder: Path) -> dict[str, Any]:
    held = {name: value for name, value in vars(tokenizer).items() if name not in _UNSAID}
    # Paths such as vocab_file, which saving copies; what was read from there is held beside them.
    state = {name: _plain(value, folder) for name, value in held.items() if not name.endswith("_file")}
    state["class"] = type(tokenizer).__name__
    backend = getattr(tokenizer, "_tokenizer", None)
    if backend is not None:
        # The whole pipeline, from normaliser to decoder, as the library that runs it writes it down.
        state["tokenizer.json"] = json.loads(backend.to_str())
    else:
        state["added tokens"] = {str(key): repr(one) for key, one in tokenizer.added_tokens_decoder.items()}
    return state


def _plain(value: Any, folder: Path) -> Any:
    if isinstance(value, str):
        return value.replace(str(folder), "")
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, folder) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner, folder) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted(repr(inner) for inner in value)
    if type(value).__name__ == "AddedToken":
        return str(value)  # how it is matched stands with the pipeline
    raise NotLoaded(f"its tokenizer holds a {type(value).__name__}, which cannot be compared")


@contextmanager
def _quiet(what: str) -> Iterator[None]:
    """Turn all that a loader raises on foreign files into `NotLoaded`; its warnings are not for our user."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    except NotLoaded:
        raise
    except Exception as error:
        words = " ".join(str(error).split())
        raise NotLoaded(f"{what} does not load: {type(error).__name__}: {words[:200]}") from error
    finally:
        logging.disable(before)
