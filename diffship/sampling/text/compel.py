r"""Prompt weights as the compel library reads them (github.com/damian0815/compel): word+, word--, (some words)1.3.

What it reads further (`.and()`, `.blend()`, `.swap()`, `withLora()`) is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from diffship.core.errors import ConfigError
from diffship.sampling.text.pieces import Piece, bounded_pieces

PLUS, MINUS = 1.1, 0.9
_DEEPEST = 40  # brackets in brackets
_UNBUILT = re.compile(r"\.(?:and|add|blend|swap|attend)\s*\(|\b(?:use|with)Lora\s*\(")
_SPACES = re.compile(r"\s*")
_ESCAPES = r"\\[()\",.+\-=]"
# a sign belongs to a word if more of the word follows it
_WORD = re.compile(rf'(?:{_ESCAPES}|[+-](?=[^\s()",.+\-=])|-?[0-9]+|[^\s()",.+\-=])+')
_SIGNS = re.compile(r"\++|-+")
_WEIGHT = re.compile(r"\++|-+|[+-]?(?:\d+\.\d*|\.\d+)|\d+")
_QUOTED = re.compile(r'"((?:\\"|[^"\n])*)"')
_FREE = re.compile(r"\S+")
_UNESCAPED = re.compile(r'\\+([()"])')  # as often as it is escaped

Found = tuple[list[Piece], int]


def parse(text: str) -> list[Piece]:
    """The pieces of a prompt; neighbours of one weight are one piece, with a space between them.

    Raises:
        ConfigError: a weight beyond the limit, brackets in brackets too deep, or an operator that is not built.
    """
    found = _UNBUILT.search(text)
    if found:
        raise ConfigError(
            f"the prompt holds {found.group()!r}: of compel's operators, weights alone are built: word+, word-, "
            "(some words)1.3. A LoRA is a flag: --lora FILE:0.8"
        )
    spaced = re.sub(r",(\S)", r", \1", text)
    return bounded_pieces(_joined(_Text(spaced).prompt()) or [Piece("")])


@dataclass
class _Text:
    """A text that is read from left to right. Each method takes a place and gives the pieces found and the place
    behind them, or None; what was tried at a place is remembered, so that nested brackets are read once."""

    text: str
    _known: dict[tuple[int, int], Found | None] = field(default_factory=dict)

    def prompt(self) -> list[Piece]:
        """The whole text. What is no syntax is a word, unbalanced brackets included."""
        pieces, place = list[Piece](), self._behind_spaces(0)
        while place < len(self.text):
            found = self._weighted(place, 0) or self._group(place, 0)
            if found is None:
                word = _FREE.match(self.text, place)
                assert word is not None, "there are no spaces here"
                found = [_plain(word.group())], word.end()
            pieces += found[0]
            place = self._behind_spaces(found[1])
        return pieces

    def fragment(self, place: int, depth: int) -> Found:
        """As much as brackets and quotes may hold, from `place` on."""
        pieces = list[Piece]()
        while True:
            place = self._behind_spaces(place)
            found = self._weighted(place, depth) or self._group(place, depth) or self._word(place)
            if found is None and self.text[place : place + 1] in (",", "."):
                found = [Piece(self.text[place])], place + 1
            if found is None:
                return pieces, place
            pieces += found[0]
            place = found[1]

    def _weighted(self, place: int, depth: int) -> Found | None:
        """A group with a weight right behind it, or a word with signs."""
        for target, form in ((self._group(place, depth), _WEIGHT), (self._word(place), _SIGNS)):
            sign = None if target is None else form.match(self.text, target[1])
            if target is not None and sign is not None:
                factor = _factor(sign.group())
                return [Piece(piece.text, piece.weight * factor) for piece in target[0]], sign.end()
        return None

    def _group(self, place: int, depth: int) -> Found | None:
        """A fragment in brackets or in quotes."""
        if self.text[place : place + 1] not in ("(", '"'):
            return None
        if depth >= _DEEPEST:
            raise ConfigError(f"the prompt has brackets in brackets, more than {_DEEPEST} deep")
        if (place, depth) not in self._known:
            self._known[place, depth] = (
                self._bracketed(place, depth) if self.text[place] == "(" else self._quoted(place, depth)
            )
        return self._known[place, depth]

    def _bracketed(self, place: int, depth: int) -> Found | None:
        pieces, end = self.fragment(place + 1, depth + 1)
        return (pieces, end + 1) if self.text[end : end + 1] == ")" else None

    def _quoted(self, place: int, depth: int) -> Found | None:
        match = _QUOTED.match(self.text, place)
        if match is None:
            return None
        inner = _Text(match.group(1).replace('\\"', '"').replace('"', '\\"'))
        pieces, end = inner.fragment(0, depth + 1)
        return (pieces, match.end()) if not inner.text[end:].strip() else None

    def _word(self, place: int) -> Found | None:
        match = _WORD.match(self.text, place)
        return None if match is None else ([_plain(match.group())], match.end())

    def _behind_spaces(self, place: int) -> int:
        match = _SPACES.match(self.text, place)
        return place if match is None else match.end()


def _factor(sign: str) -> float:
    if set(sign) <= {"+"}:
        return PLUS ** len(sign)
    return MINUS ** len(sign) if set(sign) <= {"-"} else float(sign)


def _plain(text: str) -> Piece:
    return Piece(_UNESCAPED.sub(r"\1", text))


def _joined(pieces: list[Piece]) -> list[Piece]:
    made = pieces[:1]
    for piece in pieces[1:]:
        if piece.weight == made[-1].weight:
            made[-1] = Piece(f"{made[-1].text} {piece.text}", piece.weight)
        else:
            made.append(piece)
    return made
