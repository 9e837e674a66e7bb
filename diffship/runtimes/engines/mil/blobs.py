"""weight.bin of an .mlpackage: tensors by the offset that the program states.

The format is that of `MILBlob/Blob/StorageFormat.hpp` (github.com/apple/coremltools, mlmodel/src): a header of 64 bytes
(how many blobs, version 2), and for each blob 64 bytes of metadata (a mark, its type, how many bytes, where they
begin), aligned to 64. Elements of less than a byte are packed from the lowest bit on.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from diffship.core.errors import BundleError
from diffship.targets.coreml.program import BITS, Blob, from_bytes, storage

_MARK, _VERSION, _ALIGN = 0xDEADBEEF, 2, 64
_HEADER, _METADATA = struct.Struct("<II"), struct.Struct("<IIQQ")
# type in the file -> element type
_TYPES: Mapping[int, str] = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4", 9: "uint1", 10: "uint2",
    11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip


class Blobs:
    """The weight file of a package, read blob by blob. Raises BundleError if it is none."""

    def __init__(self, path: Path) -> None:
        self._path, self._size = path, path.stat().st_size
        if self._size:
            with open(path, "rb") as file:
                head = file.read(_ALIGN)
            if len(head) < _ALIGN or _HEADER.unpack_from(head)[1] != _VERSION:
                raise BundleError(f"{path.name} is no weight file of version {_VERSION}")

    def read(self, blob: Blob) -> NDArray[Any]:
        """The tensor at `blob.offset`, in the type and shape that the program states; elements of less than a byte as
        uint8 (int8 for int4).

        Raises:
            BundleError: there is none, of that type and size.
        """
        dtype = blob.type.dtype
        stored, length, start = self._metadata(blob.offset)
        bits = BITS.get(dtype) or storage(dtype).itemsize * 8
        wanted = math.ceil(blob.type.count * bits / 8)
        if stored != dtype or length != wanted or start + length > self._size:
            raise BundleError(
                f"{self._path.name}: at byte {blob.offset} lie {length} bytes of {stored}; the program states "
                f"{wanted} of {dtype}"
            )
        with open(self._path, "rb") as file:
            file.seek(start)
            raw = file.read(length)
        return from_bytes(raw, blob.type).reshape(blob.type.shape)

    def _metadata(self, offset: int) -> tuple[str, int, int]:
        """(element type, bytes, where they begin) of the blob at `offset`."""
        if offset % _ALIGN or not _ALIGN <= offset <= self._size - _ALIGN:
            raise BundleError(f"{self._path.name} has no blob at byte {offset}")
        with open(self._path, "rb") as file:
            file.seek(offset)
            mark, kind, length, start = _METADATA.unpack(file.read(_METADATA.size))
        if mark != _MARK or kind not in _TYPES:
            raise BundleError(f"{self._path.name} has no blob of a known type at byte {offset}")
        return _TYPES[kind], length, start
