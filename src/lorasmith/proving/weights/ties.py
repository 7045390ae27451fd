"""Tied embeddings: where input embedding and output head are one tensor in the base.

PEFT's modules act on the two separately: an update of one leaves the other as the base has it. So the
right merge of such an adapter has two tensors, and its config says that they are not tied. Where the
adapter changes both alike (trainable tokens, a resized vocabulary, one tensor saved for both), they may
stay one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch

from lorasmith.proving.weights.adapter import is_embedding, is_head
from lorasmith.proving.weights.formula import Expected
from lorasmith.proving.weights.model_folder import ProvenTensor
from lorasmith.records.base import Finding


class Ties:
    """What a base ties, and what the merge must do about it."""

    def __init__(self, expected: dict[str, Expected], config: Mapping[str, Any]) -> None:
        self.expected = expected
        found = [name for name in expected if is_embedding(name.removesuffix(".weight"))]
        self.embedding = found[0] if len(found) == 1 else None
        self.rows = expected[self.embedding].source.shape[0] if self.embedding else None
        stored = [name for name in expected if is_head(name.removesuffix(".weight"))]
        said = list(flags(config))
        self.tied = bool(self.embedding) and (all(said) if said else not stored)
        self.head: str | None = stored[0] if stored else ("lm_head.weight" if self.tied else None)
        self.stored_head = bool(stored)
        self.alike = True
        """Whether head and embedding of the right merge are the same matrix."""

    def loosen(self) -> None:
        """Give the head of a tied model a formula of its own, so that adapters can change it."""
        if self.tied and self.head and self.embedding and not self._loose():
            embedding = self.expected[self.embedding]
            self.expected[self.head] = Expected(self.head, embedding.dtype, embedding.source)

    def _loose(self) -> bool:
        return self.head in self.expected and not self.stored_head

    def follow(self) -> None:
        """What a tied head takes over from the embedding although the adapter names the embedding only."""
        if not (self.tied and self.head and self.embedding):
            return
        embedding, head = self.expected[self.embedding], self.expected[self.head]
        if head.terms or head.replaced or head.magnitude:
            return
        if embedding.rows:
            self.expected[self.head] = replace(embedding, name=self.head, terms=list(embedding.terms))
        elif embedding.source.shape != head.source.shape:
            self.expected[self.head] = Expected(self.head, head.dtype, embedding.source, replaced=True)

    def settle(self, merged: Mapping[str, ProvenTensor]) -> None:
        """Once all adapters are placed: may the merge leave the two tied, and does it?"""
        if self.tied and self.head and self.embedding:
            embedding = self.expected[self.embedding]
            self.alike = _alike(embedding, self.expected[self.head])
            touched = embedding.terms or embedding.rows or embedding.replaced or not self.alike
            # A head of its own is a tensor too many where the adapter gave no reason to write one.
            if not self.stored_head and self.alike and not (touched and self.head in merged):
                del self.expected[self.head]

    def check(self, config: Mapping[str, Any], merged: Mapping[str, ProvenTensor]) -> Iterator[Finding]:
        """Does the merged config tie what must be tied, and nothing else?"""
        said = list(flags(config))
        rows = self.expected[self.embedding].source.shape[0] if self.embedding else None
        if rows != self.rows and config.get("vocab_size", rows) != rows:
            yield Finding(
                severity="error",
                code="wrong-vocabulary",
                message=f"vocab_size is {config['vocab_size']!r}",
                where="config.json",
                expected=str(rows),
            )
        if self.tied and self.alike:
            if self.head not in merged and said and not all(said):
                yield _finding("the config does not tie the head, but there is none", "true")
        elif (self.tied and not all(not flag for flag in said)) or (self.tied and not said):
            yield _finding("the config ties head and embedding, which the adapter made different", "false")
        elif not self.tied and self.head and self.embedding and any(said):
            yield _finding("the config ties head and embedding, which the base does not", "false")


def flags(config: Mapping[str, Any]) -> Iterator[bool]:
    """Each `tie_word_embeddings` of a config: its own and its text model's."""
    for part in (config, config.get("text_config")):
        if isinstance(part, Mapping) and isinstance(part.get("tie_word_embeddings"), bool):
            yield bool(part["tie_word_embeddings"])


def _alike(one: Expected, other: Expected) -> bool:
    if one.source.shape != other.source.shape or one.rows != other.rows or one.magnitude or other.magnitude:
        return False
    if one.terms or other.terms:
        return one.source == other.source and one.terms == other.terms
    return one.source == other.source or torch.equal(one.source.rows(), other.source.rows())


def _finding(message: str, expected: str) -> Finding:
    return Finding(
        severity="error",
        code="wrong-tie",
        message=message,
        where="config.json",
        expected=f'"tie_word_embeddings": {expected}',
    )
