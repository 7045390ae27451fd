"""Records of what follows a release: extracted responses and speculative decoding."""

from __future__ import annotations

from typing import Any, ClassVar

from lorasmith.records.base import FileDigest, Finding, Part, Record


class RespondSettings(Part):
    """What decides a response, apart from its row: one output holds responses of one such set only."""

    model_sha256: str
    """Digest of the model folder."""
    adapter_sha256: str | None = None
    engine: str
    """`transformers` or `vllm`."""
    dtype: str
    """Data type of the weights while they compute, such as `float32`."""
    template: str
    """`chat` or `plain`, resolved from `auto`."""
    system: str | None = None
    template_args: dict[str, Any] = {}
    """Names that the chat template was given beside the messages."""
    max_new_tokens: int
    temperature: float
    """0 for greedy decoding."""
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    top_logprobs: int = 0
    """How many of the likeliest tokens are kept at each place."""


class LengthSummary(Part):
    """Tokens of the responses."""

    least: int
    median: int
    p90: int
    most: int


class RespondRecord(Record):
    """`NAME.json` beside `NAME.jsonl`: what the responses are, and how they ended.

    Each row of `NAME.jsonl` is `{id, prompt or messages, response, finish_reason, prompt_tokens,
    response_tokens, repeats, key, metadata, input}`. `NAME.logprobs.parquet` has one row a response: `key`,
    `id`, `finish_reason`, `prompt` (token ids), `tokens` (ids of the response, the end token included),
    `logprobs` (of those tokens, nats), `top_tokens` and `top_logprobs` (a list of K for each token, likeliest
    first), all under the model's own distribution at temperature 1. Their last digits depend on which rows
    shared a batch, as every float32 sum does on its order: the texts of a resumed extraction are the same
    bytes, its log-probabilities are the same to about 1e-5.
    """

    FORMAT: ClassVar[str] = "lorasmith/respond/1"

    settings: RespondSettings
    data: FileDigest
    output: FileDigest
    logprobs: FileDigest | None = None
    rows: int
    """Responses in the output."""
    finish: dict[str, int]
    """`stop`, `length` (cut off at the limit), `context` (cut off by the model's own limit) → rows."""
    cut_off: float
    """Share of rows that did not end by themselves."""
    repeating: int = 0
    """Cut rows that repeat themselves at their end."""
    failed: int = 0
    """Rows set aside in `NAME.failed.jsonl`."""
    prompt_tokens: int
    response_tokens: int
    lengths: LengthSummary | None = None
    findings: list[Finding] = []


class RespondTiming(Record):
    """`NAME.timing.json`: speed of the last command that answered rows, apart from what must not change."""

    FORMAT: ClassVar[str] = "lorasmith/respond-timing/1"

    rows: int
    tokens: int
    """Generated since that command was started; rows of an earlier one are not counted."""
    seconds: float
    rows_per_second: float
    tokens_per_second: float
    cost: float | None = None
    """Seconds times the price per hour that was given, in its currency."""
    hardware: dict[str, Any] = {}


class Acceptance(Part):
    """How drafts were received, over some prompts."""

    prompts: int
    tokens: int
    """Generated, end tokens included."""
    rounds: int
    """Passes of the target."""
    drafted: int
    accepted: int
    acceptance_rate: float | None
    """α: accepted over judged tokens; what stands behind a rejection is not judged. None: nothing was."""
    accepted_length: float
    """Mean tokens that a pass of the target gave, its own token included."""
    by_position: list[float | None]
    """α at each place in a draft; None where no draft came so far."""


class SpeculationSetting(Part):
    """One way to draft."""

    method: str
    """`draft` or `lookup` (prompt lookup)."""
    draft_tokens: int
    overall: Acceptance
    by_source: dict[str, Acceptance]
    equal: int
    """Prompts whose text is that of greedy decoding, token for token."""
    ties: int
    """Prompts that differ first where the two best tokens lie closer together than twice the noise."""
    different: int
    """Prompts that differ for no such reason: the decoding is wrong."""


class SpeculationDifference(Part):
    """A prompt whose text is not that of greedy decoding."""

    id: str
    method: str
    draft_tokens: int
    place: int
    """Token of the response, from 0."""
    margin: float
    """Distance between the two best logits of the reference there."""
    noise: float
    """Largest difference of a logit between both ways, measured over all prompts where the texts agree."""
    tie: bool
    """margin ≤ 2 · noise: each of the two logits may move by the noise."""


class SpeculationRecord(Record):
    """`speculation.json`: whether drafts change the output, and how many are accepted."""

    FORMAT: ClassVar[str] = "lorasmith/speculation/1"

    target_sha256: str
    draft_sha256: str | None
    prompts: FileDigest
    template: str
    dtype: str
    max_new_tokens: int
    noise: float
    settings: list[SpeculationSetting]
    differences: list[SpeculationDifference] = []
    findings: list[Finding] = []
    """Rows that were left out, and why."""


class SpeculationSpeed(Part):
    """One way to draft, measured and predicted."""

    method: str
    draft_tokens: int
    tokens_per_second: float
    speedup: float
    """Over greedy decoding of the target alone, prompts included; median over the prompts."""
    draft_cost: float
    """c: a step of the draft over a step of the target, medians."""
    verify_cost: float | None
    """The target's pass over a full draft over a step of the target, medians; the formula takes it for 1."""
    predicted: float | None
    """(1 − αᵞ⁺¹) / ((1 − α)(γc + 1))."""
    predicted_with_verify: float | None
    """The same with the measured cost of a pass in place of 1."""


class SpeculationTiming(Record):
    """`speculation.timing.json`: speed, apart from the figures that must not change."""

    FORMAT: ClassVar[str] = "lorasmith/speculation-timing/1"

    greedy_tokens_per_second: float
    speeds: list[SpeculationSpeed]
    pays: bool
    recommendation: str
    hardware: dict[str, Any] = {}


# Record of a draft model's training: where it comes from, how it was trained, what it can do.


class GeneratorReport(Part):
    """The draft's generator on held-out rows."""

    rows: int
    tokens: int
    loss: float
    """Mean negative log-likelihood of the target's responses, in nats a token."""
    perplexity: float
    kl: float | None = None
    """Mean KL(target ‖ draft) over the stored tokens and the rest as one; None without stored ones."""
    agreement: float | None = None
    """Share of places where the draft's likeliest token is the target's: greedy drafts are accepted there."""


class ClassifierReport(Part):
    """The difficulty classifier on held-out rows, beside always saying the most common label."""

    rows: int
    labels: list[str]
    labels_from: str
    """`data` (the rows' own), or `confidence` (the target's mean log-probability, cut at its median)."""
    accuracy: float
    f1: float
    """Mean of the labels' F1 (macro)."""
    f1_by_label: dict[str, float]
    calibration_error: float
    """Expected calibration error over ten bins of confidence."""
    confusion: list[list[int]]
    """Rows: true label, columns: predicted, in the order of `labels`."""
    majority_label: str
    majority_accuracy: float
    majority_f1: float


class DraftStep(Part):
    """One validation during training."""

    step: int
    loss: float
    """Weighted sum, as it is trained on."""


class DraftRecord(Record):
    """`lorasmith_draft.json` in the draft's folder."""

    FORMAT: ClassVar[str] = "lorasmith/draft/1"

    lorasmith_version: str
    target_sha256: str
    base_sha256: str | None = None
    """Digest of the small base; None for a draft that was cut from the target."""
    layers: list[int] | None = None
    """The target's layers that were taken, where the draft was cut from it."""
    responses: FileDigest
    logprobs: FileDigest | None = None
    """The stored probabilities beside the responses."""
    settings: dict[str, Any]
    parameters: int
    target_parameters: int
    vocabulary: int
    """Rows of the embedding, as many as the target's."""
    padded_rows: int = 0
    """Rows that were added (or, below 0, taken away) so that both vocabularies have one size."""
    train_rows: int
    validation_rows: int
    held_out_rows: int
    steps: int
    """That were trained."""
    best_step: int
    """Whose weights are saved."""
    stopped_early: bool
    losses: list[float]
    """Weighted loss of each step."""
    validations: list[DraftStep]
    before: GeneratorReport
    """Quality on the held-out rows before any training."""
    generator: GeneratorReport
    classifier: ClassifierReport | None = None
    files: list[FileDigest] = []
    findings: list[Finding] = []


# Record of a training run.


class TrainRecord(Record):
    """`lorasmith_train.json` in the adapter folder."""

    FORMAT: ClassVar[str] = "lorasmith/train/1"

    lorasmith_version: str
    base_sha256: str
    train: FileDigest
    settings: dict[str, Any]
    template: str
    examples: int
    tokens: int
    """Response tokens that were trained on, over all epochs."""
    truncated: int
    """Rows cut at `max_length`."""
    trainable_parameters: int
    losses: list[float]
    """Mean loss per response token of each step, in nats."""
    findings: list[Finding] = []
    """How the rows were read."""
