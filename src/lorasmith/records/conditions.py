"""What may decide the last digits of a result: processor, features, versions, threads."""

from __future__ import annotations

from lorasmith.records.base import Part


class Conditions(Part):
    """Under equal ones, the same chunk of the same work gives the same bytes."""

    device: str
    """`cpu`, `cuda` or `mps`."""
    processor: str
    """Model name of the processor, or of the GPU that computed."""
    features: list[str] = []
    """Vector and matrix instructions of the processor and the set that torch uses; a GPU's capability."""
    versions: dict[str, str] = {}
    """Of the libraries that compute."""
    threads: int
    """Of each worker."""

    @property
    def label(self) -> str:
        """One line for a person."""
        versions = ", ".join(f"{name} {version}" for name, version in sorted(self.versions.items()))
        threads = f"{self.threads} thread" + ("s" if self.threads != 1 else "")
        features = " ".join(self.features)
        return "; ".join(part for part in (self.device, self.processor, features, versions, threads) if part)


class ChunkRecord(Part):
    """A line of `NAME.chunks.jsonl`: one chunk of work, and what computed it."""

    part: str = ""
    """Which part of the work it belongs to, where there are several, such as `adapter` and `merged`."""
    rows: list[int]
    """Rows of the data file, from 0."""
    keys: list[str] | None = None
    """What names each of them in the result, where that outlives their places in the file."""
    conditions: Conditions
