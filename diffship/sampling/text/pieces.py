"""Pieces of a prompt: text with a weight, and breaks between chunks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS


@dataclass(frozen=True)
class Piece:
    """Text with one weight. `ends`: a break, behind which a new chunk begins; it has no text."""

    text: str
    weight: float = 1.0
    ends: bool = False


BREAK = Piece("", ends=True)


def bounded_pieces(pieces: Iterable[Piece]) -> list[Piece]:
    """The pieces as a list.

    Raises:
        ConfigError: a weight is beyond the limit, which brackets in brackets can reach.
    """
    made = list(pieces)
    most = LIMITS.prompt_weight
    for piece in made:
        if not abs(piece.weight) <= most:
            raise ConfigError(
                f"the prompt gives {piece.text[:40]!r} the weight {piece.weight:g}; legal is from {-most:g} to {most:g}"
            )
    return made
