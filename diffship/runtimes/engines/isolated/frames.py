"""Messages between two processes of one machine: a length, a JSON header, and the bytes of the arrays that it lists."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from typing import IO, Any

import numpy as np

from diffship.core.dtype import TensorMeta, as_bytes
from diffship.core.errors import ConfigError
from diffship.core.limits import MIB

HEADER_BYTES = MIB
BODY_BYTES = 8 << 30
_LENGTH = struct.Struct("<I")
_ARRAYS = "arrays"


def send(stream: IO[bytes], header: Mapping[str, Any], arrays: Sequence[np.ndarray] = ()) -> None:
    """Write one message; `arrays` are contiguous, of any type that safetensors has."""
    listed = [[array.dtype.name, list(array.shape)] for array in arrays]
    text = json.dumps({**header, _ARRAYS: listed}).encode()
    stream.write(_LENGTH.pack(len(text)) + text)
    for array in arrays:
        stream.write(as_bytes(array))
    stream.flush()


def receive(stream: IO[bytes]) -> tuple[dict[str, Any], list[np.ndarray]]:
    """The next message: its header, and its arrays.

    Raises:
        EOFError: the other side closed, before the message or within it.
        ValueError: a header that is none, or lists more than the bounds allow; nothing of that size is allocated.
    """
    (length,) = _LENGTH.unpack(_exactly(stream, _LENGTH.size))
    if length > HEADER_BYTES:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(_exactly(stream, length))
    try:
        metas = [TensorMeta(str(name), tuple(int(side) for side in shape)) for name, shape in header.pop(_ARRAYS)]
    except (KeyError, TypeError, AttributeError, ConfigError) as fault:
        raise ValueError(f"a header without its arrays: {fault}") from None
    if any(side < 0 for meta in metas for side in meta.shape) or sum(meta.nbytes for meta in metas) > BODY_BYTES:
        raise ValueError("arrays beyond the bounds")
    return header, [_array(stream, meta) for meta in metas]


def _array(stream: IO[bytes], meta: TensorMeta) -> np.ndarray:
    array = np.empty(meta.shape, meta.storage)
    view, at = as_bytes(array), 0
    while at < len(view):
        count = stream.readinto(view[at:])  # type: ignore[attr-defined]
        if not count:
            raise EOFError
        at += count
    return array


def _exactly(stream: IO[bytes], count: int) -> bytes:
    found = stream.read(count)
    if len(found) < count:
        raise EOFError
    return found
