"""Where an adapter's tensors belong: its modules, found in the base, and what does not fit together there."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from lorasmith.adapters.base import Base, Found, Site, SiteError
from lorasmith.adapters.registry import VARIANTS, split_name
from lorasmith.checkpoint.adapter import PREFIX, Adapter
from lorasmith.checkpoint.header import TensorInfo
from lorasmith.checkpoint.model import Checkpoint
from lorasmith.checkpoint.names import resolve
from lorasmith.errors import AdapterError
from lorasmith.files.hub import origin_of
from lorasmith.records.base import Finding

_COMMIT = re.compile(r"[0-9a-f]{7,40}")


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


def changes_at(sites: Sequence[Site], base: Base, adapter: Adapter) -> list[Found]:
    found = []
    for site in sites:
        try:
            found += _found_at(site, base)
        except SiteError as error:
            raise AdapterError(
                f"{site.path}: {error.found}",
                where=adapter.file.path,
                expected=error.expected,
                remedy=error.remedy or "check that the adapter was trained on this base",
            ) from error
    return found


def _found_at(site: Site, base: Base) -> list[Found]:
    module = _module_in_base(site, base)
    used: list[str] = []
    found = []
    for variant in VARIANTS:
        taken = variant.takes(site)
        if taken:
            used += sorted(taken)
            found.append(variant.find(site, module, base))
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
    return found


def _module_in_base(site: Site, base: Base) -> str:
    present = set(base.modules)
    if site.path.endswith("experts"):
        # A stack that is fused in memory may be one module per expert on disk.
        present |= {name.partition(".experts.")[0] + ".experts" for name in present if ".experts." in name}
    found = resolve(site.path, present)
    if not found and ".experts." in site.path:
        # One expert of a stack that is fused on disk.
        stack, _, rest = site.path.rpartition(".experts.")
        owners = {name.rpartition(".")[0] for name in base.checkpoint.tensors}
        found = [f"{name}.{rest}" for name in resolve(f"{stack}.experts", owners)]
    if not found:
        raise SiteError(
            f"the base has no module {site.path!r} under any of its spellings",
            "a module of the base",
            "this adapter was trained on another base",
        )
    if len(found) > 1:
        raise SiteError(f"the module may be {found[0]} or {found[1]} of the base", "one module")
    return found[0]


def left_out(sites: Sequence[Site], base: Base, adapter: Adapter) -> list[Finding]:
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


def other_base(base: Checkpoint, adapter: Adapter) -> list[Finding]:
    """Whether adapter and base name different models; a base without a name cannot tell."""
    origin = origin_of(base.folder)
    named, revision = adapter.config.base_model, adapter.config.revision or ""
    given = origin.repository if origin else base.config.get("_name_or_path")
    if named and isinstance(given, str) and given and Path(named).name != Path(given).name:
        found = f"the adapter was trained on {Path(named).name!r}, the base is {Path(given).name!r}"
        return [_other_base("base-name", found)]
    # What a branch or tag stood for when the adapter was trained cannot be told from its name.
    if origin and _COMMIT.fullmatch(revision) and not origin.commit.startswith(revision):
        found = f"the adapter was trained on the commit {revision} of its base, this is {origin.commit}"
        return [_other_base("base-revision", found)]
    return []


def _other_base(code: str, found: str) -> Finding:
    return Finding(
        severity="warning",
        code=code,
        message=found,
        expected="the base that the adapter was trained on",
    )


def _kind(module: str) -> str:
    """The path without the numbers of layers and experts."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))
