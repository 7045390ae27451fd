"""Paths as people give them to the public functions: text or `Path`."""

from __future__ import annotations

from os import PathLike

StrPath = str | PathLike[str]
