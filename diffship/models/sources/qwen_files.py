"""The files of a small Qwen tokenizer for `arch:` sources, made here; and the check of a folder's chat template.

The small one has Qwen2's splitting, its bytes and special tokens, and a hundred merges of its own; the published
vocabulary has 151,643 byte pairs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from diffship.core.errors import SourceError, UnsupportedError
from diffship.models.sources.tokenizer_files import byte_letters
from diffship.sampling.qwen_tokenizer import AFTER, BEFORE, FILE, PAD, START, STOP
from diffship.sampling.tokenizer import tokenizer_table

TEMPLATE_FILE = "chat_template.jinja"
SPECIALS = (PAD, START, STOP, "<think>", "</think>")
# what Qwen3's own template makes of messages of text, without tools and without thinking
TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}"
    "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}"
    "{%- endif %}"
)
_MARKS = ("<|im_start|>", "<|im_end|>", "assistant", "add_generation_prompt", "enable_thinking", "<think>", "</think>")
_WORDS = ("a the of in on with and red blue fox cat house tree apple photo painting user assistant").split()
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def qwen_files(size: int = 512) -> dict[str, bytes]:
    """{file name: content} of a Qwen tokenizer whose ids are all below `size`.

    Raises:
        ValueError: `size` is below what its pieces need.
    """
    made = _fast()
    if size < made.get_vocab_size():
        raise ValueError(f"{size} ids; this tokenizer has {made.get_vocab_size()}")
    config = {
        "add_prefix_space": False,
        "eos_token": STOP,
        "model_max_length": 131072,
        "pad_token": PAD,
        "padding_side": "right",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    settings = (json.dumps(config, indent=2) + "\n").encode()
    fast = made.to_str(pretty=False).encode()
    return {FILE: fast, "tokenizer_config.json": settings, TEMPLATE_FILE: TEMPLATE.encode()}


def require_template(files: Mapping[str, bytes], where: str) -> None:
    """Raises UnsupportedError if the folder's chat template lacks a mark of Qwen3's, by which prompts are put here.

    A template is a program that comes with the model, and is not run. A folder without one is drawn with Qwen3's.
    """
    template = _template(files, where)
    lacking = [mark for mark in _MARKS if template is not None and mark not in template]
    if lacking:
        raise UnsupportedError(
            f"{where}: its chat template has no {lacking[0]!r}; prompts are put as Qwen3's template puts "
            f"them alone, as {f'{BEFORE}...{AFTER}'!r}"
        )


def _template(files: Mapping[str, bytes], where: str) -> str | None:
    if TEMPLATE_FILE in files:
        return files[TEMPLATE_FILE].decode("utf-8", "replace")
    found = tokenizer_table(files, "tokenizer_config.json").get("chat_template")
    if found is None or isinstance(found, str):
        return found
    raise SourceError(f"{where}: chat_template of tokenizer_config.json is a {type(found).__name__}; legal is a text")


def _fast() -> Tokenizer:
    letters = byte_letters()
    vocabulary = {letter: i for i, letter in enumerate(letters)}
    merges: list[tuple[str, str]] = []
    for word in (f"Ġ{word}" for word in _WORDS):
        made = word[0]
        for letter in word[1:]:
            if made + letter not in vocabulary:
                merges.append((made, letter))
                vocabulary[made + letter] = len(vocabulary)
            made += letter
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=False, fuse_unk=False))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated", invert=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(name, normalized=False, special=name in (PAD, START, STOP)) for name in SPECIALS]
    tokenizer.add_tokens(special)
    tokenizer.add_special_tokens(special[:3])
    return tokenizer
