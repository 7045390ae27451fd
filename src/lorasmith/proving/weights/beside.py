"""What lies beside the tensors of a merge: does it load as base and adapter say, whatever its record says?

Every file of `loaders.READS` is held against what base and adapter make of it. What would change the outputs
of a loaded model is an error, what provably does not is a warning, and what no loader reads is a note.
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from lorasmith.errors import InputError
from lorasmith.files import digests
from lorasmith.parsing import parse_json
from lorasmith.proving.weights.loaded import (
    NotLoaded,
    State,
    flatten,
    load_config,
    load_generation,
    load_processor,
    load_tokenizer,
)
from lorasmith.proving.weights.loaders import (
    DERIVED_FIELDS,
    FREE_FIELDS,
    HEAD_IN_TEXT_MODEL,
    TEXT_MODEL_ALONE,
    Part,
    find_read,
)
from lorasmith.proving.weights.model_folder import read_json
from lorasmith.records.base import Finding

_QUIET = frozenset(("lorasmith_merge.json", "README.md"))
"""Files that no loader reads and that every release has."""


@dataclass(frozen=True)
class ModelConfig:
    """A model's config.json: as it is written, and as a loader takes it."""

    body: Mapping[str, Any]
    loaded: State | None
    """None where no class here loads it; then only the written fields can be compared."""
    problem: str = ""
    """Why it does not load."""

    @property
    def ties(self) -> bool | None:
        """Whether a loader is to tie head and embedding; None where neither config nor its class says so."""
        names = ["tie_word_embeddings", "text_config.tie_word_embeddings"]
        if self.body.get("model_type") in HEAD_IN_TEXT_MODEL:
            names.reverse()
        if self.loaded is not None:
            return bool(self.loaded.get(names[0], False))
        written = flatten(self.body)
        return next((written[name] for name in names if isinstance(written.get(name), bool)), None)


@dataclass(frozen=True)
class RightConfig:
    """What base and adapter make of the fields that a merge may have to change."""

    precision: str
    """`base`, or the type that all floating-point weights are stored in."""
    base_dtype: str
    """The type of the base's first floating-point tensor, which a loader takes where its config has none."""
    rows_before: int | None
    """Rows of the base's embedding."""
    rows: int | None
    """Rows of the merged embedding."""
    keeps_format: bool = False
    """Whether the merge is in the quantized format of its base, which its config has to name then."""


def read_config(folder: Path) -> ModelConfig:
    """The config of a model folder; raises `InputError` where there is no JSON object to read."""
    file = folder / "config.json"
    body = read_json(file)
    if file.read_bytes().startswith(codecs.BOM_UTF8):
        return ModelConfig(body, None, "a byte order mark leads it, which transformers refuses")
    try:
        return ModelConfig(body, load_config(body))
    except NotLoaded as error:
        return ModelConfig(body, None, str(error))


@dataclass(frozen=True)
class Folders:
    """The folders of a proof, and the files of each by name."""

    base: Path
    adapters: Sequence[Path]
    merged: Path
    weights: frozenset[Path]
    """The files of the merge whose tensors were checked."""
    files: dict[Path, dict[str, Path]] = field(default_factory=dict)

    def of(self, folder: Path, *parts: Part) -> dict[str, Path]:
        """Name → file, for the files of a folder that are read as one of these parts."""
        return {name: file for name, file in self.all(folder).items() if _part(name) in parts}

    def all(self, folder: Path) -> dict[str, Path]:
        """Name → file, for all files of a folder."""
        if folder not in self.files:
            listed = digests.folder_files(folder)
            self.files[folder] = {file.relative_to(folder).as_posix(): file for file in listed}
        return self.files[folder]

    @property
    def sources(self) -> list[Path]:
        """What a merge is made from: the adapters first, as their tokenizers go before the base's."""
        return [*self.adapters, self.base]


def _part(name: str) -> Part | None:
    read = find_read(name)
    return read.part if read else None


def read_merged_config(folder: Path) -> ModelConfig:
    """The merge's config; one without any field, and with the reason, where there is none to read."""
    try:
        return read_config(folder)
    except InputError as error:
        return ModelConfig({}, None, error.found)


def check_beside(
    folders: Folders, base: ModelConfig, merged: ModelConfig, right: RightConfig
) -> Iterator[Finding]:
    """All findings on what a loader reads beside the tensors; an `error` makes a merge `different`."""
    yield from _check_names(folders)
    if not merged.body:
        missing = "config.json" not in folders.all(folders.merged)
        yield _error("missing-config" if missing else "damaged-config", merged.problem, "config.json")
        return
    yield from _check_config(base, merged, right)
    yield from _check_versions(folders, merged)
    yield from _check_code(folders, base, merged)
    yield from _check_generation(folders)
    yield from _check_tokenizer(folders, base, merged)
    yield from _check_processor(folders)


# Names: what must not lie there, what is read on request only, what nobody reads.


def _check_names(folders: Folders) -> Iterator[Finding]:
    files, unread = folders.all(folders.merged), []
    for name, file in files.items():
        part = _part(name)
        if part == "adapter":
            yield _error("adapter-left", "loaders put this adapter on the model once more", name, "no file")
        elif part == "adapter weights" and "adapter_config.json" not in files:
            yield _warning("adapter-left", "weights of an adapter, read only beside its config", name)
        elif part == "on request" and file not in folders.weights:
            text = f"{name!r} is not part of the checkpoint and was not checked"
            yield _warning("stray-weights", text, name)
        elif part is None and file not in folders.weights and not _is_known(folders, name):
            unread.append(name)
    if unread:
        shown = ", ".join(repr(name) for name in unread[:5])
        shown += f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        yield Finding(
            severity="note", code="unread-file", message=f"no loader reads {shown}", where=unread[0]
        )


def _is_known(folders: Folders, name: str) -> bool:
    file = folders.all(folders.merged)[name]
    return name in _QUIET or any(_same(file, folders.all(source).get(name)) for source in folders.sources)


def _check_code(folders: Folders, base: ModelConfig, merged: ModelConfig) -> Iterator[Finding]:
    """Python beside a model runs under `trust_remote_code`, where a config names it or `generate()` looks."""
    ours, theirs = folders.of(folders.base, "code"), folders.of(folders.merged, "code")
    named = any("auto_map" in body for body in (base.body, merged.body, *_tokenizer_configs(folders)))
    for name in sorted(ours.keys() | theirs.keys()):
        read = named or name.startswith("custom_generate/")
        sources = [folders.all(source).get(name) for source in folders.sources]
        if name not in theirs:
            if read:
                yield _error("code-differs", f"the base's {name!r} is missing", name)
        elif not any(_same(theirs[name], source) for source in sources):
            text = "code that neither base nor adapter has" if name not in ours else "not the base's code"
            yield (_error if read else _warning)("code-differs", text, name)


def _tokenizer_configs(folders: Folders) -> Iterator[Mapping[str, Any]]:
    for name, file in folders.all(folders.merged).items():
        if name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
            try:
                yield read_json(file)
            except InputError:
                continue


# The config: every field, as the loader takes it.


def _check_config(base: ModelConfig, merged: ModelConfig, right: RightConfig) -> Iterator[Finding]:
    if base.loaded is not None and merged.loaded is None:
        yield _error("config-unloadable", merged.problem, "config.json", "the base's, which loads")
        return
    # A model with code of its own is no class of transformers, whatever its model_type.
    written = base.loaded is None or merged.loaded is None or "auto_map" in base.body
    ours = flatten(base.body) if written else base.loaded or {}
    theirs = flatten(merged.body) if written else merged.loaded or {}
    text_alone = merged.body.get("model_type") in TEXT_MODEL_ALONE
    yield from _check_dtype(ours, theirs, right, text_alone)
    yield from _check_vocabulary(ours, theirs, right)
    yield from _check_architectures(ours, theirs)
    if merged.body.get("quantization_config") is not None and not right.keeps_format:
        text = "the config has a quantization_config, and the weights are not quantized"
        yield _error("quantization-left", text, "config.json", "none")
    for path in _differing(ours, theirs):
        text, wanted = f"{path} is {_show(theirs, path)}", f"{_show(ours, path)}, as in the base"
        quantization = path.startswith("quantization_config.")
        derived = (quantization and not right.keeps_format) or _name(path) in FREE_FIELDS | DERIVED_FIELDS
        if not derived:
            yield _error("config-differs", text, "config.json", wanted)
        elif path.endswith(".tie_word_embeddings") and theirs.get(path) != merged.ties:
            yield (_error if text_alone else _warning)("config-differs", text, "config.json", wanted)
    if not written:
        yield from _check_writing(base, merged)


def _name(path: str) -> str:
    return path.rpartition(".")[2]


def _check_versions(folders: Folders, merged: ModelConfig) -> Iterator[Finding]:
    """Configs for some versions of transformers: configuration_files puts them in place of config.json."""
    for name, file in folders.of(folders.merged, "config").items():
        if name != "config.json" and not _same_json(file, folders.all(folders.base).get(name)):
            tell = _error if "configuration_files" in merged.body else _warning
            yield tell("config-differs", f"{name!r} is not the base's", name)


def _show(state: State, path: str) -> str:
    return f"{state[path]!r}"[:200] if path in state else "absent"


def _check_writing(base: ModelConfig, merged: ModelConfig) -> Iterator[Finding]:
    """Fields that are written otherwise than in the base and load alike, or that the loader sets aside."""
    ours, theirs = flatten(base.body), flatten(merged.body)
    apart = [path for path in _differing(ours, theirs) if _name(path) not in FREE_FIELDS]
    loaded = merged.loaded or {}
    for path in apart:
        if path in theirs and not _is_heard(path, theirs[path], loaded):
            text = f"{path} is {theirs[path]!r}, which transformers sets aside"
            yield _warning("field-not-read", text, "config.json")
    apart = [path for path in apart if _name(path) not in DERIVED_FIELDS]
    absent = [path for path in apart if path in loaded and path not in theirs]
    if absent:
        # Another version, or another program, may have another default.
        text = f"{', '.join(absent)}: absent, and the default of transformers is the base's value"
        yield _warning("field-missing", text, "config.json")
    if apart:
        shown = ", ".join(apart[:5]) + (f" and {len(apart) - 5} more" if len(apart) > 5 else "")
        text = f"written otherwise than in the base: {shown}"
        yield Finding(severity="note", code="config-rewritten", message=text, where="config.json")


def _is_heard(path: str, written: Any, loaded: State) -> bool:
    """Whether a loaded config holds what a field says; what must be derived has been checked by itself."""
    parent, _, name = path.rpartition(".")
    if name == "torch_dtype":
        return _dtype(loaded, f"{parent}." if parent else "") == written
    return name in DERIVED_FIELDS or (path in loaded and loaded[path] == written)


def _check_dtype(ours: State, theirs: State, right: RightConfig, text_alone: bool) -> Iterator[Finding]:
    """The type that a model is loaded in: the base's own, or the one that its precision was changed to."""
    kept = right.precision == "base"
    wanted = (_dtype(ours, "") or right.base_dtype) if kept else right.precision
    loads_as = _dtype(theirs, "") or (right.base_dtype if kept else right.precision)
    if loads_as != wanted:
        yield _error("wrong-dtype", f"the config loads the model as {loads_as}", "config.json", wanted)
    parts = {path.rpartition(".")[0] for path in theirs if _name(path) in ("dtype", "torch_dtype")} - {""}
    for part in sorted(parts):
        inner, own = _dtype(theirs, f"{part}."), _dtype(ours, f"{part}.")
        if inner not in (None, wanted) and (inner != own or not kept):
            # The model's type goes for its parts too, unless a part is loaded without the rest.
            tell = _error if text_alone and part == "text_config" else _warning
            yield tell("wrong-dtype", f"the dtype of its {part} is {inner}", "config.json", wanted)


def _dtype(state: State, prefix: str) -> str | None:
    value = state.get(f"{prefix}dtype") or state.get(f"{prefix}torch_dtype")
    return str(value).removeprefix("torch.") if value else None


def _check_vocabulary(ours: State, theirs: State, right: RightConfig) -> Iterator[Finding]:
    grown = right.rows is not None and right.rows != right.rows_before
    main = "text_config.vocab_size" if "text_config.vocab_size" in ours else "vocab_size"
    for path in sorted(path for path in ours.keys() | theirs.keys() if _name(path) == "vocab_size"):
        wanted = right.rows if grown and path == main else ours.get(path)
        if theirs.get(path) != wanted and not (grown and path != main and theirs.get(path) == right.rows):
            yield _error("wrong-vocabulary", f"{path} is {_show(theirs, path)}", "config.json", str(wanted))


def _check_architectures(ours: State, theirs: State) -> Iterator[Finding]:
    """AutoModel goes by model_type; pipelines and serving engines go by this list."""
    listed = [state.get("architectures") or [] for state in (ours, theirs)]
    before, after = (sorted(map(str, one)) if isinstance(one, list) else [str(one)] for one in listed)
    wanted = f"{before}, as in the base"
    if before and after and before != after:
        yield _error("config-differs", f"architectures is {after}", "config.json", wanted)
    elif before and not after:
        yield _warning("config-differs", "architectures is missing", "config.json", wanted)


# What `generate()` does unless told otherwise.


def _check_generation(folders: Folders) -> Iterator[Finding]:
    name = "generation_config.json"
    ours, theirs = (folders.all(folder).get(name) for folder in (folders.base, folders.merged))
    try:
        states = [load_generation(folder) for folder in (folders.base, folders.merged)]
    except NotLoaded as error:
        if not _same_json(ours, theirs):
            yield _error("generation-config-differs", f"{error}, and is not as the base's", name)
        return
    apart = _differing(
        states[0], states[1], ("transformers_version", "_commit_hash", "_original_object_hash")
    )
    if apart:
        code = "missing-generation-config" if ours and not theirs else "generation-config-differs"
        yield _error(code, f"generate() takes {_listed(states[1], apart)}", name, _listed(states[0], apart))
    elif ours and not theirs:
        text = "it is missing, and the defaults are the base's all the same"
        yield _warning("missing-generation-config", text, name)


def _differing(ours: State, theirs: State, free: Sequence[str] = ()) -> list[str]:
    return [
        path
        for path in sorted(ours.keys() | theirs.keys())
        if (ours.get(path) != theirs.get(path) or (path in ours) != (path in theirs)) and path not in free
    ]


def _listed(state: State, paths: Sequence[str]) -> str:
    return ", ".join(f"{path} {_show(state, path)}" for path in paths[:5])


# The tokenizer with its templates, and the processor: those of the adapter or of the base.


def _check_tokenizer(folders: Folders, base: ModelConfig, merged: ModelConfig) -> Iterator[Finding]:
    mine = folders.of(folders.merged, "tokenizer", "template")
    rights = _right_tokenizers(folders)
    if not mine:
        if rights:
            yield _warning(
                "missing-tokenizer",
                "the folder holds a model alone, without a tokenizer",
                sorted(rights[0])[0],
            )
        return
    config = {"config.json": folders.merged / "config.json"}
    same = next((right for right in rights if _same_files(mine, right)), None)
    # AutoTokenizer goes by the model's config too: its type, its origin, the version that wrote it.
    if same is not None and _outer(base.body) == _outer(merged.body):
        return
    states, problems = [], []
    for right in [same] if same is not None else rights:
        try:
            states.append(load_tokenizer({**right, "config.json": folders.base / "config.json"}))
        except NotLoaded as error:
            problems.append(str(error))
    if same is not None and not states:
        return
    try:
        state = load_tokenizer({**mine, **config})
    except NotLoaded as error:
        code = "tokenizer-unloadable" if states else "tokenizer-differs"
        yield _error(code, f"{error}; {_odd_files(mine, rights)}", _where(mine, rights))
        return
    apart = [_differing(one, state) for one in states]
    if not apart:
        yield _error("tokenizer-differs", _odd_files(mine, rights), _where(mine, rights))
    elif min(map(len, apart)) > 0:
        nearest = min(range(len(apart)), key=lambda k: len(apart[k]))
        text = f"{_odd_files(mine, rights)}: {_listed(state, apart[nearest])}"
        yield _error(
            "tokenizer-differs", text, _where(mine, rights), _listed(states[nearest], apart[nearest])
        )
    elif same is None:
        text = f"{_odd_files(mine, rights)}; it loads as the same tokenizer"
        yield _warning("tokenizer-rewritten", text, _where(mine, rights))


def _outer(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """The fields of a config that say no number of the model: what AutoTokenizer can go by."""
    return {name: value for name, value in body.items() if name not in ("dtype", "torch_dtype", "vocab_size")}


def _right_tokenizers(folders: Folders) -> list[dict[str, Path]]:
    """Name → file of each tokenizer that a merge may have: one source's, with its or another's templates."""
    rights: list[dict[str, Path]] = []
    for owner, writer in product(folders.sources, folders.sources):
        tokenizer = folders.of(owner, "tokenizer")
        templates = folders.of(writer, "template")
        if tokenizer and (templates or owner == writer):
            right = {**tokenizer, **templates}
            if right not in rights:
                rights.append(right)
    return rights


def _same_files(mine: Mapping[str, Path], right: Mapping[str, Path]) -> bool:
    return mine.keys() == right.keys() and all(_same_json(mine[name], right[name]) for name in mine)


def _odd_files(mine: Mapping[str, Path], rights: Sequence[Mapping[str, Path]]) -> str:
    missing, odd = _apart(mine, rights)
    parts = [f"missing: {', '.join(missing)}"] if missing else []
    parts += [f"neither the base's nor the adapter's: {', '.join(odd)}"] if odd else []
    return "; ".join(parts) or "files of several tokenizers"


def _where(mine: Mapping[str, Path], rights: Sequence[Mapping[str, Path]]) -> str:
    missing, odd = _apart(mine, rights)
    return next(iter([*odd, *missing, *mine]))


def _apart(mine: Mapping[str, Path], rights: Sequence[Mapping[str, Path]]) -> tuple[list[str], list[str]]:
    """Names that the nearest right tokenizer has besides, and those that none has with this content."""
    odd = [
        name for name, file in mine.items() if not any(_same_json(file, right.get(name)) for right in rights)
    ]
    missing = min((sorted(right.keys() - mine.keys()) for right in rights), key=len, default=[])
    return missing, odd


def _check_processor(folders: Folders) -> Iterator[Finding]:
    mine = folders.of(folders.merged, "processor")
    known = [folders.of(source, "processor") for source in folders.sources]
    odd = [
        name for name, file in mine.items() if not any(_same_json(file, files.get(name)) for files in known)
    ]
    missing = sorted(known[-1].keys() - mine.keys())
    if not odd and not missing:
        return
    if not mine:
        yield _warning(
            "missing-processor", f"the folder holds none of the base's {', '.join(missing)}", missing[0]
        )
        return
    where, text = (odd or missing)[0], ""
    parts: tuple[Part, ...] = ("tokenizer", "template", "processor", "config")
    try:
        ours, theirs = (
            load_processor(folders.of(folder, *parts)) for folder in (folders.base, folders.merged)
        )
        apart = _differing(ours, theirs)
        text = _listed(theirs, apart)
    except NotLoaded as error:
        apart, text = ["?"], str(error)
    if apart:
        yield _error("processor-differs", f"{', '.join(odd + missing)}: {text}", where, "as in the base")
    else:
        yield _warning("processor-rewritten", f"{', '.join(odd + missing)}: it loads as the base's", where)


def _same(one: Path, other: Path | None) -> bool:
    return (
        other is not None
        and one.stat().st_size == other.stat().st_size
        and one.read_bytes() == other.read_bytes()
    )


def _same_json(one: Path | None, other: Path | None) -> bool:
    """The same bytes, or the same JSON; two absent files are the same too."""
    if one is None or other is None:
        return one is other
    if _same(one, other):
        return True
    if one.suffix != ".json" or other.suffix != ".json":
        return False
    try:
        return bool(parse_json(one.read_text("utf-8")) == parse_json(other.read_text("utf-8")))
    except ValueError:
        return False


def _error(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="error", code=code, message=message, where=where, expected=expected)


def _warning(code: str, message: str, where: str, expected: str | None = None) -> Finding:
    return Finding(severity="warning", code=code, message=message, where=where, expected=expected)
