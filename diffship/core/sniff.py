"""What a path holds, from its name and first bytes: a folder, weights, a form that is never read, or not what it seems.

`describe` is for the error of whoever could not read something: what it is instead, and what to do.
"""

from __future__ import annotations

import difflib
import os
import re
import stat
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Literal

from diffship.core.errors import SourceError

Kind = Literal["folder", "safetensors", "pickle", "archive", "unknown"]
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".npy", ".npz", ".joblib")
ARCHIVE_SUFFIXES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".nemo", ".mar")
CONVERT = (
    "Look for a .safetensors file of the same model. Or, on a machine where you trust the file, load it and "
    "save_pretrained(DIR, safe_serialization=True) with diffusers, or use "
    "https://huggingface.co/spaces/safetensors/convert"
)
_ARCHIVES = {
    b"PK\x03\x04": "a zip archive",
    b"PK\x05\x06": "a zip archive",
    b"\x1f\x8b": "a gzip archive",
    b"BZh": "a bzip2 archive",
    b"\xfd7zXZ\x00": "an xz archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a rar archive",
}
_FORMATS = {
    b"GGUF": "a GGUF file: a model in one file, which export, compress, inspect and run take as NAME.gguf",
    b"\x89HDF": "an HDF5 file of Keras or TensorFlow; get the safetensors of the model",
    b"\x89PNG": "a picture (PNG)",
    b"\xff\xd8\xff": "a picture (JPEG)",
    b"GIF8": "a picture (GIF)",
    b"RIFF": "a WebP picture, or sound or video",
    b"%PDF": "a PDF document",
    b"ptrt": "a TensorRT engine",
}
# the version of its format, whichever, then the name of the program that wrote it
_ONNX = re.compile(rb"\x08[\x03-\x1f]\x12[\x02-\x7f][ -~]{2}")
_COMPILED = {
    ".onnx": "ONNX files",
    ".plan": "TensorRT engines",
    ".engine": "TensorRT engines",
    "openvino_model.xml": "OpenVINO files",
    ".mlpackage": "Core ML packages",
    ".mlmodelc": "Core ML packages",
}
_UNFINISHED = (".incomplete", ".part", ".crdownload", ".aria2", ".tmp")
_TEXTS = (".json", ".jsonl", ".toml", ".txt", ".md", ".csv", ".yaml", ".yml", ".py")
_BLOBS = "a hub cache was copied without its blobs, or a link was moved: copy it with cp -rL, or download it again"
_ROOTED = re.compile(r"[./~\\]|[A-Za-z]:|.*\\")
_ENDINGS = ("/", ".safetensors", ".ckpt", ".json", ".toml", ".onnx", ".zip", *PICKLE_SUFFIXES)
_HEAD = 512
_ENTRIES = 2000


def classify(path: str | Path) -> Kind:
    """The kind of thing at `path`, without unpacking or executing any of it; links are followed, FIFOs never opened."""
    path = Path(path)
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError):
        return "unknown"
    if stat.S_ISDIR(mode):
        return "folder"
    if not stat.S_ISREG(mode):
        return "unknown"
    head = _head(path)
    if path.suffix.lower() in PICKLE_SUFFIXES or _is_pickle(head):
        return "pickle"
    if path.suffix.lower() in ARCHIVE_SUFFIXES or _archive(head):
        return "archive"
    return "safetensors" if path.suffix.lower() == ".safetensors" else "unknown"


def classify_head(path: str | Path) -> Kind:
    """The kind that the first bytes of a regular file tell, whatever its name."""
    head = _head(Path(path))
    return "pickle" if _is_pickle(head) else "archive" if _archive(head) else "unknown"


def refuse_unsafe(path: str | Path) -> None:
    """Raises SourceError if `path` is a pickle, numpy or archive file: such input is never opened here."""
    kind = classify(path)
    if kind == "pickle":
        raise SourceError(
            f"{path}: pickle and numpy files can run code when they are read, so they never are. {CONVERT}"
        )
    if kind == "archive":
        raise SourceError(f"{path}: archives are not read. Unpack it yourself, look at it, and pass the folder")


def describe(path: str | Path, text: bool = False) -> str:
    """`""`, or what a file or folder is that could not be read as asked, with the way out: `it is ...; do ...`.

    Nothing is unpacked or executed, and of a file only the first bytes are read. `text` says that JSON or other text
    was expected, so that being text explains nothing.
    """
    path = Path(path)
    try:
        if path.is_symlink() and not path.exists():
            return f"it is a link to {os.readlink(path)[:200]!a}, where nothing is; {_BLOBS}"
        if path.is_dir():
            return _describe_folder(path)
        if not path.is_file():
            return ""
        size = path.stat().st_size
        return _describe_file(path.name, size, _head(path), text)
    except (OSError, ValueError):
        return ""


def foreign(path: str | Path, reason: str, text: bool = False) -> str:
    """What `describe` says of a path, or else `reason`; if nothing is there, with what has a similar name."""
    return describe(path, text) or (reason if os.path.lexists(path) else f"{reason}{near(str(path))}")


def also(path: str | Path) -> str:
    """What `describe` says of a path, or, if nothing is there, what has a similar name: `; it is ...`, to end a
    message."""
    told = describe(path)
    return f"; {told}" if told else "" if os.path.lexists(path) else near(str(path))


def missing(text: str) -> str:
    """A message if `text` looks like a path and nothing is there; `""` otherwise. `near` says what is there instead.

    A path begins with a dot, `~`, slash or drive, has a backslash or two slashes, ends as a file does, or begins with
    the name of a folder that is here (up to a letter or two). Anything else, `NAME` and `OWNER/NAME`, may exist
    elsewhere.
    """
    path = os.path.expanduser(text)
    if os.path.exists(path):
        return ""
    if os.path.islink(path):
        return f"{text[:200]!r}: {describe(path)}"
    rooted = _ROOTED.match(text) or text.count("/") > 1 or text.lower().endswith(_ENDINGS)
    owned = "/" in text and (os.path.isdir(text.partition("/")[0]) or _meant(Path(path)))
    return f"{text[:200]!r} does not exist" if rooted or owned else ""


def near(text: str) -> str:
    """What a path that leads nowhere may mean: `; did you mean 'out/emoji'?`, or what its folder has; or `""`."""
    path = Path(text).expanduser()
    meant = _meant(path)
    if meant:
        return f"; did you mean {meant!r}?"
    folder, wrong, _ = _break_of(path)
    names = _close(wrong, folder) or _names(folder)[:6]
    return f"; {str(folder)!r} has {', '.join(f'{name[:80]!a}' for name in names)}" if names else ""


def _meant(path: Path) -> str:
    """The path with its first wrong name mended, if that leads somewhere."""
    folder, wrong, rest = _break_of(path)
    return next(
        (str(folder / name / rest) for name in _close(wrong, folder) if os.path.exists(folder / name / rest)), ""
    )


def _break_of(path: Path) -> tuple[Path, str, Path]:
    """The last folder that is there, the first name that is not in it, and what would follow."""
    folder = next((above for above in path.parents if os.path.isdir(above)), Path("."))
    parts = path.relative_to(folder).parts if path.is_relative_to(folder) else path.parts
    return folder, (parts or ("",))[0], Path(*parts[1:])


def part_of(path: str | Path) -> str:
    """`""`, or, for the folder of one part (`out/emoji/unet`), whose part it is, for whoever asked for the whole."""
    folder = Path(os.path.abspath(path))
    for name, whole in (("diffship.json", "bundle"), ("model_index.json", "model")):
        if folder.is_dir() and (folder.parent / name).is_file() and not (folder / name).exists():
            return f"it is one part of the {whole} {folder.parent}; pass that"
    return ""


def _close(wrong: str, folder: Path) -> list[str]:
    names = {name.lower(): name for name in _names(folder)}
    return [names[name] for name in difflib.get_close_matches(wrong.lower(), names, 3)]


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in islice(entries, _ENTRIES) if not entry.name.startswith("."))
    except OSError:
        return []


def _describe_file(name: str, size: int, head: bytes, text: bool) -> str:
    if not size:
        return "it has 0 bytes: what should have written or fetched it did not; get it again"
    if name.lower().endswith(_UNFINISHED):
        return "it is an unfinished download; let it go on, or get it again"
    if not head.strip(b"\0"):
        return "it begins with zeros: room that was made for a download which never came; get it again"
    if told := _describe_head(head):
        return told
    if name in ("diffship.json", "model_index.json"):
        return "" if text else "it is the list of a folder; pass the folder"
    return "" if text or name.lower().endswith(_TEXTS) else _describe_text(head)


def _describe_head(head: bytes) -> str:
    if head.startswith(b"version https://git-lfs.github.com/spec/"):
        found = re.search(rb"^size (\d{1,15})$", head, re.MULTILINE)
        stands = f", which stands for {int(found[1])} bytes that were not fetched" if found else ""
        return (
            f"it is a Git LFS pointer{stands}; run git lfs install and git lfs pull in its clone, or download the file"
        )
    if _is_pickle(head):
        return f"it holds a pickle or numpy file, which is never read. {CONVERT}"
    archive = _archive(head)
    if archive:
        return f"it is {archive}; unpack it yourself and pass the folder"
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<?xml", b"<error", b"<!--")):
        return (
            "it is a web page or a server's error message that was saved under this name; log in (a model may ask to "
            "accept its licence) and download the file again"
        )
    if _ONNX.match(head):
        return "it is an ONNX model"
    kind = next((kind for magic, kind in _FORMATS.items() if head.startswith(magic)), "")
    return f"it is {kind}" if kind else ""


def _describe_text(head: bytes) -> str:
    """JSON or plain words where bytes were expected: what a download leaves that got an answer, and not the file."""
    try:
        words = head.decode("utf-8", "strict" if len(head) < _HEAD else "ignore")
    except UnicodeDecodeError:
        return ""
    if not words.replace("\n", " ").replace("\r", " ").replace("\t", " ").isprintable():
        return ""
    kind = "JSON" if words.lstrip()[:1] in ("{", "[") else "text"
    return f"it is {kind} ({' '.join(words.split())[:80]!a}), as a download leaves that was refused; get the file again"


def describe_bytes(data: bytes) -> str:
    """What `describe` says of a file that holds these bytes."""
    return _describe_file("", len(data), data[:_HEAD], False)


def _describe_folder(folder: Path) -> str:
    entries = list(islice(_entries(folder), _ENTRIES))
    names = {name for name, _ in entries}
    if not entries:
        return "it is empty"
    links = [entry for _, entry in entries if os.path.islink(entry) and not os.path.exists(entry)]
    if links and len(links) == sum(not os.path.isdir(entry) for _, entry in entries):
        return f"all {len(links)} of its files are links to places where nothing is; {_BLOBS}"
    if "diffship.json" in names:
        return (
            "it is a bundle: run, serve, verify and inspect take it; export and compress take the model it was made of"
        )
    found = next((told for suffix, told in _COMPILED.items() if any(name.endswith(suffix) for name in names)), "")
    if found:
        return f"it holds {found}: compiled already, and no weights to start from; pass the model that it was made of"
    return _describe_other_folder(folder, names)


def _describe_other_folder(folder: Path, names: set[str]) -> str:
    snapshots = sorted(name for name in names if re.fullmatch(r"snapshots/[^/]+", name))
    if snapshots:
        return f"it is an entry of the hub's cache; pass {folder / snapshots[-1]}"
    inside = sorted({name.partition("/")[0] for name in names if name.endswith("/model_index.json")})
    if inside and "model_index.json" not in names:
        return f"the model lies one folder further down; pass {folder / inside[0]}"
    if "adapter_config.json" in names or any(name.endswith("_lora_weights.safetensors") for name in names):
        return "it is a LoRA; fuse it into its model: diffship compress MODEL --pass lora --set files=FILE.safetensors"
    single = sorted(name for name in names if "/" not in name and name.endswith((".safetensors", ".gguf")))
    if single and "config.json" not in names:
        return f"it holds {single[0]}, a checkpoint in one file; pass that file: {folder / single[0]}"
    return ""


def _entries(folder: Path) -> Iterator[tuple[str, str]]:
    """(name with `/`, path) of what lies in a folder and in the folders in it."""
    for outer in os.scandir(folder):
        yield outer.name, outer.path
        if outer.is_dir(follow_symlinks=False):
            yield from ((f"{outer.name}/{inner.name}", inner.path) for inner in os.scandir(outer.path))


def _head(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        return os.read(descriptor, _HEAD)
    finally:
        os.close(descriptor)


def _is_safetensors(head: bytes) -> bool:
    """A header's length and its JSON. The length may look like anything: of 640 bytes it begins as a pickle does."""
    return head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 2**32


def _is_pickle(head: bytes) -> bool:
    if _is_safetensors(head):
        return False
    binary = len(head) > 2 and head[0] == 0x80 and 2 <= head[1] <= 5
    text = head.startswith((b"cos\n", b"cposix\n", b"c__builtin__", b"cbuiltins", b"(lp", b"(dp", b"(i"))
    return binary or text or head.startswith(b"\x93NUMPY") or b"/data.pkl" in head or b"archive/data" in head


def _archive(head: bytes) -> str:
    if _is_safetensors(head):
        return ""
    if head[257:262] == b"ustar":
        return "a tar archive"
    return next((name for magic, name in _ARCHIVES.items() if head.startswith(magic)), "")
