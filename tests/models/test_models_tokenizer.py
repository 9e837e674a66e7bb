from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import CLIPTokenizer

from diffship.core.errors import SourceError
from diffship.models.sources.tokenizer_files import NAMES, clip_files, clip_merges, completed
from diffship.sampling.tokenizer import END, ClipTokenizer

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
    assert tuple(files) == tuple(name for name in NAMES if name not in ("added_tokens.json", "chat_template.jinja"))
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


PROMPTS = ["a cat", "hello! world!!", "a <cat-toy> on a <Cat-Toy> table", "<cat-toy>", ""]
TOY = {"content": "<cat-toy>", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def settings_of(files: dict[str, bytes], name: str, **changes: object) -> bytes:
    """The JSON of a file with these keys changed; None takes one out."""
    table = {**json.loads(files[name]), **changes}
    return json.dumps({key: value for key, value in table.items() if value is not None}).encode()


def with_settings(config: dict[str, object], special: dict[str, object], **others: bytes) -> dict[str, bytes]:
    files = {name: data for name, data in clip_files().items() if name != "tokenizer.json"}
    made = {
        "tokenizer_config.json": settings_of(files, "tokenizer_config.json", **config),
        "special_tokens_map.json": settings_of(files, "special_tokens_map.json", **special),
    }
    return {**files, **made, **{name.replace("_json", ".json"): data for name, data in others.items()}}


CASES = {
    # Stable Diffusion 2's own files differ in the padding
    "SD 2": with_settings({"pad_token": END}, {"pad_token": "!"}),
    "SD 2, config without padding": with_settings({"pad_token": None}, {"pad_token": "!"}),
    "config that lists added tokens": with_settings(
        {"pad_token": END, "added_tokens_decoder": {"49407": {**TOY, "content": END, "special": True}}},
        {"pad_token": "!"},
    ),
    "added_tokens.json": with_settings({}, {}, added_tokens_json=b'{"<cat-toy>": 49408}'),
    "added_tokens_decoder": with_settings({"added_tokens_decoder": {"49408": {**TOY, "special": False}}}, {}),
    "special": with_settings({"added_tokens_decoder": {"49408": {**TOY, "normalized": False, "special": True}}}, {}),
}


def ids(tokenizer: CLIPTokenizer, prompt: str) -> list[int]:
    return list(tokenizer(prompt, padding="max_length", max_length=77, truncation=True).input_ids)


def put(files: dict[str, bytes], folder: Path) -> Path:
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_padding_and_added_tokens_are_read_as_transformers_reads_them(case: str, tmp_path: Path) -> None:
    """The files as they are, completed here, and what transformers 5 makes of them (tokenizer.json alone)."""
    theirs = CLIPTokenizer.from_pretrained(put(CASES[case], tmp_path / "source"))
    theirs.save_pretrained(tmp_path / "saved")
    found = {name: (tmp_path / "saved" / name).read_bytes() for name in NAMES if (tmp_path / "saved" / name).is_file()}
    assert "vocab.json" not in found
    whole = completed(CASES[case], "test")
    written = CLIPTokenizer.from_pretrained(put(whole, tmp_path / "completed"))
    expected = [ids(theirs, prompt) for prompt in PROMPTS]
    for files in (CASES[case], whole, completed(found, "test")):
        assert ClipTokenizer.from_files(files)(PROMPTS).ids.tolist() == expected
    assert [ids(written, prompt) for prompt in PROMPTS] == expected
    if case.startswith("SD 2"):
        assert ids(theirs, "a cat")[4:] == [0] * 73
    if "added" in case and "lists" not in case:
        assert 49408 in ids(theirs, "<cat-toy>")


@pytest.mark.slow
def test_what_cannot_be_held_is_refused() -> None:
    for added, message in (
        (b'{"<cat-toy>": 50000}', "has id 50000; here it gets 49408"),
        (b'{"<a>": 49408, "<b>": 49408}', "one id to several"),
        (b"[]", "is no JSON object"),
    ):
        with pytest.raises(SourceError, match=message):
            ClipTokenizer.from_files(with_settings({}, {}, added_tokens_json=added))
    with pytest.raises(SourceError, match="prompts of 248 tokens"):
        ClipTokenizer.from_files(with_settings({"model_max_length": 248}, {}))
    ClipTokenizer.from_files(with_settings({"model_max_length": 10**30}, {}))
