"""A local folder in the layout of the hub's cache, and a catalogue over it: the stand-in for downloaded checkpoints."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PARTS = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")


def put(cache: Path, repo: str, folder: Path, commit: str = COMMIT) -> Path:
    """`folder` as a snapshot of `repo` whose files are links into blobs/, with refs/main; the snapshot."""
    home = cache / f"models--{repo.replace('/', '--')}"
    snapshot, blobs = home / "snapshots" / commit, home / "blobs"
    blobs.mkdir(parents=True)
    for number, file in enumerate(sorted(path for path in folder.rglob("*") if path.is_file())):
        blob = blobs / f"{number:040x}"
        shutil.copy(file, blob)
        link = snapshot / file.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(commit, encoding="utf-8")
    return snapshot


def row(name: str, **changes: Any) -> dict[str, Any]:
    """A catalogue row of the tiny model; `changes` replace its values."""
    plain = {
        "name": name,
        "repo": "stand-in/tiny-sd",
        "revision": COMMIT,
        "evidence": "made by this test",
        "licence": "apache-2.0",
        "bytes": 1000,
        "bytes_from": "exact",
        "parts": list(PARTS),
        "needs": ["onnx"],
        "size": 64,
        "steps": 2,
        "gmac": 0.1,
    }
    return {**plain, **changes}


def write_catalogue(file: Path, *rows: Mapping[str, Any]) -> Path:
    """TOML of these rows."""
    lines = ["schema = 1", 'prompt = "red apple"', "seed = 1"]
    for entry in rows:
        lines += ["", "[[checkpoint]]", *(f"{key} = {_toml(value)}" for key, value in entry.items())]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


def _toml(value: object) -> str:
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return str(value)
