"""Token ids as the pieces of text a reader sees, with the tokenizer that lies beside the merged weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

_BROKEN = "\ufffd"
"""What decoding gives for a part of a character."""


class Pieces:
    """Cuts a response into the text of its tokens; each id is decoded once."""

    def __init__(self, tokenizer: Any | None) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        self._anchor = 0
        self._before = ""
        if tokenizer is not None:
            # A first token may lose its leading space when it is decoded alone: decode it after another one.
            self._anchor = next(
                (token for token in range(min(tokenizer.get_vocab_size(), 512)) if self._plain(token)), 0
            )
            self._before = self._decode([self._anchor])

    @classmethod
    def load(cls, file: Path) -> Pieces:
        """From a `tokenizer.json`; without one every answer is None."""
        if not file.is_file():
            return cls(None)
        from tokenizers import Tokenizer

        return cls(Tokenizer.from_file(str(file)))

    def of(self, ids: Sequence[int]) -> list[str] | None:
        """One piece a token; of a character that spans several tokens, the last one has it, the others ''."""
        if self._tokenizer is None:
            return None
        pieces = [self._piece(token) for token in ids]
        if not any(_BROKEN in piece for piece in pieces):
            return pieces
        return self._join_characters(ids)

    def _piece(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = self._decode([self._anchor, token])[len(self._before) :]
        return self._known[token]

    def _join_characters(self, ids: Sequence[int]) -> list[str]:
        pieces, start = [], 0
        for end in range(1, len(ids) + 1):
            text = self._decode([self._anchor, *ids[start:end]])[len(self._before) :]
            if text.endswith(_BROKEN) and end < len(ids) and end - start < 4:
                pieces.append("")
            else:
                pieces.append(text)
                start = end
        return pieces

    def _decode(self, ids: list[int]) -> str:
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)  # type: ignore[union-attr]
        return text

    def _plain(self, token: int) -> bool:
        text = self._decode([token])
        return text.isascii() and text.isalnum()
