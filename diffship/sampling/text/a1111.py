r"""Prompt weights as AUTOMATIC1111's web UI reads them: (word), (word:1.3), [word], BREAK, and \( for a bracket.

The rules are those of its `parse_prompt_attention`. Two things are other than there: BREAK inside brackets is a break,
where the web UI takes it for a word, and prompt editing is refused, since a model here has one conditioning for all
steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from diffship.core.errors import ConfigError
from diffship.sampling.text.pieces import BREAK, Piece, bounded_pieces

ROUND, SQUARE = 1.1, 1 / 1.1
_TOKENS = re.compile(r"\\[()\[\]\\]?|:\s*([+-]?[.\d]+)\s*\)|[()\[\]:]|[^\\()\[\]:]+")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_NETWORK = re.compile(r"<(lora|lyco|hypernet):([^>]*)>")
_EDITED = re.compile(r":\s*[\d.]+\s*\Z|\|")  # at the end of what square brackets hold, or anywhere in it
_AND = re.compile(r"\bAND\b")
_LONGEST = 60


def parse(text: str) -> list[Piece]:
    """The pieces of a prompt; neighbours of one weight are one piece.

    Raises:
        ConfigError: a weight that is no number or beyond the limit, or what is not built: prompt editing
            `[cat:dog:0.5]`, alternation `[cat|dog]`, `AND`, `<lora:...>` in the text.
    """
    _refuse_unbuilt(text)
    pieces, rounds, squares, opened = list[Piece](), list[int](), list[int](), list[int]()
    for match in _TOKENS.finditer(text):
        token, weight = match.group(), match.group(1)
        if token == "(":
            rounds.append(len(pieces))
        elif token == "[":
            squares.append(len(pieces))
            opened.append(match.end())
        elif weight is not None and rounds:
            _multiply(pieces, rounds.pop(), _number(weight))
        elif token == ")" and rounds:
            _multiply(pieces, rounds.pop(), ROUND)
        elif token == "]" and squares:
            _refuse_editing(text[opened.pop() : match.start()])
            _multiply(pieces, squares.pop(), SQUARE)
        else:
            pieces += _texts(token)
    for places, factor in ((rounds, ROUND), (squares, SQUARE)):
        for place in places:  # a bracket that nothing closes counts to the end
            _multiply(pieces, place, factor)
    return bounded_pieces(_joined(pieces or [Piece("")]))


def networks(text: str) -> tuple[str, list[str]]:
    """(the text without `<lora:...>` and its like, those that were taken out)."""
    return _NETWORK.sub("", text), [found.group() for found in _NETWORK.finditer(text)]


def _texts(token: str) -> Iterator[Piece]:
    """The text of one token, with breaks where it says BREAK."""
    if token.startswith("\\"):
        yield Piece(token[1:])
        return
    for place, part in enumerate(_BREAK.split(token)):
        if place:
            yield BREAK
        yield Piece(part)


def _multiply(pieces: list[Piece], start: int, factor: float) -> None:
    for place in range(start, len(pieces)):
        if not pieces[place].ends:
            pieces[place] = Piece(pieces[place].text, pieces[place].weight * factor)


def _joined(pieces: list[Piece]) -> list[Piece]:
    made = pieces[:1]
    for piece in pieces[1:]:
        last = made[-1]
        if piece.weight == last.weight and not piece.ends and not last.ends:
            made[-1] = Piece(last.text + piece.text, last.weight)
        else:
            made.append(piece)
    return made


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"the prompt has the weight {text[:20]!r}, which is no number; write (word:1.3)") from None


def _refuse_unbuilt(text: str) -> None:
    found = _NETWORK.search(text)
    if found:
        raise ConfigError(
            f"the prompt holds {_short(found)}: a LoRA is a flag here and no text. Take it out and pass "
            "--lora FILE:0.8 (an engine that cannot: diffship compress SOURCE --pass lora)"
        )
    found = _AND.search(text)
    if found:
        raise ConfigError(
            "the prompt holds AND: composing several prompts is not built. Write and in small letters, or BREAK "
            "between chunks"
        )


def _refuse_editing(inside: str) -> None:
    """Raises ConfigError if what stands in square brackets is prompt editing or an alternation."""
    if _EDITED.search(inside):
        raise ConfigError(
            f"the prompt holds {f'[{inside}]'[:_LONGEST]!r}: prompts that change between steps are not built. Write "
            r"one of its texts, or \[ and \] for the brackets themselves"
        )


def _short(found: re.Match[str]) -> str:
    return repr(found.group()[:_LONGEST])
