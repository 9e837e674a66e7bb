"""A proved bundle without its weight data, which is poured in again: how `emoji` reaches a machine without torch.

Making a graph and proving it needs torch; everything that comes out of that, but for the weights, is small enough to
ship (1.2 MB for `emoji`). Restoring needs numpy alone, and ends with the bytes that were proved: every hash is checked.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np

from diffship.core import bundle_check
from diffship.core.bundle import Bundle, write_bundle
from diffship.core.dtype import to_float32
from diffship.core.errors import BundleError, SourceError
from diffship.core.limits import LIMITS
from diffship.core.manifest import MANIFEST_NAME, Manifest, Part, parse_manifest
from diffship.core.onnx_wire import external_data
from diffship.core.weights import SafetensorsWeights, Weights
from diffship.exporters.onnx.layout import DATA_FILE
from diffship.exporters.onnx.stored import Stored


def strip(bundle: Bundle, out: Path) -> None:
    """Copy every file of `bundle` but the weights' data to `out`, which must not exist.

    Raises:
        BundleError: a part is not proved, or not fp32: neither could be restored.
    """
    for part in bundle.manifest.parts:
        if part.proof["status"] != "proved" or not part.format.lossless:
            raise BundleError(f"{bundle.path}: part {part.name} is {part.proof['status']}, {part.precision}")
    shutil.copytree(bundle.path, out, ignore=shutil.ignore_patterns(DATA_FILE))


def restore(prepared: Path, source: Path, out: str | Path, overwrite: bool = False) -> Bundle:
    """The bundle that `prepared` was stripped from, with the weights of the diffusers folder `source`.

    Raises:
        ConfigError: the place `out` is taken.
        SourceError: a tensor is missing, or the weights are not those that were proved.
    """
    # uv and others hard-link installed files to their cache
    manifest = parse_manifest(bundle_check.read_small(prepared / MANIFEST_NAME, LIMITS.manifest_bytes, hard_links=True))
    kind = manifest.family.kind
    with write_bundle(out, overwrite) as draft:
        for name in manifest.files:
            if not name.endswith(DATA_FILE):
                _copy(prepared / name, draft.folder / name)
        for part in manifest.parts:
            _pour(part, SafetensorsWeights(_files(source / kind.slot_of(part.name).folder)), draft.folder)
        _require_equal(draft.folder, manifest)
        return draft.finish(replace(manifest, files={}))


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def _pour(part: Part, weights: Weights, folder: Path) -> None:
    """Write a part's data file: each tensor, as float32, at the place that its graph states."""
    model, data = (folder / name for name in part.files)
    known = set(weights.names())
    with open(data, "wb") as file:
        for claim in external_data(model):
            stored = Stored.of(claim.tensor)
            if stored.source not in known:
                raise SourceError(f"{part.name}: its weights have no tensor {stored.source!r}")
            array = to_float32(weights.read(stored.source), weights.meta(stored.source).dtype)
            file.seek(claim.offset)
            file.write(np.ascontiguousarray(stored.form.values(array), "<f4").data)
        file.truncate(int(part.extra["data_bytes"]))


def _require_equal(folder: Path, manifest: Manifest) -> None:
    for name, record in manifest.files.items():
        if bundle_check.digest_file(folder / name) != record.sha256:
            raise SourceError(
                f"{name} is not what was proved: the package's weights and its prepared bundle differ. "
                "Install diffship again, or export with torch: pip install 'diffship[torch,onnx]'"
            )
