"""What comes after a release: responses, a draft model, speculative decoding, fewer bits, a conversation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from lorasmith.errors import UsageError
from lorasmith.options.base import Flag, Options
from lorasmith.options.inputs import PriceOptions, ReadingOptions
from lorasmith.options.machine import DeviceOptions, SeedOptions, SpreadOptions
from lorasmith.options.scoring import CodeOptions, SystemOptions, TemplateOptions
from lorasmith.options.training import OptimiserOptions, Positive
from lorasmith.options.values import Count, Dtype, Fraction, Model, OneOrSeveral, WithCommas

Weight = Annotated[float, Field(ge=0)]
Format = Literal["compressed-tensors", "gguf:q4_0", "gguf:q4_k_m", "gguf:q5_k_m", "gguf:q6_k", "gguf:q8_0"]


class SamplingOptions(SystemOptions):
    """How the next token is chosen."""

    PANEL: ClassVar[str] = "Generation"

    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Temperature of sampling; 0 takes the likeliest token (greedy)."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Total probability of the likeliest tokens that are drawn from."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Number of likeliest tokens that are drawn from; 0 for all."""

    @model_validator(mode="after")
    def _is_used(self) -> Self:
        if not self.temperature and (self.top_p != 1 or self.top_k):
            raise UsageError(
                "--top-p and --top-k do nothing at a temperature of 0",
                remedy="give --temperature as well, or leave them out",
            )
        return self


class ResponseOptions(SamplingOptions):
    """How rows are answered: options of `respond`, and keys of `[followup.respond]`."""

    engine: Literal["transformers", "vllm"] = "transformers"
    """Engine that generates: transformers, or vllm (GPU)."""
    max_new_tokens: Count = 1024
    """Longest response in tokens."""
    top_logprobs: Annotated[int, Field(ge=0)] = 0
    """Number of likeliest tokens whose log-probabilities are kept (Parquet)."""
    batch_size: Annotated[Count | None, Flag(default="16 on a CPU, 64 on a GPU")] = None
    """Number of rows that are answered at once."""
    limit: Annotated[Count | None, Flag(default="all")] = None
    """Number of rows from the beginning of the file that are answered."""


class RespondOptions(ResponseOptions, TemplateOptions, SpreadOptions, SeedOptions, PriceOptions):
    """What a caller of `respond` may choose."""

    PANEL: ClassVar[str] = "Generation"

    dtype: Dtype = "auto"
    """Type of the weights: auto (float32 on a CPU, else the model's own), float32, bfloat16 or float16."""
    retry_failed: bool = False
    """Try rows again that failed before."""
    whole_groups: Annotated[bool, Flag(hidden=True)] = False
    """Answer rows in groups that a kill does not tear: stored log-probabilities are then the same bytes after
    it, at the price of up to `GROUP_ROWS` rows that are answered again, and of each group's slow end."""


class StartOptions(Options):
    """What a draft begins as."""

    PANEL: ClassVar[str] = "Draft model"

    from_model: Annotated[Model | None, Flag(metavar="MODEL", hub=True, default="layers of the target")] = (
        None
    )
    """Folder of a small model with the target's tokenizer, or its name on the hub, to begin with."""
    layers: Annotated[str | None, Flag(metavar="LAYERS")] = None
    """Layers of the target to begin with, such as 0,2,4 or 0-3,8."""


class LearningOptions(OptimiserOptions):
    """How a draft learns: options of `draft train`, and keys of `[followup.draft]`."""

    PANEL: ClassVar[str] = "Draft model"

    cross_entropy_weight: Weight = 1.0
    """Weight of the cross-entropy on the target's tokens in the loss."""
    kl_weight: Weight = 1.0
    """Weight of the KL divergence from the target's stored probabilities in the loss."""
    classifier_weight: Weight = 0.1
    """Weight of the difficulty classifier in the loss."""
    labels: Literal["auto", "data", "confidence", "none"] = "auto"
    """Labels of difficulty: data (metadata.difficulty), confidence (easy or hard), none, or auto."""
    learning_rate: Positive = 1e-4
    """Peak of the learning rate."""
    epochs: Positive = 3.0
    """Largest number of passes over the training rows."""
    batch_size: Count = 8
    """Number of rows in a step."""
    warmup: Fraction = 0.05
    """Fraction of all steps over which the rate rises; it then falls as a cosine to a tenth."""
    validation: Fraction = 0.1
    """Fraction of rows that decides when to stop."""
    held_out: Fraction = 0.1
    """Fraction of rows that only the report sees."""
    validate_every: Count = 50
    """Number of steps between two validations; each writes a checkpoint."""
    patience: Count = 3
    """Number of validations without a better one after which training stops."""

    @model_validator(mode="after")
    def _something_is_learned(self) -> Self:
        if self.cross_entropy_weight + self.kl_weight == 0:
            raise UsageError("the weights of cross-entropy and KL are both 0", expected="one of them above 0")
        return self


class DraftOptions(LearningOptions, DeviceOptions, SeedOptions):
    """What a caller of `train_draft` may choose."""


class SpeculationOptions(Options):
    """What is tried: options of `speculate`, and keys of `[followup.speculate]`."""

    PANEL: ClassVar[str] = "Generation"

    draft_tokens: Annotated[
        tuple[Count, ...], WithCommas, Flag(text=True, metavar="N,N"), Field(min_length=1)
    ] = (2, 4, 6)
    """Numbers of tokens that the draft proposes at once, separated by commas."""
    max_new_tokens: Count = 128
    """Longest answer in tokens."""
    limit: Count = 20
    """Number of prompts from the beginning of the file."""


class SpeculateOptions(SpeculationOptions, TemplateOptions, DeviceOptions):
    """What a caller of `speculate` may choose."""

    PANEL: ClassVar[str] = "Speed and memory"

    dtype: Dtype = "float32"
    """Type of the weights: float32, bfloat16, float16, or auto; only float32 shows a tie for what it is."""


class FormatOptions(Options):
    """Formats, and gates on their quality: options of `compress`, and keys of `[followup.compress]`."""

    PANEL: ClassVar[str] = "Compression"

    format: Annotated[tuple[Format, ...], OneOrSeveral, Flag(metavar="FORMAT")] = ("compressed-tensors",)
    """Format of the weights: compressed-tensors, gguf:q4_0, gguf:q4_k_m, gguf:q5_k_m, gguf:q6_k or gguf:q8_0.
    Several formats, methods or bits: every combination, each in a folder below --output."""
    method: Annotated[tuple[Literal["rtn", "calibrated"], ...], OneOrSeveral] = ("rtn",)
    """Way of rounding: rtn (round to nearest), or calibrated (fitted to rows)."""
    bits: Annotated[tuple[int, ...], OneOrSeveral, Flag(default="4")] = ()
    """Bits of a weight in compressed-tensors: 4, 8, or both; a GGUF type has its own."""
    group_size: Annotated[Count | None, Flag(default="the largest of 128, 64, 32 that fits")] = None
    """Number of weights that share a scale."""
    iterations: Count = 200
    """Number of steps for each block when calibrated."""
    calibration_rows: Count = 128
    """Number of samples that calibrate."""
    calibration_length: Count = 512
    """Length in tokens of a sample that calibrates."""


class QualityOptions(Options):
    """What a compressed model may lose: 5 % of perplexity, 0.05 nats a token, one choice in ten.

    Chosen, not measured: how much is too much depends on the use, so each can be set.
    """

    PANEL: ClassVar[str] = "Gates"

    limit: Annotated[Count | None, Flag(default="all")] = None
    """Number of rows of the test set that the quality is measured on."""
    max_perplexity_ratio: Weight = 1.05
    """Gate: largest perplexity, as a multiple of the original's."""
    max_mean_kl: Weight = 0.05
    """Gate: largest mean KL divergence from the original, in nats a token."""
    max_q99_kl: Annotated[Weight | None, Flag(default="no gate")] = None
    """Gate: largest 99 % quantile of the KL divergence, in nats."""
    min_top1: Annotated[float, Field(ge=0, le=1)] = 0.9
    """Gate: smallest share of tokens on which both models agree, 0 to 1."""
    max_accuracy_drop: Annotated[Weight | None, Flag(default="0.05 where there are questions")] = None
    """Gate: largest loss of accuracy over the benchmarks' questions, 0 to 1."""
    target_size: Annotated[str | None, Flag(metavar="SIZE", default="no gate")] = None
    """Gate: largest size, such as 540MB or 4GB; refused at once where no format reaches it."""


class CompressOptions(FormatOptions, QualityOptions, CodeOptions, ReadingOptions, DeviceOptions, SeedOptions):
    """What a caller of `compress` may choose."""

    PANEL: ClassVar[str] = "Compression"

    calibration: Annotated[Path | None, Flag(metavar="FILE", default="none")] = None
    """JSONL with prompt and response that the calibrated method looks at; local."""
    test_set: Annotated[Path | None, Flag(metavar="FILE", default="nothing is measured")] = None
    """JSONL on which the quality is measured."""
    tasks: bool = True
    """Put the benchmarks' questions of the test set as well."""


class ChatOptions(SamplingOptions, DeviceOptions, SeedOptions):
    """What a caller of `open_chat` may choose."""

    PANEL: ClassVar[str] = "Generation"

    max_new_tokens: Count = 512
    """Longest answer in tokens."""
    template: Literal["chat", "plain"] = "chat"
    """How messages are laid out: chat, or plain to have the text continued."""
    dtype: Dtype = "auto"
    """Type of the weights: auto (float32 on a CPU, else the model's own), float32, bfloat16 or float16."""
