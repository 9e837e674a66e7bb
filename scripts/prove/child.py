"""One step in a process of its own: `python child.py fetch|resolve|export JSON`; its last line is one JSON table.

A process for each step, so that running out of memory ends a step and not the run, and so that each step's peak memory
is its own.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError, DiffshipError, SourceError
from diffship.core.sniff import PICKLE_SUFFIXES
from diffship.core.strict import load

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline

WEIGHTS = ("unet", "vae", "text_encoder", "text_encoder_2")
HUB_SECONDS = 30.0


@dataclass(frozen=True)
class Fetch:
    """`revision` None asks the hub for its current `main`; `parts` are the folders that must arrive."""

    repo: str
    revision: str | None
    parts: tuple[str, ...]


@dataclass(frozen=True)
class Export:
    """`source` a hub id (offline by now) and its commit; `base` a folder that supplies missing parts, or "".

    `lora` is a file that is fused into `base`, which is then what is exported; with the LCM `sampler` the result
    records it and `steps`.
    """

    source: str
    revision: str
    base: str
    to: str
    precision: str
    out: str
    job: str
    lora: str = ""
    sampler: str = ""
    steps: int = 4


def fetch(asked: Fetch) -> dict[str, Any]:
    """Commit, snapshot folder and bytes on disk; or `blocked`, the folders that hold nothing but pickles.

    Raises:
        SourceError: no such id, revision or network; or a part that was expected is not there.
    """
    from diffship.models.sources.hub import hub_folder
    from diffship.models.sources.licences import licence_of

    listed, commit = listing(asked.repo, asked.revision)
    blocked = pickle_only(listed)
    if blocked:
        return {"blocked": blocked, "commit": commit}
    folder, found = hub_folder(asked.repo, commit, asked.parts)
    absent = [part for part in asked.parts if not _has(folder, part)]
    if absent:
        raise SourceError(f"{asked.repo} at {found}: has no {', '.join(absent)}; is this the right revision?")
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return {"commit": found, "folder": str(folder), "bytes": size, "licence": licence_of(folder)["id"]}


def resolve(asked: Fetch) -> dict[str, Any]:
    """Only the commit; nothing is downloaded."""
    return {"commit": listing(asked.repo, asked.revision)[1]}


def listing(repo: str, revision: str | None) -> tuple[list[str], str]:
    """(file names, commit) of a repository: the hub's, or with HF_HUB_OFFLINE=1 those of the local cache.

    Raises:
        SourceError: no such id or revision, no network, or not in the cache.
    """
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        from diffship.models.sources.hub import hub_folder

        folder, commit = hub_folder(repo, revision)
        return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()], commit
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=HUB_SECONDS)
    except Exception as fault:  # the client lets the errors of its HTTP library through, which have no common root
        reason = " ".join(str(fault).split())[:160]
        raise SourceError(f"{repo}: the hub does not answer for it: {type(fault).__name__}: {reason}") from None
    if not info.sha:
        raise SourceError(f"{repo}: the hub names no commit for {revision or 'main'}")
    return [file.rfilename for file in info.siblings or ()], info.sha


def pickle_only(names: Iterable[str]) -> list[str]:
    """Component folders ("." for the top of a repository of one component) with pickles and no safetensors."""
    paths = [PurePosixPath(name) for name in names]
    whole = any(str(path) == "model_index.json" for path in paths)
    found = []
    for folder in WEIGHTS if whole else (".", *WEIGHTS):
        suffixes = {path.suffix for path in paths if str(path.parent) == folder}
        if suffixes & set(PICKLE_SUFFIXES) and ".safetensors" not in suffixes:
            found.append(folder)
    return found


def export(asked: Export) -> dict[str, Any]:
    """Export and prove; graphs that an interrupted run finished are taken from the job's folder.

    Raises:
        ConfigError: the network is on: then what is exported need not be what was fetched.
    """
    from huggingface_hub import constants

    from diffship.core.job import Job
    from diffship.export import export as export_source

    if not constants.HF_HUB_OFFLINE:
        raise ConfigError("HF_HUB_OFFLINE is not set: only what is in the cache may be exported")
    opened: dict[str, Any] = {"source": asked.source, "base": asked.base or None, "revision": asked.revision}
    bundle = export_source(
        **({"source": fused(asked)} if asked.lora else opened),
        to=asked.to,
        out=asked.out,
        overwrite=True,
        job=Job(asked.job, _say),
        precision=asked.precision,
    )
    shutil.rmtree(asked.job, ignore_errors=True)  # its graphs were for the case of an interruption
    proofs = {part.name: part.proof.get("status") for part in bundle.manifest.parts}
    size = sum(record.size for record in bundle.manifest.files.values())
    return {"parts": proofs, "bytes": size, "licence": bundle.manifest.licence.get("id", "")}


def fused(asked: Export) -> Pipeline:
    """`base` with the LoRA in its weights, which are made when they are read.

    Raises:
        UnsupportedError: a key of the file has no layer in the base, or another shape.
    """
    from diffship.compress import compress
    from diffship.compression.lora import LoraPass

    sampler = asked.sampler if asked.sampler == "lcm" else None
    return compress(asked.base, [LoraPass((asked.lora,), sampler=sampler, steps=asked.steps)])


def _has(folder: Path, part: str) -> bool:
    if part.endswith(".safetensors"):
        return (folder / part).is_file()
    return (folder / "config.json").is_file() if part == "." else (folder / part).is_dir()


def _say(label: str, done: int, total: int) -> None:
    if done in (0, total):
        print(f"{label}: {done}/{total}", flush=True)


STEPS: Mapping[str, tuple[type[Any], Any]] = {
    "fetch": (Fetch, fetch),
    "resolve": (Fetch, resolve),
    "export": (Export, export),
}


def main(words: list[str]) -> int:
    """Exit code; an expected error is one line."""
    try:
        if len(words) != 2 or words[0] not in STEPS:
            raise ConfigError(f"usage: child.py {'|'.join(STEPS)} JSON")
        kind, work = STEPS[words[0]]
        found = work(load(kind, json.loads(words[1]), words[0]))
    except DiffshipError as fault:
        print(f"{words[0] if words else 'child'}: {fault}", flush=True)
        return fault.exit_code
    print(json.dumps(found), flush=True)
    return 0


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    sys.exit(main(sys.argv[1:]))
