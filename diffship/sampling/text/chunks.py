"""Pieces of a prompt to chunks of tokens, each as long as a CLIP text encoder reads, as A1111 and compel cut them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.sampling.text.pieces import Piece
from diffship.sampling.tokenizer import ClipTokenizer

_COMMA, _SENTENCE, _PHRASE = ",</w>", (".</w>",), (".</w>", ",</w>", ";</w>", ":</w>")
_BACK = 20  # tokens behind a comma that move to the next chunk together, as A1111's `comma_padding_backtrack` has it


@dataclass
class Chunk:
    """Tokens of text, at most 75, without start and end, and a weight for each."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)

    def add(self, ids: Sequence[int], weight: float) -> None:
        """Put tokens of one weight at the end."""
        self.ids += ids
        self.weights += [weight] * len(ids)

    def cut(self, place: int) -> Chunk:
        """Take away what is behind the first `place` tokens."""
        rest = Chunk(self.ids[place:], self.weights[place:])
        del self.ids[place:], self.weights[place:]
        return rest

    def rows(self, tokenizer: ClipTokenizer) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """(ids int64, weights float32), both (77,): with start, end and padding, whose weights are 1."""
        ids = tokenizer.framed(self.ids)
        weights = [1.0, *self.weights, *[1.0] * (len(ids) - 1 - len(self.weights))]
        return np.array(ids, np.int64), np.array(weights, np.float32)


def a1111_chunks(tokenizer: ClipTokenizer, pieces: Sequence[Piece]) -> list[Chunk]:
    """Chunks as A1111's `tokenize_line` makes them: a comma near the end of a chunk is a good place to cut, and the
    vectors of a textual inversion are not torn apart.

    Raises:
        ConfigError: more chunks than the limit.
    """
    room, comma = tokenizer.length - 2, tokenizer.id_of(_COMMA)
    chunks, last_comma = [Chunk()], -1
    for piece in pieces:
        if piece.ends:
            chunks.append(Chunk())
            last_comma = -1
        for group in _groups(tokenizer, piece.text, room):
            now = chunks[-1]
            if group == (comma,):
                last_comma = len(now.ids)
            elif len(now.ids) == room and 0 <= room - last_comma <= _BACK and last_comma >= 0:
                chunks.append(now.cut(last_comma + 1))
                last_comma = -1
            if len(chunks[-1].ids) + len(group) > room:
                chunks.append(Chunk())
                last_comma = -1
            chunks[-1].add(group, piece.weight)
    return _bounded(chunks if chunks[-1].ids or len(chunks) == 1 else chunks[:-1])


def compel_chunks(tokenizer: ClipTokenizer, pieces: Sequence[Piece]) -> list[Chunk]:
    """Chunks as compel cuts long prompts: behind the last sentence that fits, else the last phrase, else the last word.

    Raises:
        ConfigError: more chunks than the limit.
    """
    room, rest = tokenizer.length - 2, Chunk()
    for piece in pieces:
        for group in tokenizer.groups(piece.text):
            rest.add(group, piece.weight)
    chunks = []
    while len(rest.ids) > room:
        behind = rest.cut(_cut(tokenizer, rest.ids[:room]))
        chunks.append(rest)
        rest = behind
    return _bounded([*chunks, rest])


def _groups(tokenizer: ClipTokenizer, text: str, room: int) -> list[tuple[int, ...]]:
    """Tokens that stay together; of a textual inversion that no chunk holds, each vector by itself."""
    found = list[tuple[int, ...]]()
    for group in tokenizer.groups(text):
        found += [group] if len(group) <= room else [(token,) for token in group]
    return found


def _cut(tokenizer: ClipTokenizer, ids: Sequence[int]) -> int:
    words = [tokenizer.token_of(token) for token in ids]
    for ends in (_SENTENCE, _PHRASE):
        places = [place for place, word in enumerate(words) if word in ends]
        if places:
            return places[-1] + 1
    places = [place for place, word in enumerate(words) if word.endswith("</w>")]
    return places[-1] + 1 if places else len(ids)


def _bounded(chunks: list[Chunk]) -> list[Chunk]:
    if len(chunks) > LIMITS.prompt_chunks:
        raise ConfigError(
            f"the prompt takes {len(chunks)} chunks of 77 tokens; at most {LIMITS.prompt_chunks} are encoded"
        )
    return chunks
