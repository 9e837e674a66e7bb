"""Getting a hub id onto this machine: only the files that are read, at a recorded commit."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path, PurePosixPath

from diffship.core.errors import DiffshipError, SourceError
from diffship.core.job import require_disk
from diffship.core.lazy import need
from diffship.core.manifest import MANIFEST_NAME
from diffship.core.registry import kinds

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9_][\w.-]{0,95})?\Z")
_SMALL = (".json", ".txt")
_STEMS = ("diffusion_pytorch_model", "model")
_SECONDS = 20.0
LEGAL = (
    "legal: a diffusers folder, a .safetensors or .gguf file, a hub id, emoji, arch:NAME; where a model is run, a "
    "bundle too"
)


def is_hub_id(text: str) -> bool:
    """`owner/name` or `name`, in the hub's own alphabet."""
    return bool(_ID.match(text)) and ".." not in text and "--" not in text


def hub_folder(name: str, revision: str | None = None, files: Iterable[str] = ()) -> tuple[Path, str]:
    """(folder in the local cache, commit) of a hub id; with HF_HUB_OFFLINE=1 only the cache is looked at.

    `files` are got as well as those that a model needs, if the repository has them: a LoRA, say.

    Raises:
        SourceError: no such id or revision, no network, or not in the cache.
        MissingExtra: huggingface_hub is not installed.
    """
    hub = need("huggingface_hub")
    constants = need("huggingface_hub.constants")
    offline = bool(constants.HF_HUB_OFFLINE)
    try:
        if offline:
            folder, commit = _cached(hub.snapshot_download(name, revision=revision, local_files_only=True))
            if (folder / MANIFEST_NAME).exists():
                raise SourceError(_bundle(name))
            return folder, commit
        info = hub.HfApi().model_info(name, revision=revision, files_metadata=True, timeout=_SECONDS)
        sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
        if MANIFEST_NAME in sizes:
            raise SourceError(_bundle(name))
        wanted = sorted({*select_files(sizes), *(file for file in files if file in sizes)})
        require_disk(constants.HF_HUB_CACHE, sum(sizes[file] for file in wanted))
        return _cached(hub.snapshot_download(name, revision=info.sha, allow_patterns=wanted, etag_timeout=_SECONDS))
    except DiffshipError:
        raise
    except Exception as fault:
        # the hub's client lets the errors of its HTTP library through, which have no common root
        raise SourceError(_refusal(name, revision, fault, offline)) from None


def select_files(names: Iterable[str]) -> list[str]:
    """The files of a repository that are read: JSON, tokenizer text, licences, and one set of safetensors a folder.

    Full precision is taken if both it and fp16 are there; whole-model checkpoints at the top are not.
    """
    names = list(names)
    wanted = [name for name in names if _is_small(PurePosixPath(name))]
    for folder in ("", *_folders()):
        wanted += _weights([PurePosixPath(name) for name in names], folder)
    return sorted(wanted)


@cache
def _folders() -> tuple[str, ...]:
    """Folders of a pipeline that any kind of model reads."""
    slots = [slot for kind in kinds().values() for slot in kind.slots]
    names = [name for slot in slots for name in (slot.folder, slot.tokenizer) if name is not None]
    return (*dict.fromkeys(names), "scheduler")


def _is_small(path: PurePosixPath) -> bool:
    if len(path.parts) == 1:
        licence = path.name.lower().startswith(("license", "licence", "notice", "copying"))
        return licence or path.name in ("model_index.json", "config.json", "README.md")
    return len(path.parts) == 2 and path.parts[0] in _folders() and path.suffix in _SMALL


def _weights(paths: list[PurePosixPath], folder: str) -> list[str]:
    here = [path for path in paths if str(path.parent) == (folder or ".") and path.name.startswith(_STEMS)]
    files = [path for path in here if path.suffix == ".safetensors"]
    for variant in ("", ".fp16", ".bf16"):
        form, shard = re.escape(variant), r"-\d{5}-of-\d{5}"
        pattern = re.compile(rf"({'|'.join(_STEMS)})({form}({shard})?|{shard}{form})\.safetensors\Z")
        chosen = [str(path) for path in files if pattern.match(path.name)]
        if chosen:
            return chosen
    return []


def _cached(folder: str) -> tuple[Path, str]:
    path = Path(folder)
    return path, path.name


def _bundle(name: str) -> str:
    return (
        f"{name!r} on the hub is a bundle: run, serve and verify take it from a folder. "
        f"Run: hf download {name} --local-dir DIR"
    )


def _refusal(name: str, revision: str | None, fault: Exception, offline: bool) -> str:
    what = f"{name!r}{f' at {revision}' if revision else ''} is no path in {os.getcwd()}"
    if offline:
        return f"{what}, and not in the local hub cache; HF_HUB_OFFLINE keeps it from being fetched; {LEGAL}"
    reason = " ".join(str(fault).split())
    short = reason if len(reason) <= 160 else reason[:157] + "..."
    return f"{what}, and the hub does not give it: {type(fault).__name__}: {short}; {LEGAL}"
