"""What a person may choose: every option once, with its default, its limits and its help.

A flag, a key of `run.toml`, a keyword of a public function and a line of the reference are made from a field
of these models; `cli/flags.py` makes the flags. A field of a name has one meaning: two commands that need
the same option inherit it from the same class.
"""

from lorasmith.options.base import PANELS, Flag, Options
from lorasmith.options.followup import (
    ChatOptions,
    CompressOptions,
    DraftOptions,
    RespondOptions,
    SpeculateOptions,
)
from lorasmith.options.machine import ClusterOptions, DeviceOptions
from lorasmith.options.merging import MergeOptions, RoundingOptions
from lorasmith.options.scoring import AnswerOptions, CompareOptions, ScoringOptions, ValidateOptions
from lorasmith.options.training import TrainOptions

__all__ = [
    "PANELS",
    "AnswerOptions",
    "ChatOptions",
    "ClusterOptions",
    "CompareOptions",
    "CompressOptions",
    "DeviceOptions",
    "DraftOptions",
    "Flag",
    "MergeOptions",
    "Options",
    "RespondOptions",
    "RoundingOptions",
    "ScoringOptions",
    "SpeculateOptions",
    "TrainOptions",
    "ValidateOptions",
]
