"""What is not what it seems is told by what it is, and what to do; what is what it seems is not talked about."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from diffship.core.bundle import Bundle
from diffship.core.document import read_json
from diffship.core.errors import DiffshipError
from diffship.core.safetensors_file import read_header
from diffship.core.sniff import classify, describe, missing, near, part_of
from diffship.core.weights import SafetensorsWeights
from diffship.models.sources.diffusers_folder import folder_material
from diffship.models.sources.opening import open_source
from diffship.runtimes.engines.model import open_model
from diffship.sampling.picture import read_pixels

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 134621556\n"
PAGE = b"<!DOCTYPE html><html><head><title>Sign in</title></head></html>"
FILES = {
    "pointer": (POINTER, "it is a Git LFS pointer, which stands for 134621556 bytes that were not fetched"),
    "page": (b"\xef\xbb\xbf\n " + PAGE, "it is a web page"),
    "error of a store": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "a server's error message"),
    "error as JSON": (b'{"error": "Unauthorized"}', 'it is JSON (\'{"error": "Unauthorized"}\')'),
    "words": (b"Not Found\n", "it is text ('Not Found')"),
    "empty": (b"", "it has 0 bytes"),
    "zeros": (bytes(700), "it begins with zeros"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(20), "it is a GGUF file"),
    "pickle": (b"\x80\x02}q\x00." + bytes(9), "it holds a pickle"),
    "zip": (b"PK\x03\x04" + bytes(40), "it is a zip archive"),
}
READERS: dict[str, Callable[[Path], object]] = {
    "weights.safetensors": read_header,
    "config.json": lambda path: read_json(path, 1 << 20),
    "picture.png": read_pixels,
}
TEXTS = ("error as JSON", "words")  # where text is expected, being text is no explanation
CASES = [(name, kind) for name in READERS for kind in FILES if not (name == "config.json" and kind in TEXTS)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_every_reader_tells_what_a_file_is(name: str, kind: str, tmp_path: Path) -> None:
    content, told = FILES[kind]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DiffshipError) as fault:
        READERS[name](path)
    assert str(path) in str(fault.value) and told in str(fault.value)
    path.unlink()
    path.symlink_to("../../blobs/abc")
    with pytest.raises(DiffshipError, match=r"is a link to '\.\./\.\./blobs/abc', where nothing is; a hub cache"):
        READERS[name](path)


def test_what_is_right_is_not_talked_about(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode()
    # the others begin as pickles and as gzip files do
    for length in (len(header), 0x0280, 0x0380, 0x0480, 0x0580, 0x8B1F):
        text = header.ljust(length)
        path = tmp_path / "a.safetensors"
        path.write_bytes(struct.pack("<Q", len(text)) + text + b"x")
        assert set(read_header(path).entries) == {"a"}
        assert set(SafetensorsWeights(path).names()) == {"a"} and classify(path) == "safetensors" and not describe(path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.json").write_text("{")
    assert describe(tmp_path / "folder" / "a.json") == "" and describe(tmp_path / "folder") == ""


FOLDERS = {
    "empty": ((), "it is empty"),
    "a bundle": (("diffship.json", "unet/model.onnx"), "it is a bundle: run, serve"),
    "ONNX": (("config.json", "unet/model.onnx", "unet/config.json"), "it holds ONNX files: compiled already"),
    "Core ML": (("Unet.mlpackage/Manifest.json",), "it holds Core ML packages"),
    "an entry of the cache": (("refs/main", "snapshots/abc/x"), "it is an entry of the hub's cache; pass "),
    "a folder around it": (("model/model_index.json",), "the model lies one folder further down; pass "),
    "a LoRA": (("adapter_config.json", "adapter_model.safetensors"), "it is a LoRA; fuse it into its model"),
    "one checkpoint": (("v1-5.safetensors",), "it holds v1-5.safetensors, a checkpoint in one file"),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_every_opener_tells_what_a_folder_is(kind: str, tmp_path: Path) -> None:
    files, told = FOLDERS[kind]
    folder = tmp_path / "it"
    folder.mkdir()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"{}")
    assert told in describe(folder)
    if kind in ("a bundle", "ONNX"):  # opened as such, or known by its config
        return
    readers: list[Callable[[Path], object]] = [Bundle.open, lambda path: folder_material(path, {})]
    for reader in [*readers, lambda path: open_model(path).__enter__()]:
        with pytest.raises(DiffshipError) as fault:
            reader(folder)
        assert told in str(fault.value) and fault.value.exit_code == 2


ONNX = b"\x08\x0b\x12\x08diffship:" + bytes(40)  # version 11 of its format, and who wrote it


@pytest.mark.parametrize(("name", "whole"), [("diffship.json", "bundle"), ("model_index.json", "model")])
def test_one_part_is_told_whose_it_is(name: str, whole: str, tmp_path: Path) -> None:
    part = tmp_path / "unet"
    part.mkdir()
    for file in (tmp_path / name, part / "config.json"):
        file.write_text("{}")
    told = f"it is one part of the {whole} {tmp_path}; pass that"
    for reader in (Bundle.open, lambda path: open_source(str(path)), lambda path: open_model(path).__enter__()):
        with pytest.raises(DiffshipError, match=re.escape(told)) as fault:
            reader(part)
        assert fault.value.exit_code == 2
    assert part_of(tmp_path) == part_of(tmp_path / "gone") == part_of(part / "config.json") == ""


def test_a_file_in_place_of_a_bundle_is_told_what_it_is(tmp_path: Path) -> None:
    for name, content, told in (
        ("model.onnx", ONNX, "an ONNX model"),
        ("b.zip", b"PK\x03\x04", "a zip archive; unpack"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(
            DiffshipError, match=f"is not a folder; it is {told}.*; a bundle is a folder with diffship.json"
        ):
            Bundle.open(tmp_path / name)


def test_a_snapshot_without_its_blobs(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    for name in ("model_index.json", "unet/config.json"):
        (tmp_path / name).symlink_to("../../blobs/0000")
    with pytest.raises(DiffshipError, match="all 2 of its files are links to places where nothing is; a hub cache was"):
        folder_material(tmp_path, {})


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("out/emojy", "'out/emojy' does not exist; did you mean 'out/emoji'?"),
        ("otu/emoji", "did you mean 'out/emoji'?"),
        ("out/emoji/unnet", "did you mean 'out/emoji/unet'?"),
        ("out/other", "'out/other' does not exist; 'out' has 'emoji'"),
        ("./nothing", "'./nothing' does not exist; '.' has 'link', 'out'"),
        ("no/such/model", "does not exist"),
        ("C:\\models\\sd", "does not exist"),
        ("lora.safetensors", "does not exist"),
        ("link", "'link': it is a link to 'gone', where nothing is"),
        ("out/emoji", ""),
        ("emojy", ""),
        ("owner/name", ""),
        ("stabilityai/sd-turbo", ""),
    ],
)
def test_what_looks_like_a_path_is_told_with_what_is_there(
    text: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "emoji" / "unet").mkdir(parents=True)
    (tmp_path / "link").symlink_to("gone")
    found = missing(text)
    assert (told in found + near(text)) if told else found == ""
