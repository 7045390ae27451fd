"""Records of the proof of the weights and of the proof of the behaviour."""

from __future__ import annotations

from typing import Any, ClassVar

from lorasmith.records.base import FileDigest, Finding, Interval, Part, Record
from lorasmith.records.scoring import ModelIdentity, ScoringSettings, TaskEffect


class Difference(Part):
    """One element that is not what the formula gives."""

    tensor: str
    index: list[int]
    found: float | str
    expected: float | str
    ulps: int


class TensorProof(Part):
    """What was checked of one tensor of the merged model."""

    name: str
    kind: str
    """`merged`, `copied`, `cast`, `replaced`, `missing` or `extra`."""
    elements: int
    wrong: int
    max_ulps: int
    redone: int = 0
    """Elements decided by exact arithmetic."""
    dtype: str = ""
    """Type that the merged model stores it in, in the words of a safetensors header."""
    ulps: dict[str, int] = {}
    """Wrong elements by distance: `1`, `2-3`, `4-15`, `16-255`, `256-65535`, `65536-`."""
    note: str = ""
    """What seems to have happened to a wrong tensor, in words."""
    rounding: str = "nearest"
    """The rule that it was held against; `calibrated` allows some ulps from nearest."""


class WeightProof(Record):
    """`proof/weights.json`."""

    FORMAT: ClassVar[str] = "lorasmith/weight-proof/1"

    grade: str
    """`exact`, `bounded` or `different`."""
    rounding: str
    precision: str = "base"
    """`base` (each tensor's own type), `float32`, `bfloat16` or `float16`."""
    claimed: bool = False
    """True when the merge carries lorasmith's own record of how it was made."""
    bound_ulps: int
    """0 for `exact`; the largest distance found for `bounded`."""
    base_sha256: str
    adapter_sha256: list[str]
    merged_sha256: str
    tensors_checked: int
    elements_checked: int
    adapter_tensors_used: int
    adapter_tensors_total: int
    tensors: list[TensorProof]
    differences: list[Difference]
    """The first ones, by tensor."""
    findings: list[Finding] = []


class KLStatistics(Part):
    """Kullback–Leibler divergence per token, adapter ‖ other, over the full vocabulary, in nats."""

    mean: float
    standard_error: float | None
    """Standard error of the mean, with examples as clusters of tokens; None for a single example."""
    median: float
    q90: float
    q95: float
    q99: float
    q999: float
    max: float


class Flip(Part):
    """A scored position where the two models prefer different tokens."""

    example: str
    position: int
    """Index within the response, in tokens."""
    token_a: int
    token_b: int
    margin: float
    """How much more probable model A's choice is than model B's, in nats, under A."""


class TokenComparison(Part):
    """Two models on the same tokens."""

    examples: int
    tokens: int
    loss_a: float
    loss_b: float
    loss_delta: float
    """loss_b − loss_a."""
    loss_delta_interval: Interval | None = None
    perplexity_a: float
    perplexity_b: float
    perplexity_delta: float
    kl: KLStatistics
    delta_p_mean: float
    delta_p_rms: float
    """Root mean square of p_b − p_a at the correct token."""
    top1_agreement: float
    """Fraction of positions, 0..1."""
    perplexity_ratio: float = 1.0
    """perplexity_b / perplexity_a."""
    max_abs_delta: float
    """Largest |log p_b − log p_a| at a correct token."""


class ExampleComparison(Part):
    """Two models on one example."""

    id: str
    tokens: int
    loss_delta: float
    mean_kl: float
    max_abs_delta: float
    """Largest |log p_b − log p_a| at a correct token."""
    flips: int


class Divergence(Part):
    """An example after whose prompt the two models write different texts."""

    id: str
    position: int
    """First token that differs, from 0."""
    text_a: str
    """The text from the first difference on, shortened."""
    text_b: str


class GenerationGroup(Part):
    """How alike both models write after the prompts of a group."""

    examples: int
    same: int
    """Examples after which both write exactly the same tokens."""
    tokens_before_divergence: float
    """Mean number of tokens that agree from the start."""


class GenerationComparison(Part):
    """Greedy generation by both models after every prompt, compared token by token."""

    max_new_tokens: int
    examples: int
    same: int
    """Examples after which both write exactly the same tokens."""
    same_fraction: float
    unfinished_a: int
    """Texts of model A that the limit cut off; they are compared up to there."""
    unfinished_b: int
    tokens_before_divergence: float
    """Mean number of tokens that agree from the start, over all examples."""
    groups: dict[str, dict[str, GenerationGroup]] = {}
    """`source`, `domain`, `difficulty` and crossings → group → the same for its examples."""
    divergences: list[Divergence]
    floor_same: int | None = None
    """Examples after which A writes the same tokens alone as in a batch, of `floor_examples`."""
    floor_examples: int = 0


class BehaviourProof(Record):
    """`proof/behaviour.json`: adapter against merged, token by token."""

    FORMAT: ClassVar[str] = "lorasmith/behaviour-proof/1"

    grade: str
    """`indistinguishable`, `faithful`, `drifted` or `not measured`."""
    reasons: list[str]
    """The numbers that decided the grade."""
    thresholds: dict[str, float]
    a: ModelIdentity
    b: ModelIdentity
    test_set: FileDigest
    settings: ScoringSettings
    overall: TokenComparison
    groups: dict[str, dict[str, TokenComparison]]
    floor: TokenComparison | None
    """The adapter against itself under another batch layout and order of summation."""
    floor_layouts: list[str] = []
    """The two ways in which the adapter was computed for the floor."""
    serving: TokenComparison | None = None
    """The adapter against itself in the 16-bit type that it is stored and served in, on some rows; None where
    everything is float32. It decides nothing: it tells what serving alone changes."""
    serving_layouts: list[str] = []
    """The two ways in which the adapter was computed for it."""
    flips: list[Flip]
    examples: list[ExampleComparison] = []
    generation: GenerationComparison | None = None
    """How both models generate, where that was asked for."""
    partial: bool = False
    """True when only a part of the test set was compared (`limit`)."""
    findings: list[Finding] = []


class PairedEffect(Part):
    """Model B against model A on the same examples."""

    examples: int
    tokens: int = 0
    loss_a: float
    loss_b: float
    loss_delta: float
    """loss_b − loss_a: negative when B is better."""
    perplexity_delta: float
    interval: Interval | None
    """Confidence interval of `loss_delta`; None for a single example."""
    p_value: float = 1.0
    """Probability of a difference as large without any effect, by flipping the signs of the examples' own."""
    verdict: str
    """`helps`, `no clear effect` or `hurts`: where the interval lies against 0, and whether p < 0.05."""


class ComparisonRecord(Record):
    """`proof/comparison.json`: the three models side by side, as the guide's summary shows them."""

    FORMAT: ClassVar[str] = "lorasmith/comparison/1"

    adapter_effect: PairedEffect | None
    """Adapter against base."""
    adapter_effect_groups: dict[str, dict[str, PairedEffect]] = {}
    merge_effect: PairedEffect
    """Merged against adapter."""
    weights_grade: str
    behaviour_grade: str
    task_effects: dict[str, list[TaskEffect]] = {}
    """The benchmarks' own metrics: `effect` is adapter against base, `merge` merged against adapter."""
    details: dict[str, Any] = {}
