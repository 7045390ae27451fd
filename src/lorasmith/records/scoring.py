"""Records of validation: loss and perplexity of one model on one test set."""

from __future__ import annotations

from typing import Any, ClassVar

from lorasmith.records.base import FileDigest, Finding, Interval, Part, Record


class ModelIdentity(Part):
    """Which model was scored: folders by the digest of their contents, never by their path."""

    role: str
    """`base`, `adapter` or `merged`."""
    model_sha256: str
    """Digest of the model folder (`files.digests.digest_folder`)."""
    adapter_sha256: str | None = None
    architecture: str
    parameters: int


class ScoringSettings(Part):
    """What fixes the figures: the same settings and inputs give the same numbers."""

    loss_on: str = "response"
    """`response` or `last`: the last answer; `assistant`: every answer; `all`: the full-text number."""
    boundary: str = "generation"
    """`generation`: prompt and answer in tokens of their own, as in use; `text`: both as one text, as
    trainers do."""
    template: str
    """`chat` or `plain`, resolved from `auto`."""
    system: str | None = None
    """System prompt of rows that have none."""
    template_args: dict[str, Any] = {}
    """Names that the chat template was given beside the messages."""
    end_of_turn: bool = True
    """Whether the token that ends the response is scored as well."""
    max_length: int
    """Longest row in tokens; longer rows are cut and counted in `truncated`."""
    arithmetic: str
    """Data type and route of the arithmetic, such as `float32` or `float32 (oneDNN)`."""
    device: str
    device_map: str | None = None
    """`auto` where the model was spread over several places."""
    layout: str = "padded"
    """`packed`: rows stand behind one another, and what several begin with was computed once; or `padded`."""
    batch_tokens: int
    """At most so many in a batch: with padding, or in a pack."""
    batch_size: int | None = None
    """Rows of a batch at most, where that was asked for."""
    limit: int | None = None
    """Rows that were scored at most, where that was asked for; see `partial`."""
    shuffle_seed: int | None = None
    """Seed of the choice of those rows; without it the first ones are taken."""
    seed: int = 0
    """Seed of the bootstrap."""


class GroupMetrics(Part):
    """Token-weighted loss of a group of examples."""

    examples: int
    tokens: int
    loss: float
    """Mean negative log-likelihood in nats per scored token."""
    perplexity: float
    """exp(loss)."""
    interval: Interval | None = None
    """Confidence interval of the loss, by bootstrap over examples."""


class OtherBoundary(Part):
    """What the other boundary between prompt and answer gives, on a sample of the rows that it changes."""

    boundary: str
    """The one that was not used: `text` or `generation`."""
    straddling: int
    """Rows in which prompt and answer share a token, as that boundary counts them."""
    changed: int
    """Rows of which it scores other tokens."""
    rows: int
    """How many of them were scored both ways."""
    loss: float
    """Their loss with it, in nats per token."""
    used_loss: float
    """Their loss with the boundary that was used."""


class ValidationResult(Record):
    """`validation/base.json`, `adapter.json`, `merged.json`."""

    FORMAT: ClassVar[str] = "lorasmith/validation/1"

    model: ModelIdentity
    test_set: FileDigest
    settings: ScoringSettings
    overall: GroupMetrics
    groups: dict[str, dict[str, GroupMetrics]]
    """`source`, `domain`, `difficulty` and crossings such as `source × difficulty` → group → metrics.

    `turn` → which of the assistant's turns, where conversations are scored in all of them: its `examples` are
    the rows that have such a turn.
    """
    truncated: int = 0
    straddling: int = 0
    """Rows whose joint tokenisation would merge the end of the prompt with the start of the response."""
    other_boundary: OtherBoundary | None = None
    """None where it changes nothing, or was not looked at."""
    per_example: FileDigest
    """The Parquet file beside this record."""
    partial: bool = False
    """True when only a part of the test set was scored (`--limit`)."""
    findings: list[Finding] = []


class TaskMetric(Part):
    """One of a benchmark's own metrics for one model."""

    benchmark: str
    metric: str
    """`accuracy`, `exact_match`, `f1`, `pass@1`, or what the caller's own metric calls it."""
    method: str
    """`likelihood` of the choices, or `generation`."""
    examples: int
    scored: int
    unscored: int
    """Examples without a verdict, such as one whose code could not be run; they count as not right."""
    reasons: dict[str, int] = {}
    """Why, with how often."""
    hit_limit: int = 0
    """Generated answers that the limit of new tokens cut off."""
    max_new_tokens: int | None = None
    value: float | None
    """Mean over all examples, 0..1; None where none has a verdict."""
    interval: Interval | None = None


class TaskResult(Record):
    """`validation/{role}_tasks.json`."""

    FORMAT: ClassVar[str] = "lorasmith/tasks/1"

    model: ModelIdentity
    test_set: FileDigest
    settings: ScoringSettings
    metrics: list[TaskMetric]
    task_module: FileDigest | None = None
    """The file with the caller's own metric (`--task-module`), as it was run."""
    per_example: FileDigest
    """The Parquet file beside this record."""
    partial: bool = False
    findings: list[Finding] = []


class TaskEffect(Part):
    """Model B against model A on the examples of a benchmark that both were scored on."""

    benchmark: str
    metric: str
    examples: int
    value_a: float
    value_b: float
    delta: float
    """value_b − value_a: positive when B is better."""
    interval: Interval | None
    p_value: float
    verdict: str
    """`helps`, `no clear effect` or `hurts`."""


# What may decide the last digits of a result: processor, features, versions, threads.


class Conditions(Part):
    """Under equal ones, the same chunk of the same work gives the same bytes."""

    device: str
    """`cpu`, `cuda` or `mps`."""
    processor: str
    """Model name of the processor, or of the GPU that computed."""
    features: list[str] = []
    """Vector and matrix instructions of the processor and the set that torch uses; a GPU's capability."""
    versions: dict[str, str] = {}
    """Versions of the libraries that compute."""
    threads: int
    """Threads of each worker."""

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
