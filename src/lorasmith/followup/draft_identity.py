"""What decides the weights of a draft: digests of all that is read, and one key over everything."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import lorasmith
from lorasmith.files.digests import describe, digest_folder
from lorasmith.followup.draft_rows import logprobs_beside
from lorasmith.followup.draft_settings import DraftSettings
from lorasmith.records.base import FileDigest


def inputs_of(target: Path, base: Path | None, responses: Path) -> dict[str, str]:
    """SHA-256 of everything that is read."""
    found = {"target": digest_folder(target), "responses": describe([responses], responses.parent)[0].sha256}
    if base is not None:
        found["base"] = digest_folder(base)
    logprobs = digest_logprobs(responses)
    if logprobs is not None:
        found["logprobs"] = logprobs.sha256
    return found


def digest_logprobs(responses: Path) -> FileDigest | None:
    """Of the stored probabilities beside the responses; None where there are none."""
    path = logprobs_beside(responses)
    return describe([path], path.parent)[0] if path.is_file() else None


def key_of(inputs: dict[str, str], settings: DraftSettings, layers: list[int], device: str) -> str:
    """Names everything that decides the weights: a checkpoint under another key is not continued."""
    versions = {name: version(name) for name in ("torch", "transformers", "accelerate")}
    versions["lorasmith"] = lorasmith.__version__
    body = [inputs, asdict(settings), layers, device, versions]
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
