"""Pieces of text: together they are the response, whatever the tokenizer does to spaces and characters."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lorasmith.reporting.explorer import TokenPieces


def _byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return core


def _metaspace() -> Tokenizer:
    words = ["<unk>", "▁the", "▁cat", "▁sat", "s", "."]
    core = Tokenizer(models.Unigram([(word, -float(index)) for index, word in enumerate(words)], unk_id=0))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return core


@pytest.mark.parametrize(
    "text", ["plain words", "naïve café", "日本語 und 🦙🦙", " leading  spaces\n\nlines"]
)
def test_bytes_join_to_whole_characters(tmp_path: Path, text: str) -> None:
    core = _byte_level()
    core.save(str(tmp_path / "tokenizer.json"))
    ids = core.encode(text).ids
    pieces = TokenPieces.load(tmp_path / "tokenizer.json").of(ids)
    assert pieces is not None
    assert len(pieces) == len(ids)
    assert "".join(pieces) == text


def test_a_decoder_that_strips_the_first_space_loses_none_between_words(tmp_path: Path) -> None:
    core = _metaspace()
    core.save(str(tmp_path / "tokenizer.json"))
    pieces = TokenPieces.load(tmp_path / "tokenizer.json").of(core.encode("the cats sat.").ids)
    assert pieces == [" the", " cat", "s", " sat", "."]


def test_without_a_tokenizer_there_are_no_pieces(tmp_path: Path) -> None:
    assert TokenPieces.load(tmp_path / "tokenizer.json").of([1, 2]) is None
