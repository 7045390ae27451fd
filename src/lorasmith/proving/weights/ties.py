"""Tied embeddings: where input embedding and output head are one tensor in the base.

PEFT's modules act on the two separately: an update of one leaves the other as the base has it. So the
right merge of such an adapter has two tensors, and its config says that they are not tied. Where the
adapter changes both alike (trainable tokens, a resized vocabulary, one tensor saved for both), they may
stay one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch

from lorasmith.proving.weights.adapter import is_embedding, is_head
from lorasmith.proving.weights.beside import ModelConfig
from lorasmith.proving.weights.formula import Expected
from lorasmith.proving.weights.model_folder import ProvenTensor
from lorasmith.records.base import Finding

_HEAD = "lm_head.weight"


class Ties:
    """What a base ties, and what the merge must do about it."""

    def __init__(self, expected: dict[str, Expected], flag: bool | None) -> None:
        self.expected = expected
        self.flag = flag
        """Whether the base's config asks the loader to tie; None where it says nothing."""
        embeddings = [name for name in expected if is_embedding(name.removesuffix(".weight"))]
        self.embedding = embeddings[0] if len(embeddings) == 1 else None
        self.rows_before = self.rows
        heads = [name for name in expected if is_head(name.removesuffix(".weight"))]
        self.stored_head = bool(heads)
        self.head: str | None = heads[0] if heads else None
        self.tied = bool(self.embedding) and (not heads if flag is None else flag)
        if self.tied and self.head:
            # Where both are stored and differ the loader leaves them apart, whatever the config asks for.
            self.tied = self._same_numbers()
        elif self.tied:
            self.head = _HEAD
        self.alike = True
        """Whether head and embedding of the right merge are the same matrix."""

    @property
    def rows(self) -> int | None:
        """Rows of the embedding, as far as adapters have been placed."""
        return self.expected[self.embedding].source.shape[0] if self.embedding else None

    def _same_numbers(self) -> bool:
        head, embedding = self.expected[str(self.head)].source, self.expected[str(self.embedding)].source
        return head.shape == embedding.shape and torch.equal(head.rows(), embedding.rows())

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
            self._rename_head(merged)
            embedding = self.expected[self.embedding]
            self.alike = _alike(embedding, self.expected[self.head])
            touched = embedding.terms or embedding.rows or embedding.replaced or not self.alike
            # A head of its own is a tensor too many where the adapter gave no reason to write one.
            if not self.stored_head and self.alike and not (touched and self.head in merged):
                del self.expected[self.head]

    def _rename_head(self, merged: Mapping[str, ProvenTensor]) -> None:
        """A base that stores its embedding under an older name may have its new head beside it.

        Loaders rename both alike: `language_model.model.embed_tokens` and `language_model.lm_head`.
        """
        start, model, _ = str(self.embedding).rpartition("model.embed_tokens.weight")
        if not self.stored_head and model and start and start + _HEAD in merged and self.head not in merged:
            head = self.expected.pop(str(self.head))
            self.head = start + _HEAD
            self.expected[self.head] = replace(head, name=self.head)

    def check(self, config: ModelConfig, merged: Mapping[str, ProvenTensor]) -> Iterator[Finding]:
        """Does the merged config tie what must be tied, and nothing else?"""
        if not (self.embedding and self.head) or not config.body:
            return
        if self.tied and self.alike:
            if self.head not in merged and config.ties is False:
                yield _finding("the config does not tie the head, but there is none", "true")
        elif self.tied and config.ties is not False:
            yield _finding("the config ties head and embedding, which the adapter made different", "false")
        elif not self.tied and config.ties and not self.flag:
            yield _finding("the config ties head and embedding, which the base does not", "false")


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
