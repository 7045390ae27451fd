"""Why a gate has no data."""

from __future__ import annotations


class NotMeasured(Exception):
    """The value is not there; the message says why. Caught by `evaluate`, never shown as an error."""
