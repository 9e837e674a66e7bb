"""Which node of a graph an engine gets wrong: the same inputs through both, stretch by stretch, then node by node."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from diffship.core.bundle import Bundle
from diffship.core.compare import Tolerance, compare
from diffship.core.errors import DiffshipError, UnsupportedError
from diffship.core.leftovers import temporary_folder
from diffship.core.manifest import Part
from diffship.runtimes.engines.engine import Engine, Opener, make_engine
from diffship.runtimes.proof.stages import run_stage

Arrays = Mapping[str, np.ndarray]
Look = Callable[[Bundle, Part, Engine, Arrays], tuple[str, ...]]
_STRETCHES = 64
_NONE = "no stretch differs from unoptimised ONNX Runtime: the graph or its weights are wrong, not the engine"


def look_into(bundle: Bundle, part: Part, engine: Engine, feeds: Arrays) -> tuple[str, ...]:
    """The first suspect of a part that is an ONNX graph; a `Look`.

    Raises:
        UnsupportedError: it is an engine, which cannot be looked into.
    """
    model = bundle.file(part.files[0])
    if model.suffix != ".onnx":
        raise UnsupportedError(
            "an engine cannot be looked into: give the --to onnx bundle of the same source and precision with --graphs"
        )
    return suspects(model, engine, feeds, tolerance_of(part))


def suspects(model: Path, engine: Opener, feeds: Arrays, tolerance: Tolerance) -> tuple[str, ...]:
    """Where `engine` computes something else than unoptimised ONNX Runtime on the same inputs: the first such stretch,
    and its first such node, as sentences.

    If there is none, the sentence says so: then the graph or its weights are wrong, and not the engine.
    """
    from diffship.runtimes.proof.onnx_split import split_evenly

    reference = make_engine("onnxruntime", {"optimisation": "off"})
    with temporary_folder("reduce") as folder:
        stages = split_evenly(model, _STRETCHES, folder)
        values = dict(feeds)
        for index, stage in enumerate(stages):
            right = run_stage(reference, stage, values)
            said = _difference(right, engine, stage, values, tolerance)
            if said:
                where = f"stretch {index + 1} of {len(stages)}, {', '.join(stage.outputs)[:160]}"
                return (f"{where}: {said}", _node(reference, engine, stage, values, tolerance))
            values.update(right)
    return (_NONE,)


def _difference(right: Arrays, engine: Opener, stage: Any, values: Arrays, tolerance: Tolerance) -> str:
    try:
        report = compare(right, run_stage(engine, stage, values), tolerance)
    except DiffshipError as fault:
        return str(fault)
    return "" if report.passed else report.worst.text()


def _node(reference: Opener, engine: Opener, stage: Any, values: Arrays, tolerance: Tolerance) -> str:
    """The first node of a stretch whose result differs if every result is an output."""
    each = stage.every_node()
    right = run_stage(reference, each, values)
    try:
        found = run_stage(engine, each, values)
    except DiffshipError as fault:
        return f"its nodes cannot be looked at one by one: {fault}"
    for name in each.outputs:
        # equal infinities and NaN are what the graph computes there; `compare` calls them a miss
        if np.array_equal(right[name], found[name], equal_nan=right[name].dtype.kind == "f"):
            continue
        report = compare({name: right[name]}, {name: found[name]}, tolerance)
        if not report.passed:
            return f"node {each.node_of(name)}: {report.worst.text()}"
    return "no node differs when each result is asked for: what is wrong is several nodes computed as one"


def tolerance_of(part: Part) -> Tolerance:
    """The PSNR limit of the part's golden vectors. Their limit on a single error is left out: tensors inside the part
    have other scales."""
    if part.golden is None:
        raise UnsupportedError(f"part {part.name} has no golden vectors")
    whole = part.golden.tolerance
    return whole if whole.psnr_db is None else Tolerance(psnr_db=whole.psnr_db)
