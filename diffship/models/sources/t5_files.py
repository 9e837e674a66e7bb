"""The files of a small T5 tokenizer for `arch:` sources, made here: unigrams of letters and some words, no download.

Its parts are those of the published one (specials at 0 to 2, `▁` for a space, sentinels last); its vocabulary is not.
"""

from __future__ import annotations

import json
from functools import cache

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from diffship.sampling.t5_tokenizer import END, FILE, PAD, UNKNOWN

SPACE, SENTINELS = "▁", 100
# pieces of prompts, by falling frequency; longer ones than a letter, so that a prompt is not spelt
_WORDS = (
    *("a", "the", "of", "in", "on", "with", "and", "red", "blue", "green", "black", "white", "small", "big", "cat"),
    *("dog", "fox", "house", "tree", "heart", "ribbon", "apple", "picture", "painting", "photo", "city", "sea"),
)
_ENDINGS = ("s", "ed", "ing", "er", "ly", "th", "st", "ea", "an", "on", "en", "in", "or", "ou", "al", "re")
_LETTER, _PIECE, _WORD = -9.0, -6.0, -4.0  # logarithms of frequencies


@cache
def t5_files(size: int = 512) -> dict[str, bytes]:
    """{file name: content} of a T5 tokenizer whose ids are all below `size`.

    Raises:
        ValueError: `size` is below what its pieces need.
    """
    vocabulary = _vocabulary()
    if size < len(vocabulary):
        raise ValueError(f"{size} ids; this tokenizer has {len(vocabulary)}")
    return {FILE: _fast(vocabulary).to_str(pretty=False).encode(), "tokenizer_config.json": _settings()}


def _vocabulary() -> list[tuple[str, float]]:
    """Pieces with their scores, by id."""
    letters = [chr(code) for code in range(33, 127)]
    scored = [(SPACE, -2.0), *((SPACE + word, _WORD - i / 8) for i, word in enumerate(_WORDS))]
    scored += [(ending, _PIECE) for ending in _ENDINGS] + [(letter, _LETTER) for letter in letters]
    sentinels = [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]
    return [(PAD, 0.0), (END, 0.0), (UNKNOWN, 0.0), *dict(scored).items(), *sentinels]


def _fast(vocabulary: list[tuple[str, float]]) -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=2, byte_fallback=False))
    spaces = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), spaces])
    tokenizer.decoder = decoders.Metaspace(replacement=SPACE, prepend_scheme="always", split=True)
    names = [name for name, _ in vocabulary]
    specials = [name for name in names if name in (PAD, END, UNKNOWN) or name.startswith("<extra_id_")]
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["$A", END], pair=["$A", END, "$B", END], special_tokens=[(END, names.index(END))]
    )
    return tokenizer


def _settings() -> bytes:
    config = {
        "eos_token": END,
        "extra_ids": SENTINELS,
        "model_max_length": 512,
        "pad_token": PAD,
        "tokenizer_class": "T5Tokenizer",
        "unk_token": UNKNOWN,
    }
    return (json.dumps(config, indent=2) + "\n").encode()
