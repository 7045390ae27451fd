"""What a run refuses to start with: hours would be spent before it fails."""

from __future__ import annotations

from pathlib import Path

from lorasmith.checkpoint.adapter import open_adapter
from lorasmith.checkpoint.model import open_checkpoint
from lorasmith.config import RunConfig
from lorasmith.errors import MemoryLimitError
from lorasmith.files.machine import human_bytes, require_disk
from lorasmith.merging.plan import make_plan
from lorasmith.preflight.doctor import device_memory
from lorasmith.preflight.estimate import least_memory
from lorasmith.preflight.followup import followup_disk
from lorasmith.preflight.sizes import model_size


def require_machine(config: RunConfig) -> None:
    """Raise `MemoryLimitError` or `DiskError` where the run could not end; look at headers only.

    Also raises what is wrong with base and adapter (`CheckpointError`, `AdapterError`). A stage that is done
    needs nothing any more. `config.base` is a folder.
    """
    base, adapter = open_checkpoint(Path(config.base)), open_adapter(config.adapter)
    plan = make_plan(base, [adapter], [1.0], config.precision)
    merged = sum(output.nbytes for output in plan.outputs)
    done = {path.stem for path in (config.output / "stages").glob("*.json")}
    if "compare" not in done and config.check_memory and config.device_map is None:
        needed = least_memory(model_size(base, adapter, merged))
        have, where = device_memory(config.device)
        if have < needed:
            raise MemoryLimitError(
                f"too little memory for this run: {human_bytes(have)} are available on {where}",
                where=config.base,
                expected=f"{human_bytes(needed)}: the model in float32",
                remedy="use a machine with more memory; --no-check-memory tries all the same",
            )
    left = merged * len({"merge", "package"} - done) + followup_disk(config, base, merged, done)
    if left:
        require_disk(config.output, left, "merge and pack the model")
