"""Weights for a refit, from a folder: an ONNX bundle of the other model, or safetensors files by the plan's names."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from diffship.core.dtype import TensorMeta, to_float32
from diffship.core.errors import BundleError
from diffship.core.onnx_wire import external_data
from diffship.core.weights import SafetensorsWeights
from diffship.targets.tensorrt.plan import PlanFacts


def read_weights(folder: Path, part: str, facts: PlanFacts) -> dict[str, np.ndarray] | None:
    """Arrays by the plan's names from `folder/PART/model.onnx` or `folder/PART.safetensors`; None if neither is.

    A plan is built from an ONNX graph, whose names its weights keep: the export of a fine-tune or of a model with a
    fused LoRA, in the plan's precision and opset, has all of them.

    Raises:
        BundleError: the files are damaged, or the ONNX data are of another precision or shape than the plan's.
    """
    graph, file = folder / part / "model.onnx", folder / f"{part}.safetensors"
    if graph.is_file():
        return _of_graph(graph, facts)
    if file.is_file():
        stored = SafetensorsWeights(file)
        return {name: _plain(np.asarray(stored.read(name)), stored.meta(name).dtype) for name in stored.names()}
    return None


def _of_graph(graph: Path, facts: PlanFacts) -> dict[str, np.ndarray]:
    found = {}
    for claim in external_data(graph):
        meta = facts.weights.get(claim.tensor)
        if meta is None:
            continue  # of a graph with more weights than the plan tells of; what it lacks is named by the refit
        if Path(claim.location).name != claim.location:
            raise BundleError(f"{graph}: the data of {claim.tensor!r} lie outside of its folder")
        if claim.length not in (None, meta.nbytes):
            raise BundleError(
                f"{graph}: {claim.tensor} takes {claim.length} bytes; in the plan it is {meta.dtype} {meta.shape}, "
                f"{meta.nbytes} bytes: export it in the plan's precision ({facts.precision})"
            )
        found[claim.tensor] = _plain(_read(graph.parent / claim.location, claim.offset, meta), meta.dtype)
    return found


def _read(file: Path, offset: int, meta: TensorMeta) -> np.ndarray:
    try:
        return np.memmap(file, meta.storage, "r", offset, meta.shape or (1,)).reshape(meta.shape)
    except (OSError, ValueError) as fault:
        raise BundleError(f"{file}: {str(fault)[:160]}") from None


def _plain(array: np.ndarray, dtype: str) -> np.ndarray:
    return to_float32(array, dtype) if dtype == "bfloat16" else array
