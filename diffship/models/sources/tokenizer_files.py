"""The files of a CLIP tokenizer, in all three forms that clients read, with equal ids.

vocab.json + merges.txt are what diffusers with transformers 4, the Swift packages and ONNX clients open; tokenizer.json
is the only form that transformers 5 saves. The vocabulary of `arch:` sources is CLIP's own: 256 bytes, 256 bytes with
`</w>`, one token per merge, and the two specials (Radford et al. 2021, `simple_tokenizer.py`).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files as package_files
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, processors

from diffship.core.errors import SourceError
from diffship.sampling.tokenizer import (
    END,
    FILES,
    START,
    Added,
    add_tokens,
    added_tokens,
    byte_pairs,
    pad_token,
    require_marks,
)

CONTEXT = 77
NAMES = FILES

Merges = Sequence[tuple[str, str]]


def clip_files(size: int = 49408, pad: str = END) -> dict[str, bytes]:
    """{file name: content} of CLIP's tokenizer, cut to its first merges if `size` is below 49,408 ids."""
    return {**_clip_vocabulary(size), **_settings(pad, CONTEXT)}


@cache
def clip_merges() -> tuple[tuple[str, str], ...]:
    """CLIP's 48,894 merges in rank order."""
    packed = package_files("diffship.models").joinpath("data/clip_merges.txt.gz").read_bytes()
    return tuple(parse_merges(gzip.decompress(packed).decode()))


def vocabulary_of(merges: Merges) -> dict[str, int]:
    """Token -> id in CLIP's order: bytes, bytes with `</w>`, merges, the two specials."""
    letters = byte_letters()
    tokens = [*letters, *(letter + "</w>" for letter in letters), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(dict.fromkeys(tokens))}


def tokenizer_files(
    vocabulary: Mapping[str, int],
    merges: Merges,
    pad: str = END,
    context: int = CONTEXT,
    added: Sequence[Added] = (),
) -> dict[str, bytes]:
    """All files of one tokenizer; `pad` is `!` in the second encoder of SDXL and in SD 2, END elsewhere."""
    return {**_vocabulary_files(vocabulary, merges, added), **_settings(pad, context)}


def completed(found: Mapping[str, bytes], where: str) -> dict[str, bytes]:
    """`found` with the forms it lacks, derived from those it has.

    Raises:
        SourceError: neither tokenizer.json nor vocab.json + merges.txt is there, or they do not parse, or they are
            not a CLIP byte-pair vocabulary.
    """
    if "tokenizer.json" not in found and not {"vocab.json", "merges.txt"} <= set(found):
        has = ", ".join(found) or "none of these"
        raise SourceError(f"{where}: has no tokenizer.json, nor vocab.json with merges.txt; it has {has}")
    try:
        require_marks(found, where)
        vocabulary, merges = _read(found)
        derived = tokenizer_files(vocabulary, merges, pad_token(found), added=added_tokens(found))
    except SourceError:
        raise
    except Exception as fault:  # tokenizers raises bare Exception, and json RecursionError
        raise SourceError(
            f"{where}: not a CLIP tokenizer ({str(fault)[:200]}); vocab.json + merges.txt or tokenizer.json are read"
        ) from None
    return {**derived, **found}


def with_added(files: Mapping[str, bytes], more: Sequence[Added]) -> dict[str, bytes]:
    """All files of the tokenizer of `files` with more tokens.

    Raises:
        SourceError: their ids are not the next free ones.
    """
    vocabulary, merges = _read(files)
    return tokenizer_files(vocabulary, merges, pad_token(files), added=(*added_tokens(files), *more))


def vocabulary_in(files: Mapping[str, bytes]) -> dict[str, int]:
    """{token: id} of CLIP's vocabulary in these files, without added tokens."""
    return _read(files)[0]


def parse_merges(text: str) -> list[tuple[str, str]]:
    """Pairs of a merges.txt, header line and blank lines left out; ValueError for any other line."""
    pairs = []
    for line in text.split("\n"):
        if line.strip() and not line.startswith("#version"):
            first, second = line.rstrip("\r").split(" ")
            pairs.append((first, second))
    return pairs


def classic_files(vocabulary: Mapping[str, int], merges: Merges) -> dict[str, bytes]:
    """vocab.json and merges.txt."""
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    return {
        "vocab.json": json.dumps(dict(vocabulary), ensure_ascii=False).encode(),
        "merges.txt": ("\n".join(lines) + "\n").encode(),
    }


def fast_tokenizer(vocabulary: Mapping[str, int], merges: Merges, added: Sequence[Added] = ()) -> Tokenizer:
    """The `tokenizers` object that gives the ids of transformers' CLIPTokenizer."""
    tokenizer = byte_pairs(vocabulary, merges)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(START, normalized=True), AddedToken(END, normalized=False)])
    add_tokens(tokenizer, added)
    tokenizer.post_processor = processors.RobertaProcessing(
        (END, vocabulary[END]), (START, vocabulary[START]), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


@cache
def _clip_vocabulary(size: int) -> dict[str, bytes]:
    merges = clip_merges()[: size - 514]
    return _vocabulary_files(vocabulary_of(merges), merges)


def _vocabulary_files(vocabulary: Mapping[str, int], merges: Merges, added: Sequence[Added] = ()) -> dict[str, bytes]:
    fast = fast_tokenizer(vocabulary, merges, added).to_str(pretty=False).encode()
    made = {**classic_files(vocabulary, merges), "tokenizer.json": fast}
    return {**made, "added_tokens.json": _dump({token.content: token.id for token in added})} if added else made


def _settings(pad: str, context: int) -> dict[str, bytes]:
    specials = {"bos_token": START, "eos_token": END, "pad_token": pad, "unk_token": END}
    return {"tokenizer_config.json": _dump(_config(pad, context)), "special_tokens_map.json": _dump(specials)}


def _read(found: Mapping[str, bytes]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    if "vocab.json" in found and "merges.txt" in found:
        vocabulary: dict[str, int] = json.loads(found["vocab.json"])
        return vocabulary, parse_merges(found["merges.txt"].decode())
    document = json.loads(found["tokenizer.json"])
    vocabulary = dict(document["model"]["vocab"])
    own = {token["content"]: token["id"] for token in document.get("added_tokens", [])}
    vocabulary.update({content: number for content, number in own.items() if content in (START, END)})
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in document["model"]["merges"]]
    return vocabulary, [(a, b) for a, b in pairs]


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes, in CLIP's (GPT-2's) order: printable bytes first, then the others."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]


def _config(pad: str, context: int) -> dict[str, Any]:
    return {
        "add_prefix_space": False,
        "bos_token": _added(START),
        "do_lower_case": True,
        "eos_token": _added(END),
        "errors": "replace",
        "model_max_length": context,
        "pad_token": pad,
        "tokenizer_class": "CLIPTokenizer",
        "unk_token": _added(END),
    }


def _added(content: str) -> dict[str, Any]:
    return {
        "__type": "AddedToken",
        "content": content,
        "lstrip": False,
        "normalized": True,
        "rstrip": False,
        "single_word": False,
    }


def _dump(data: Mapping[str, Any]) -> bytes:
    return (json.dumps(data, indent=2, ensure_ascii=False) + "\n").encode()
