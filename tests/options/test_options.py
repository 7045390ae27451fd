"""Options are declared once: limits, short names, help and messages come from the field."""

from __future__ import annotations

import re
from typing import Any

import pytest

import lorasmith.options
from lorasmith.errors import UsageError
from lorasmith.options import (
    PANELS,
    AdaptersInput,
    AnswerOptions,
    ClusterOptions,
    CompressOptions,
    DraftOptions,
    MergeOptions,
    Options,
    RespondOptions,
    ScoringOptions,
    SpeculateOptions,
    TrainOptions,
)
from lorasmith.options.base import panel_of

MODELS = [
    model
    for name in lorasmith.options.__all__
    if isinstance(model := getattr(lorasmith.options, name), type) and issubclass(model, Options)
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_option_has_help_that_is_a_sentence_and_a_group(model: type[Options]) -> None:
    known = {name for name, field in model.model_fields.items() if field.is_required()}
    model.make({name: ("x",) if name == "adapter" and model is AdaptersInput else "x" for name in known})
    for name, field in model.model_fields.items():
        text = " ".join((field.description or "").split())
        assert text.endswith("."), f"{name}: {text}"
        assert not text.startswith(("Of ", "With ")), f"{name}: {text}"
        assert panel_of(model, name) in PANELS


@pytest.mark.parametrize(
    ("model", "values", "message"),
    [
        (ScoringOptions, {"batch_size": 0}, "--batch-size is 0.*1 or more"),
        (ScoringOptions, {"loss_on": "prompt"}, "--loss-on is 'prompt'.*response, assistant, last or all"),
        (ScoringOptions, {"batchsize": 1}, "there is no option 'batchsize'.*batch_size"),
        (ScoringOptions, {"max_length": "long"}, "--max-length is 'long'.*a whole number"),
        (MergeOptions, {"seed": -1}, "--seed is -1.*0 or more"),
        (TrainOptions, {"learning_rate": 0}, "--learning-rate is 0.*above 0"),
        (TrainOptions, {"learning_rate": float("nan")}, "--learning-rate is nan.*above 0|finite"),
        (DraftOptions, {"cross_entropy_weight": 0, "kl_weight": 0}, "both 0"),
        (RespondOptions, {"top_p": 0.5}, "do nothing at a temperature of 0"),
        (ClusterOptions, {"workers": 3}, "--workers without a cluster"),
        (ClusterOptions, {"worker_threads": 1}, "without a cluster"),
        (ClusterOptions, {"worker_gpus": 1.0}, "without a cluster"),
        (ClusterOptions, {"ray_address": "auto"}, "without a cluster"),
        (ClusterOptions, {"executor": "ray", "workers": 0}, "1 or more"),
        (ClusterOptions, {"executor": "ray", "worker_gpus": -1.0}, "0 or more"),
        (ClusterOptions, {"executor": "ray", "worker_gpus": 1.5}, r"--worker-gpus is 1\.5"),
    ],
)
def test_a_wrong_value_is_one_message(model: type[Options], values: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as caught:
        model.make(values)
    assert re.search(message, caught.value.message(), re.DOTALL), caught.value.message()


def test_short_names_of_types_are_taken_for_the_long_ones() -> None:
    assert MergeOptions.make({"precision": "bf16"}).precision == "bfloat16"
    assert RespondOptions.make({"dtype": "fp16"}).dtype == "float16"
    assert SpeculateOptions.make({"dtype": "fp32"}).dtype == "float32"


def test_auto_is_no_number() -> None:
    assert ScoringOptions.make({"batch_size": "auto"}).batch_size is None


def test_one_value_stands_for_a_list_of_one() -> None:
    assert CompressOptions.make({"method": "rtn", "bits": 8}).bits == (8,)
    assert SpeculateOptions.make({"draft_tokens": "2,3"}).draft_tokens == (2, 3)


def test_options_are_taken_by_name_from_several_sources() -> None:
    scoring = ScoringOptions(seed=7, device="cpu")
    other = MergeOptions(seed=8, rounding="dithered")
    assert AnswerOptions.taken_from(scoring) == AnswerOptions(seed=7, device="cpu")
    taken = MergeOptions.taken_from(scoring, other, calibration_tokens=5)
    assert (taken.seed, taken.device, taken.rounding, taken.calibration_tokens) == (7, "cpu", "dithered", 5)


def test_keywords_and_an_object_are_two_ways_to_say_the_same() -> None:
    assert ScoringOptions.given(None, {"seed": 3}) == ScoringOptions(seed=3)
    assert ScoringOptions.given(ScoringOptions(seed=3), {}) == ScoringOptions(seed=3)
    with pytest.raises(UsageError, match="one of them"):
        ScoringOptions.given(ScoringOptions(), {"seed": 3})
