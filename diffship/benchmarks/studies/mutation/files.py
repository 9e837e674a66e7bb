"""A copy of one part of a proved bundle with one edit in it, and hashes that are right again: only figures tell."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffship.benchmarks.studies.mutation.graphs import edit
from diffship.benchmarks.studies.mutation.mutant import Mutant
from diffship.benchmarks.studies.mutation.values import EDITS, EXCHANGED
from diffship.core.bundle import Bundle, FileRecord
from diffship.core.bundle_check import digest_file
from diffship.core.dtype import TensorMeta, from_float32, to_float32
from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.manifest import MANIFEST_NAME
from diffship.exporters.onnx.graph import NAMES

if TYPE_CHECKING:
    import onnx
else:
    onnx = lazy("onnx")


def edited_bundle(bundle: Bundle, mutant: Mutant, folder: Path) -> Bundle:
    """The mutant's part of `bundle` in the new folder `folder`, spoilt.

    Raises:
        UnsupportedError: the part has no such node or tensor in the bundle's precision.
    """
    part = bundle.part(mutant.part)
    manifest = replace(bundle.manifest, parts=(part,), trajectory=None)
    names = list(manifest.named_files())
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(bundle.file(name), folder / name)  # no links: onnx itself refuses them
    model, data = (folder / name for name in part.files[:2])
    changed = data if mutant.kind in (*EDITS, EXCHANGED) else model
    if changed is model:
        _edit_graph(model, mutant)
    else:
        _edit_data(model, data, mutant)
    files = {name: _record(bundle, folder, name, folder / name == changed) for name in names}
    (folder / MANIFEST_NAME).write_bytes(replace(manifest, files=files).to_bytes())
    return Bundle.open(folder)


def _record(bundle: Bundle, folder: Path, name: str, changed: bool) -> FileRecord:
    path = folder / name
    return FileRecord(path.stat().st_size, digest_file(path)) if changed else bundle.manifest.files[name]


def _edit_graph(place: Path, mutant: Mutant) -> None:
    model = onnx.load(str(place), load_external_data=False)
    edit(model, mutant)
    place.write_bytes(model.SerializeToString(deterministic=True))


def _edit_data(model: Path, data: Path, mutant: Mutant) -> None:
    graph = onnx.load(str(model), load_external_data=False).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    first = _place(tensors, data, mutant.place)
    if mutant.kind == EXCHANGED:
        second = _place(tensors, data, mutant.variant)
        first[...], second[...] = second.copy(), first.copy()
        return
    dtype = NAMES[tensors[mutant.place].data_type]
    wide = np.asarray(to_float32(first, dtype), np.float32)
    first[...] = from_float32(EDITS[mutant.kind](wide), dtype)


def _place(tensors: dict[str, onnx.TensorProto], data: Path, name: str) -> NDArray[np.generic]:
    """The tensor's bytes in the file, written through."""
    if name not in tensors or tensors[name].data_location != onnx.TensorProto.EXTERNAL:
        raise UnsupportedError(f"this graph keeps no tensor {name!r} in its data file")
    tensor = tensors[name]
    offset = next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")
    meta = TensorMeta(NAMES[tensor.data_type], tuple(tensor.dims))
    return np.memmap(data, dtype=meta.storage, mode="r+", offset=offset, shape=meta.shape)
