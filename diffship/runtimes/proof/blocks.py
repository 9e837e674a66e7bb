"""A part proved block by block: every layer on the reference's own input, every point of it compared.

The graph is cut at the points that torch named (`manifest.GoldenBlocks`), so a fault shows where it is, undiluted by
what follows. Two runs: the graph in float32 arithmetic with its weights as they were rounded, which must agree with
torch on the same weights as two float32 engines do; and the engine in the part's own precision, whose error may be
that of the format with a margin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from diffship.core.brief import brief
from diffship.core.bundle import Bundle
from diffship.core.compare import Report, Tolerance, compare
from diffship.core.dtype import to_float32
from diffship.core.errors import BundleError
from diffship.core.leftovers import temporary_folder
from diffship.core.manifest import GoldenBlocks, Part
from diffship.core.sketch import sketch
from diffship.core.weights import SafetensorsWeights
from diffship.runtimes.engines.engine import Engine
from diffship.runtimes.proof.onnx_model import FORCED, OnnxModel, forced
from diffship.runtimes.proof.onnx_split import SplitStage, load, split
from diffship.runtimes.proof.stages import run_stage, stage_bytes

Arrays = dict[str, np.ndarray]
GRAPH, ENGINE = "graph", "engine"
_MOST = 512 << 20  # bytes of weights in one stretch, which is copied to a temporary folder
_NAMED = 8


@brief
@dataclass(frozen=True)
class BlockCheck:
    """kind: "graph" (float32 arithmetic, rounded weights) or "engine" (the part's precision). report: a point each."""

    kind: str
    report: Report
    stages: int

    @property
    def passed(self) -> bool:
        return self.report.passed

    @property
    def failed(self) -> tuple[str, ...]:
        """Points that differ, in execution order."""
        return tuple(output.name for output in self.report.outputs if not output.passed)

    def to_json(self) -> dict[str, object]:
        """The point nearest to its limit stands for all."""
        worst = self.report.closest
        return {
            "kind": self.kind,
            "passed": self.passed,
            "points": len(self.report.outputs),
            "failed": list(self.failed[:_NAMED]),
            "margin_db": None if not np.isfinite(worst.margin_db) else round(worst.margin_db, 2),
            "closest": worst.to_json(),
        }

    def text(self) -> str:
        what = "graph, in float32 arithmetic" if self.kind == GRAPH else "engine, in its own precision"
        points = len(self.report.outputs)
        if self.passed:
            near = self.report.closest
            figures = f"{near.psnr_db:.1f} dB of at least {near.tolerance.psnr_db or 0:.1f}"
            return f"ok   {what}: {points} points agree; closest to its limit is {near.name}, {figures}"
        first = next(output for output in self.report.outputs if not output.passed)
        more = len(self.failed) - 1
        return f"FAIL {what}: {first.text().removeprefix('FAIL ')}" + (f" (and {more} other points)" if more else "")


def check_blocks(bundle: Bundle, part: Part, engine: Engine, budget: int) -> tuple[BlockCheck, ...]:
    """The block checks that `part` has references for; none if it was proved as a whole only.

    budget: bytes of memory that one stretch may take.

    Raises:
        RunnerError: the graph lacks a point, or the engine fails.
        BundleError: the references are damaged.
    """
    blocks = None if part.golden is None else part.golden.blocks
    if blocks is None:
        return ()
    model = forced(load(bundle.file(part.files[0])), blocks.cut, blocks.graph)
    values, references = read_blocks(bundle, blocks)
    odd = sorted(set(values) ^ set(model.inputs))
    if odd:
        what = "does not feed" if odd[0] in model.inputs else "feeds, and the graph does not take,"
        raise BundleError(f"{blocks.file} {what} {odd[0][:80]!a}")
    checks = [_check(GRAPH, bundle, part, engine, budget, model, values, references[GRAPH], blocks.graph)]
    if blocks.engine and part.format.on_cpu:
        checks.append(_check(ENGINE, bundle, part, engine, budget, model, values, references[ENGINE], blocks.engine))
    return tuple(checks)


def read_blocks(bundle: Bundle, blocks: GoldenBlocks) -> tuple[Arrays, dict[str, Arrays]]:
    """(feeds of the cut graph, references by kind and point).

    Raises:
        BundleError: the file does not hold what the manifest says.
    """
    weights = SafetensorsWeights(bundle.file(blocks.file))
    names, cut = set(weights.names()), blocks.cut
    sides = {GRAPH: ("graph", blocks.graph), ENGINE: ("out", blocks.engine)}
    wanted = {f"in.{name}" for name in cut} | {f"{side}.{name}" for side, points in sides.values() for name in points}
    feeds = {name for name in names if name.startswith("in.")}
    if not wanted <= names or names - wanted - feeds:
        odd = sorted((wanted - names) or (names - wanted - feeds))
        raise BundleError(f"{blocks.file}: {odd[0][:80]!a} is missing or not listed in the manifest")
    values: Arrays = {}
    for name in feeds:
        own, array = name.removeprefix("in."), np.asarray(weights.read(name))
        if own in cut:
            values[FORCED + own] = to_float32(array, weights.meta(name).dtype) * np.float32(2.0) ** cut[own]
        else:
            values[own] = array
    return values, {
        kind: {name: np.asarray(weights.read(f"{side}.{name}")) for name in points}
        for kind, (side, points) in sides.items()
    }


def _check(
    kind: str,
    bundle: Bundle,
    part: Part,
    engine: Engine,
    budget: int,
    model: OnnxModel,
    feeds: Arrays,
    references: Arrays,
    limits: Mapping[str, Tolerance],
) -> BlockCheck:
    widen = kind == GRAPH and part.format.activations != "float32"
    size = stage_bytes(engine, "fp32" if widen else part.precision, budget)
    with temporary_folder("blocks") as folder:
        path = bundle.file(part.files[0])
        stages = split(path, min(size // 2 if widen else size, _MOST), folder, model=model, widen=widen)
        found = _sketches(stages, engine, feeds, limits)
    ordered = {name: references[name] for stage in stages for name in stage.outputs if name in references}
    return BlockCheck(kind, compare(ordered | references, found, limits), len(stages))


def _sketches(stages: Sequence[SplitStage], engine: Engine, feeds: Arrays, points: Mapping[str, Tolerance]) -> Arrays:
    values, found = dict(feeds), Arrays()
    for index, stage in enumerate(stages):
        made = run_stage(engine, stage, values)
        found.update((name, sketch(name, array)) for name, array in made.items() if name in points)
        later = {name for stage in stages[index + 1 :] for name in stage.inputs}
        values = {name: array for name, array in (values | made).items() if name in later}
    return found
