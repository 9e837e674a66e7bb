"""Train a CLIP-format byte-level BPE vocabulary on captions (the format of `vocab.json` + `merges.txt`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from diffship.models.sources.tokenizer_files import byte_letters, classic_files, vocabulary_of

# CLIP's own split: contractions, words, single digits, runs of anything else.
SPLIT = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def train_vocabulary(captions: Iterable[str], size: int, folder: Path) -> int:
    """Write `vocab.json` and `merges.txt`, ids in CLIP's order: bytes, bytes + `</w>`, merges, the two specials.

    Returns the number of ids.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=byte_letters(),
        end_of_word_suffix="</w>",
        show_progress=False,
        min_frequency=2,
    )
    tokenizer.train_from_iterator(captions, trainer)
    merges = _merges(tokenizer)
    vocabulary = vocabulary_of(merges)
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in classic_files(vocabulary, merges).items():
        (folder / name).write_bytes(content)
    return len(vocabulary)


def _merges(tokenizer: Tokenizer) -> list[tuple[str, str]]:
    pairs = json.loads(tokenizer.to_str())["model"]["merges"]
    return [tuple(pair) if isinstance(pair, list) else tuple(pair.split(" ")) for pair in pairs]
