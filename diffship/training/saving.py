"""Tensors onto the disk, where a full one is told as such."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

_NUMBER = re.compile(r"os error (\d+)")


def save_tensors(
    save: Callable[..., None], tensors: Mapping[str, Any], path: Path, metadata: Mapping[str, str] | None = None
) -> None:
    """`safetensors.torch.save_file`, or numpy's; a file that could not be written whole is removed.

    Raises:
        OSError: the disk is full, or the like.
    """
    try:
        save(dict(tensors), path, None if metadata is None else dict(metadata))
    except SafetensorError as fault:
        path.unlink(missing_ok=True)
        number = _NUMBER.search(str(fault))
        if number is None:
            raise
        code = int(number[1])
        raise OSError(code, f"{os.strerror(code)}; what was saved before is kept", str(path)) from None
