"""Write tensors to the disk and read them back; a full disk and a damaged file each get a clear error."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from diffship.core.atomic import partial_prefix, sync_folder
from diffship.core.errors import SourceError
from diffship.core.lazy import lazy
from diffship.core.safetensors_file import read_header

if TYPE_CHECKING:
    from safetensors import torch as tensor_file
    from torch import Tensor
else:
    tensor_file = lazy("safetensors.torch")

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


def replace_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str] | None = None) -> None:
    """Tensors into `path` so that a crash leaves the old file or the new one. Raises OSError: the disk is full."""
    # the same name for the same process: what a killed one left, gigabytes at times, is written over
    temporary = path.parent / f"{partial_prefix(path)}{os.environ.get('RANK', '0')}"
    try:
        save_tensors(tensor_file.save_file, tensors, temporary, metadata)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


@contextmanager
def reading(path: Path, remedy: str) -> Iterator[Any]:
    """A file of ours, opened by `safetensors.safe_open` for torch, for a `with` block.

    Raises:
        SourceError: it is damaged, or what the block found wrong; `remedy` stands behind the reason.
    """
    try:
        read_header(path)  # it names the file and the reason
        with safe_open(path, "pt") as file:
            yield file
    except SafetensorError as fault:
        raise SourceError(f"{path}: {fault}. {remedy}") from None
    except SourceError as fault:
        raise SourceError(f"{fault}. {remedy}") from None


def read_tensors(path: Path, names: tuple[str, ...], remedy: str) -> dict[str, Tensor]:
    """Tensors by name. Raises SourceError: the file is damaged or lacks one of them."""
    with reading(path, remedy) as file:
        missing = sorted(set(names) - set(file.keys()))
        if missing:
            raise SourceError(f"{path} has no tensor {missing[0]}")
        return {name: file.get_tensor(name) for name in names}
