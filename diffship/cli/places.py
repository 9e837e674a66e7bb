"""Where results go: refused before any work, with the flag that named it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from diffship.core.atomic import special
from diffship.core.errors import ConfigError

FIELDS = {  # of a template for names of pictures
    "index": "number of the prompt, 000 first",
    "image": "number of the picture of its prompt, 0 first",
    "prompt": "at most 40 characters of it",
    "seed": "of this picture",
    "model": "names of the models, in the order of their steps",
    "engine": "names of their engines",
    "negative": "at most 24 characters of the negative prompt, or none",
    "sampler": "the model's own where none is given, as with the next six",
    "steps": "denoising steps",
    "guidance": "weight of the prompt",
    "size": "WIDTHxHEIGHT",
    "spacing": "of the timesteps",
    "eta": "share of noise drawn anew",
    "strength": "share of noise",
    "rng": "torch or philox",
    "memory": "normal or low",
}
_OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def require_file_place(path: Path, flag: str) -> None:
    """Raises ConfigError unless a file can be written at `path`; folders above it may still be missing."""
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; name a file in it")
    if special(path):
        raise ConfigError(f"{flag} {path} is a device, pipe or socket, which is never replaced; name a file")
    _require_above(path, flag)


def require_picture_place(path: Path, flag: str) -> None:
    """Raises ConfigError unless pictures can be written there: to one .png, or into a folder."""
    if path.suffix.lower() == ".png":
        require_file_place(path, flag)
        return
    if path.suffix.lower() in _OTHER_PICTURES and not path.is_dir():
        raise ConfigError(f"{flag} {path}: pictures are written as PNG; name a .png file, or a folder")
    if path.exists() and not path.is_dir():
        raise ConfigError(f"{flag} {path} is a file; name a folder, or a .png file")
    _require_above(path / "picture.png", flag)


def refuse_taken(places: Iterable[tuple[str, Path]], overwrite: bool) -> None:
    """Raises ConfigError if two of these (flag, file) are one file, or, without `overwrite`, one is there."""
    seen: dict[str, str] = {}
    taken = []
    for flag, path in places:
        key = os.path.realpath(path).casefold()  # file systems that do not tell A from a would keep one of them
        if key in seen:
            twice = f"{seen[key]} and {flag}" if seen[key] != flag else f"two of {flag}"
            more = ": a template with {index}, {image} or {seed} tells pictures apart" if flag == "-o" else ""
            raise ConfigError(f"{twice} would be written to one file, {path}{more}")
        seen[key] = flag
        if os.path.lexists(path):
            taken.append(f"{flag} {path}")
    if taken and not overwrite:
        more = f" (and {len(taken) - 1} more)" if len(taken) > 1 else ""
        raise ConfigError(f"{taken[0]} exists already{more}; choose another name, or pass --overwrite to replace it")


def add_overwrite(parser: argparse.ArgumentParser | argparse._ArgumentGroup, what: str) -> None:
    """The flag that lets `refuse_taken` pass."""
    parser.add_argument("--overwrite", action="store_true", help=f"replace {what} that are there already")


def _require_above(path: Path, flag: str) -> None:
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{flag} {path}: {above} is a file, not a folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{flag} {path}: {above} may not be written to")
