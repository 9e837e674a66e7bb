"""Token ids against transformers' CLIPTokenizer, and abuse of the prompt."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.core.errors import ConfigError, SourceError
from diffship.models.sources.tokenizer_files import clip_files, completed
from diffship.sampling.tokenizer import ClipTokenizer

PROMPTS = [
    "",
    "   ",
    "a red apple",
    "A photo of an astronaut, riding a horse!",
    "it's the dog's 42nd birthday; they'll've gone... (really)",
    "Café naïve, ÄÖÜ ß, e\u0301 decomposed",
    "emoji 😀👩🏽‍🚀 and 日本語 текст עברית",
    "tabs\tand\nnew  lines\u00a0nbsp\u200bzero",
    "a <|endoftext|> b <|startoftext|> c",
    "snake_case kebab-case 3.14159 1,000,000 ***",
    "word " * 74,
    "word " * 75,
    "word " * 76 + "lost tail",
    "!!!!! ????",
]


@pytest.fixture(scope="module", params=[(49408, "<|endoftext|>"), (49408, "!"), (2000, "<|endoftext|>")], ids=str)
def files(request: pytest.FixtureRequest) -> dict[str, bytes]:
    return clip_files(*request.param)


def write(files: dict[str, bytes], folder: Path) -> Path:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def test_ids_equal_transformers(files: dict[str, bytes], tmp_path: Path) -> None:
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(write(files, tmp_path))
    expected = theirs(PROMPTS, padding="max_length", max_length=77, truncation=True).input_ids
    ours = ClipTokenizer.from_folder(tmp_path)(PROMPTS).ids
    for prompt, row, want in zip(PROMPTS, ours.tolist(), expected, strict=True):
        assert row == want, prompt


def test_both_forms_give_equal_ids(files: dict[str, bytes]) -> None:
    fast = ClipTokenizer.from_files({k: v for k, v in files.items() if k not in ("vocab.json", "merges.txt")})
    slow = ClipTokenizer.from_files({k: v for k, v in files.items() if k != "tokenizer.json"})
    assert np.array_equal(fast(PROMPTS).ids, slow(PROMPTS).ids)
    assert slow(PROMPTS).ids.shape == (len(PROMPTS), 77)
    assert slow(PROMPTS).ids.dtype == np.int64


@pytest.mark.slow
def test_known_ids_of_clip() -> None:
    ids = ClipTokenizer.from_files(clip_files())(["a photo of a cat"]).ids[0]
    assert ids[:7].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert set(ids[7:].tolist()) == {49407}
    padded = ClipTokenizer.from_files(clip_files(pad="!"))(["a photo of a cat"]).ids[0]
    assert padded[6] == 49407
    assert set(padded[7:].tolist()) == {0}


def test_what_is_cut_off_is_said() -> None:
    tokenizer = ClipTokenizer.from_files(clip_files(2000))
    assert tokenizer(["word"]).warnings == ()
    (warning,) = tokenizer(["red " * 75 + "lost tail"]).warnings
    assert "75 are used" in warning
    assert "'lost tail'" in warning


@pytest.fixture(scope="module")
def small() -> ClipTokenizer:
    return ClipTokenizer.from_files(clip_files(2000))


ABUSE = {
    "lone surrogates": "\ud800 a \udfff" * 100,
    "right to left and zero width": "\u202eabc\u200b\u200d\ufeff" * 200,
    "4000 emoji halves": "😀" * 2000,
    "only spaces": " " * 2000,
    "combining marks": "e" + "\u0301" * 1999,
    "expands in NFC": "\ufb2c" * 2000,
    "controls": "".join(map(chr, range(32))) * 60,
    "one long word": "x" * 2000,
}


@pytest.mark.parametrize("name", ABUSE)
def test_abuse_is_bounded(small: ClipTokenizer, name: str) -> None:
    seconds = []
    for _ in range(5):  # the machine may be busy: the fastest counts
        began = time.process_time()
        tokens = small([ABUSE[name]])
        seconds.append(time.process_time() - began)
    assert min(seconds) < 0.05
    assert tokens.ids.shape == (1, 77)
    assert tokens.ids.min() >= 0 and tokens.ids.max() < 2000


@pytest.mark.parametrize("prompt", ["x" * 1_000_000, 5, None, b"bytes", ["list"]])
def test_what_is_no_prompt_is_refused_at_once(small: ClipTokenizer, prompt: str) -> None:
    began = time.process_time()
    with pytest.raises(ConfigError, match="prompt"):
        small([prompt])
    assert time.process_time() - began < 0.05


@settings(max_examples=150, deadline=None)
@given(st.text(st.characters(exclude_categories=[]), max_size=2000))
def test_any_text_gives_77_ids(small: ClipTokenizer, prompt: str) -> None:
    ids = small([prompt]).ids[0]
    assert ids.shape == (77,)
    assert ids[0] == 1998
    assert 1999 in ids


def test_broken_files_are_source_errors(tmp_path: Path) -> None:
    files = clip_files(2000)
    broken = [
        {},
        {"vocab.json": files["vocab.json"]},
        {**files, "vocab.json": b"{", "tokenizer.json": b""},
        {**files, "merges.txt": b"one\n"},
        {**files, "merges.txt": b"\xff\xfe"},
        {**files, "special_tokens_map.json": json.dumps({"pad_token": "nowhere"}).encode()},
        {"tokenizer.json": b'{"model": {"type": "Evil"}}'},
        {"tokenizer.json": b"[" * 100_000},
        {**files, "tokenizer_config.json": b"[1]"},
    ]
    for content in broken:
        with pytest.raises(SourceError):
            ClipTokenizer.from_files(content, "folder")
    with pytest.raises(SourceError, match="neither"):
        ClipTokenizer.from_folder(tmp_path)


def with_words(folder: Path, words: list[str]) -> tuple[ClipTokenizer, object]:
    """A tokenizer with added words, here and in transformers."""
    from transformers import CLIPTokenizer

    theirs = CLIPTokenizer.from_pretrained(write(clip_files(1000), folder))
    theirs.add_tokens(words)
    theirs.save_pretrained(folder / "with words")
    return ClipTokenizer.from_folder(folder / "with words"), theirs


@pytest.mark.parametrize("key", ["bos_token", "eos_token"])
@pytest.mark.parametrize("name", ["tokenizer_config.json", "special_tokens_map.json"])
def test_other_marks_around_a_prompt_are_refused(key: str, name: str, tmp_path: Path) -> None:
    """transformers sets them, and the picture of stock is another one."""
    from transformers import CLIPTokenizer

    files = clip_files(2000)
    if name.startswith("tokenizer"):  # special_tokens_map.json would win
        del files["special_tokens_map.json"]
    files[name] = json.dumps({**json.loads(files[name]), key: "!"}).encode()
    ids = CLIPTokenizer.from_pretrained(write(files, tmp_path))("a red apple").input_ids
    assert ids[0 if key == "bos_token" else -1] == 0
    with pytest.raises(SourceError, match=rf"{key} of {name} is '!'; prompts are run with '<"):
        ClipTokenizer.from_folder(tmp_path)
    with pytest.raises(SourceError, match=f"{key} of {name}"):
        completed(files, "tokenizer")


def test_words_of_several_vectors_are_expanded_as_diffusers_does(tmp_path: Path) -> None:
    from diffusers.loaders import TextualInversionLoaderMixin

    words = ["<toy>", "<toy>_1", "<toy>_2", "<one>", "easyneg", "easyneg_1", "far", "far_2"]
    ours, theirs = with_words(tmp_path, words)
    for prompt in (
        *("a <toy> on grass, <toy>", "<one> and <toy>.", "a <toy> <toy>_1 <toy>_2", "easyneg, EasyNeg, blurry"),
        *("far away", "<toy>_2 alone", "no such word", "<TOY>", ""),
    ):
        want = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, theirs)
        assert ours.expanded(prompt) == want, prompt
    assert ours.expanded("a <toy>") == "a <toy> <toy>_1 <toy>_2"


def test_words_that_lie_in_each_other_do_not_grow_without_end(tmp_path: Path) -> None:
    words = [f"a{'_1' * number}" for number in range(20, 0, -1)]
    ours, _ = with_words(tmp_path, words)
    with pytest.raises(ConfigError, match=r"the prompt gets .* characters from the words of textual inversions"):
        ours([" ".join(words)])
