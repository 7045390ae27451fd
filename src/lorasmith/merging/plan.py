"""Which tensor of the base gets what from which adapter tensor: decided before a number is read."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from lorasmith.adapters.base import BaseView, Change, Copy, RowUpdate, Site, SiteChanges, SiteError, Term
from lorasmith.adapters.bias import TRAINED
from lorasmith.adapters.registry import VARIANTS, split_name
from lorasmith.checkpoint.adapter import PREFIX, Adapter
from lorasmith.checkpoint.base_match import compare_base, given_base
from lorasmith.checkpoint.header import FLOATS, TensorInfo, nbytes_of
from lorasmith.checkpoint.model import SINGLE, Checkpoint, Decoded
from lorasmith.checkpoint.names import resolve
from lorasmith.errors import AdapterError, CheckpointError
from lorasmith.records.base import Finding

PRECISIONS: dict[str, str | None] = {"base": None, "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""The `precision` argument → the type on disk; None keeps each tensor's own."""


@dataclass(frozen=True)
class Output:
    """One tensor of the merged folder."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: TensorInfo
    """The tensor that W is read from."""
    adapter: int | None = None
    """The adapter whose file holds `source`; None: the base."""
    change: Change | None = None
    """None: copied, or cast where `dtype` is not the source's."""
    decoded: Decoded | None = None
    """What W is decoded from where the base stores it quantized; `source` is then its float64 entry."""

    @property
    def base_type(self) -> str:
        """The type or the quantized format of what W is read from."""
        return self.decoded.format if self.decoded else self.source.dtype

    @property
    def elements(self) -> int:
        """The number of its elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes in the merged folder."""
        return nbytes_of(self.dtype, self.shape)


@dataclass(frozen=True)
class Plan:
    """The whole merge."""

    shards: dict[str, tuple[Output, ...]]
    """Per file: an output for every tensor of the base's file, in its order, then separated heads."""
    untied: bool
    """True where a head that shared the embedding's tensor gets one of its own."""
    vocabulary: int | None
    """The number of tokens where the adapter changed it."""
    copies: tuple[Copy, ...]
    """What must be equal for the base to be the right one."""
    findings: tuple[Finding, ...]
    keeps_format: bool = False
    """Whether the files are the base's own but for values: headers, configs and quantized format."""

    def file_of(self, shard: str) -> str:
        """The file of the merged folder that a file of the base becomes."""
        return shard if self.keeps_format or not shard.endswith(".gguf") else SINGLE

    @property
    def outputs(self) -> list[Output]:
        """All tensors of the merged folder."""
        return [output for outputs in self.shards.values() for output in outputs]


def plan_merge(
    base: Checkpoint, adapters: Sequence[Adapter], weights: Sequence[float], precision: str
) -> Plan:
    """Plan a merge.

    Raises `AdapterError` where an adapter tensor has no place in the base, has a wrong shape, or lacks its
    partner, so that every adapter tensor is used exactly once; `CheckpointError` for a target that this
    merge cannot write (integers, float64 kept as float64).
    """
    view = BaseView(base)
    findings: list[Finding] = []
    copies: list[Copy] = []
    collected: dict[str, list[Change]] = defaultdict(list)
    for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
        sites = find_sites(adapter, number, weight)
        for at_site in changes_at(sites, view, adapter):
            copies += at_site.copies
            for change in at_site.changes:
                collected[change.target].append(change)
        findings += left_out(sites, view, adapter)
        findings += biases_left_out(sites, view, adapter)
        known = given_base(base.folder, base.config.get("_name_or_path"))
        findings += compare_base(adapter.config.base_model, adapter.config.revision, known)
    changes = {target: combine(parts, adapters) for target, parts in collected.items()}
    untied = separate_head(changes, view)
    shards = _lay_out(base, adapters, changes, PRECISIONS[precision])
    vocabulary = _vocabulary(changes, view)
    return Plan(shards, untied, vocabulary, tuple(copies), tuple(findings))


# Where an adapter's tensors belong: its modules, found in the base, and what does not fit together there.


def find_sites(adapter: Adapter, number: int, weight: float) -> list[Site]:
    """Group an adapter's tensors by the module that they belong to."""
    grouped: dict[str, dict[str, TensorInfo]] = defaultdict(dict)
    for name, info in adapter.tensors.items():
        parts = split_name(name.removeprefix(PREFIX))
        if parts is None:
            raise AdapterError(
                f"the adapter tensor {name!r} is of no known kind",
                where=adapter.file.path,
                expected="…lora_A.weight, …lora_B.weight and the other names that PEFT writes for LoRA",
                remedy="nothing of an adapter is left out silently: use a newer lorasmith, or PEFT itself",
            )
        grouped[parts[0]][parts[1]] = info
    return [Site(number, path, tensors, adapter.config, weight) for path, tensors in sorted(grouped.items())]


def changes_at(sites: Sequence[Site], base: BaseView, adapter: Adapter) -> list[SiteChanges]:
    """What every site changes; `AdapterError` naming the site that does not fit the base."""
    changes = []
    for site in sites:
        try:
            changes += _changes_at(site, base)
        except SiteError as error:
            raise AdapterError(
                f"{site.path}: {error.found}",
                where=adapter.file.path,
                expected=error.expected,
                remedy=error.remedy or "check that the adapter was trained on this base",
            ) from error
    return changes


def _changes_at(site: Site, base: BaseView) -> list[SiteChanges]:
    _promises(site)
    module = _module_in_base(site, base)
    used: list[str] = []
    changes = []
    for variant in VARIANTS:
        taken = variant.takes(site)
        if taken:
            used += sorted(taken)
            changes.append(variant.find(site, module, base))
    # Nothing of an adapter is left out silently: what no variant accounts for is an error.
    left = sorted(set(site.tensors) - set(used))
    if left:
        raise SiteError(
            f"the adapter tensor {site.tensors[left[0]].name} has no use"
            + (" without its partner" if left[0].startswith("lora_") else ""),
            "every adapter tensor used exactly once",
            "the adapter is incomplete, or holds something that cannot be merged",
        )
    if len(used) != len(set(used)):
        raise AssertionError(f"two variants use the same tensor of {site.path}")
    return changes


def _module_in_base(site: Site, base: BaseView) -> str:
    present = set(base.modules)
    if site.path.endswith("experts"):
        # A stack that is fused in memory may be one module per expert on disk.
        present |= {name.partition(".experts.")[0] + ".experts" for name in present if ".experts." in name}
    fitting = resolve(site.path, present)
    if not fitting and ".experts." in site.path:
        # One expert of a stack that is fused on disk.
        stack, _, rest = site.path.rpartition(".experts.")
        owners = {name.rpartition(".")[0] for name in base.checkpoint.tensors}
        fitting = [f"{name}.{rest}" for name in resolve(f"{stack}.experts", owners)]
    if not fitting:
        raise SiteError(
            f"the base has no module {site.path!r} under any of its spellings",
            "a module of the base",
            "this adapter was trained on another base",
        )
    if len(fitting) > 1:
        # Two spellings of the rules are both there: a guess could merge into the wrong one of them.
        raise SiteError(f"the module may be {fitting[0]} or {fitting[1]} of the base", "one module")
    return fitting[0]


def left_out(sites: Sequence[Site], base: BaseView, adapter: Adapter) -> list[Finding]:
    """Modules that the config targets by name and that the adapter has nothing for.

    An error where other layers have the same module (the file is incomplete); a note where no layer has.
    """
    targets = adapter.config.target_modules
    if not isinstance(targets, tuple) or adapter.config.some_layers:
        return []
    adapted = {name for site in sites for name in resolve(site.path, base.modules)}
    kinds = {_kind(name) for name in adapted}
    for module in base.modules:
        targeted = any(module == target or module.endswith("." + target) for target in targets)
        if targeted and module not in adapted and _kind(module) in kinds:
            raise AdapterError(
                f"the config targets {module}, the adapter has no tensors for it",
                where=adapter.file.path,
                expected="tensors for every layer that was trained",
                remedy="the adapter is incomplete: save or fetch it again",
            )
    return [
        Finding(
            severity="note",
            code="target-without-tensors",
            message=f"the config targets {target!r}, the adapter has no tensors for it",
        )
        for target in sorted(targets)
        if not any(site.path == target or site.path.endswith("." + target) for site in sites)
    ]


def _promises(site: Site) -> None:
    """Raise `SiteError` where the factors of a module lack what the config says was trained with them."""
    factored = "lora_B.weight" in site.tensors or "lora_embedding_B" in site.tensors
    magnitude = bool({"lora_magnitude_vector", "lora_magnitude_vector.weight"} & set(site.tensors))
    if factored and site.config.use_dora and not magnitude:
        raise SiteError(
            "the config says use_dora, the adapter has no lora_magnitude_vector",
            "a magnitude beside both factors",
            "the adapter is incomplete: save or fetch it again",
        )
    bias = "lora_B.bias" in site.tensors
    if "lora_B.weight" in site.tensors and site.config.lora_bias != bias:
        raise SiteError(
            f"the config says lora_bias: {str(site.config.lora_bias).lower()}, the adapter has "
            f"{'a' if bias else 'no'} lora_B.bias",
            "config and tensors of one adapter",
            "the adapter is incomplete or was put together: save or fetch it again",
        )


def biases_left_out(sites: Sequence[Site], base: BaseView, adapter: Adapter) -> list[Finding]:
    """A warning where the config says that biases were trained, and the adapter has none for its modules.

    PEFT has versions that train them under `bias: lora_only` and do not save them.
    """
    if adapter.config.bias == "none" or any(set(TRAINED) & set(site.tensors) for site in sites):
        return []
    modules = {name for site in sites for name in resolve(site.path, base.modules)}
    if not any(f"{module}.bias" in base.checkpoint.tensors for module in modules):
        return []
    return [
        Finding(
            severity="warning",
            code="biases-left-out",
            message=f"the config says bias: {adapter.config.bias}, the adapter holds no trained bias",
            expected="the biases that were trained with the factors",
            remedy="save the adapter again; until then the base's own biases stay, as in PEFT",
        )
    ]


def _kind(module: str) -> str:
    """The path without the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


# Several changes of one tensor as one: products of adapters and sites added up, range of rows by range.


def combine(changes: Sequence[Change], adapters: Sequence[Adapter]) -> Change:
    """One change from those of several sites or adapters: products are added, as PEFT's `cat` does.

    Products of different rows of a tensor, such as experts of a stack, stay apart.
    """
    first = changes[0]
    if len(changes) == 1:
        return first
    kept = [(change.magnitude, change.replacement, change.row_values) for change in changes]
    if any(part is not None for parts in kept for part in parts):
        raise AdapterError(
            f"{first.target} is changed {len(changes)} times, and not by low-rank products alone",
            where=", ".join(str(adapter.folder) for adapter in adapters),
            expected="updates that can be added",
            remedy="DoRA and replaced tensors of several adapters do not add up: merge one adapter",
        )
    # Sites may change overlapping ranges of rows (all experts, one expert): cut at every edge, then add up.
    parts = [part for change in changes for part in change.updates]
    edges = sorted({part.start for part in parts} | {part.stop for part in parts})
    updates = []
    for start, stop in pairwise(edges):
        terms = tuple(term for part in parts if part.start <= start < part.stop for term in part.terms)
        if terms:
            updates.append(_cut(start, stop, parts, terms))
    uses = tuple(dict.fromkeys(name for change in changes for name in change.uses))
    summed = len({term.left.adapter for part in parts for term in part.terms}) > 1
    formula = first.formula.replace("s·", "Σ w·s·", 1) if summed else first.formula
    return replace(first, formula=formula, uses=uses, updates=tuple(updates))


def _cut(start: int, stop: int, parts: Sequence[RowUpdate], terms: tuple[Term, ...]) -> RowUpdate:
    """The products of the rows `start` to `stop`, each cut out of the range that it was made for."""
    cut = []
    for part in parts:
        if not part.start <= start < part.stop:
            continue
        for term in part.terms:
            if (part.start, part.stop) == (start, stop):
                cut.append(term)
                continue
            view = ("narrow", 0, start - part.start, stop - start)
            cut.append(replace(term, left=replace(term.left, view=(*term.left.view, view))))
    return RowUpdate(start, stop, tuple(cut))


# The tensors of the merged folder: tied heads that need one of their own, then shard by shard.


def separate_head(changes: dict[str, Change], base: BaseView) -> bool:
    """Give a tied head a tensor of its own where embedding and head no longer agree; True if it needs one.

    Where the head follows a change of the embedding, both stay one tensor.
    """
    head, embedding = base.tied_head, base.embedding
    if head is None or embedding is None or not (head in changes or embedding in changes):
        return False
    # Some bases store a tied head all the same; it is then changed as the embedding is.
    stored = head in base.checkpoint.tensors
    change = changes.get(embedding)
    follows = change is not None and change.head_follows
    if change is not None and follows and head not in changes:
        if stored:
            changes[head] = replace(change, target=head, source=head)
        return False
    if head not in changes and not stored:
        changes[head] = Change(head, embedding, "W, separated from the embedding", ())
    return True


def _vocabulary(changes: Mapping[str, Change], base: BaseView) -> int | None:
    change = changes.get(base.embedding or "")
    if change is None or change.shape is None or base.embedding is None:
        return None
    tokens = change.shape[0]
    return tokens if tokens != base.checkpoint.tensors[base.embedding].shape[0] else None


def _lay_out(
    base: Checkpoint, adapters: Sequence[Adapter], changes: Mapping[str, Change], wanted: str | None
) -> dict[str, tuple[Output, ...]]:
    left = dict(changes)
    shards = {}
    for shard in base.shards:
        outputs = [
            _output(info, left.pop(info.name, None), base, adapters, wanted, shard.path)
            for info in shard.tensors.values()
        ]
        for target, change in list(left.items()):
            if target not in base.tensors and change.source in shard.tensors:
                info = shard.tensors[change.source]
                outputs.append(_output(info, left.pop(target), base, adapters, wanted, shard.path))
        shards[shard.path.name] = tuple(outputs)
    # Every change starts from a tensor of the base, so one of the shards has taken it.
    if left:
        raise AssertionError(f"no shard holds {sorted(left)}")
    return shards


def _output(
    info: TensorInfo,
    change: Change | None,
    base: Checkpoint,
    adapters: Sequence[Adapter],
    wanted: str | None,
    path: Path,
) -> Output:
    decoded = base.decoded.get(info.name)
    own = decoded.dtype if decoded else info.dtype
    dtype = wanted if wanted and info.dtype in FLOATS else own
    if change is None:
        return Output(info.name, dtype, info.shape, info, decoded=decoded)
    _check_target(info, dtype, path)
    if change.replacement is not None:
        number = change.replacement.adapter
        source = adapters[number].file.tensors[change.replacement.tensor]
        return Output(change.target, dtype, source.shape, source, number, change)
    return Output(change.target, dtype, info.shape, info, None, change, decoded)


def _check_target(info: TensorInfo, dtype: str, path: Path) -> None:
    if info.dtype not in FLOATS:
        raise CheckpointError(
            f"the adapter changes {info.name}, which the base stores as {info.dtype}",
            where=path,
            expected="one of " + ", ".join(FLOATS),
        )
    if dtype == "F64":
        raise CheckpointError(
            f"the adapter changes {info.name}, which the base stores in float64",
            where=path,
            expected="float32, bfloat16 or float16 in the merged model",
            remedy="give --precision float32",
        )
