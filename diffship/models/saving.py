"""Saving a pipeline as a diffusers folder, which appears whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

from diffship.core.atomic import sync_folder, sync_tree
from diffship.core.errors import ConfigError
from diffship.core.leftovers import claim_folder, refuse_fixed, remove_leftovers, usual_mode
from diffship.models.folder import write_folder
from diffship.models.pipeline import Pipeline


def save(
    pipeline: Pipeline,
    folder: str | Path,
    dtype: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Write a diffusers folder that stock `from_pretrained` loads; the tensors stream through, one at a time.

    `dtype` (`float16`, `bfloat16`, `float32`) converts float tensors.

    Raises:
        ConfigError: `folder` exists and holds something, or a value does not fit `dtype`.
    """
    target = Path(os.path.realpath(folder))  # a link to an empty folder is that folder
    require_place(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    with claim_folder(target) as draft:
        write_folder(pipeline, draft, dtype, progress)
        draft.chmod(usual_mode(draft))
        sync_tree(draft)
        _move(draft, target)
    return target


def _move(draft: Path, target: Path) -> None:
    try:
        if target.exists():
            target.rmdir()
        draft.rename(target)
        sync_folder(target.parent)
    except OSError as fault:
        if fault.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise ConfigError(f"{target} was written by someone else meanwhile; theirs is kept") from None


def require_place(target: Path) -> None:
    """Raises ConfigError unless a pipeline can be saved at `target`: nothing is there, or an empty folder.

    Folders above it are made later; that the nearest one is a folder, which may be written to, is asked before work.
    """
    target = Path(os.path.realpath(target))
    refuse_fixed(target)
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if not above.is_dir():
        raise ConfigError(f"{above} is a file, so {target} cannot be made; choose another folder")
    if not os.access(above, os.W_OK):
        raise ConfigError(f"{above} may not be written to; choose another folder than {target}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ConfigError(f"{target} exists and is not an empty folder; choose another one or remove it")
