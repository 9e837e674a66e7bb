from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from diffship.models.tokenizer_files import NAMES, clip_files, clip_merges

SENTENCES = [
    "a photo of a cat",
    "Hello, WORLD's  best 123 don't",
    "日本語 emoji 😀👩‍🚀 ｆｕｌｌ width",  # noqa: RUF001
    "é e\u0301 ÄÖ ß İ ǅ",
    "",
    "<|endoftext|> x <|startoftext|>",
    "\t\n a\u00a0b \u200b c",
    "!!! ... 🙂🙂 #hashtag_underscore",
    "עברית العربية ไทย हिन्दी",
    "word" * 40,
]
FORMS = [("vocab.json", "merges.txt", "tokenizer_config.json"), ("tokenizer.json", "tokenizer_config.json")]


@pytest.mark.parametrize("size", [49408, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_all_forms_give_the_ids_of_transformers(size: int, form: tuple[str, ...], tmp_path: Path) -> None:
    files = clip_files(size)
    assert tuple(files) == NAMES
    for name in form:
        (tmp_path / name).write_bytes(files[name])
    stock = CLIPTokenizer.from_pretrained(tmp_path)
    ours = Tokenizer.from_str(files["tokenizer.json"].decode())
    for sentence in SENTENCES:
        assert ours.encode(sentence).ids == stock(sentence)["input_ids"], sentence


def test_known_ids_of_clip() -> None:
    # openai/clip-vit-large-patch14 and Stable Diffusion 1.5
    vocabulary = json.loads(clip_files()["vocab.json"])
    assert len(vocabulary) == 49408 and len(set(vocabulary.values())) == 49408
    known = {"!": 0, "a</w>": 320, "cat</w>": 2368, "photo</w>": 1125, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known
    assert len(clip_merges()) == 48894
    assert clip_merges()[:2] == (("i", "n"), ("t", "h"))


def test_padding_of_the_second_encoder() -> None:
    assert json.loads(clip_files(1000, "!")["special_tokens_map.json"])["pad_token"] == "!"
    assert json.loads(clip_files(1000)["tokenizer_config.json"])["pad_token"] == "<|endoftext|>"
