"""One part of an export: its files, torch's references beside them, and the figures of an engine that meets them."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from diffship.core.bundle import Bundle, FileRecord
from diffship.core.errors import ParityError
from diffship.core.job import Job
from diffship.core.leftovers import temporary_folder
from diffship.core.manifest import Golden, GoldenTrajectory, Manifest, Part
from diffship.core.precision import Precision

if TYPE_CHECKING:
    from diffship.exporters.golden_feeds import GoldenFeeds
    from diffship.exporters.protocol import BuiltFromGraph, Exporter, Packaging
    from diffship.exporters.staged import StagedFeeds
    from diffship.models.parts.component import Component
    from diffship.models.pipeline import Pipeline

BATCH = 2  # samples of a golden call, at different timesteps: one value for all would not show one that is ignored
AnyExporter: TypeAlias = "Exporter | BuiltFromGraph | Packaging"


@dataclass(frozen=True)
class Work:
    """What stays the same for all parts of one export."""

    exporter: AnyExporter
    pipeline: Pipeline
    folder: Path
    job: Job
    gate_bytes: int
    sizes: Mapping[str, dict[str, int]]  # of golden vectors, by part and axis
    runs_here: bool  # whether an engine of this machine reads the target
    against: Mapping[str, Component]  # what torch computes, by part: the exported parts unless the caller says others
    feeds: GoldenFeeds | StagedFeeds


def made_part(work: Work, component: Component, verify: bool) -> Part:
    """Write a part, and prove it if `verify` and if an engine of this machine reads it.

    Raises:
        ParityError: it does not compute what torch does.
    """
    from diffship.exporters.protocol import BuiltFromGraph

    if isinstance(work.exporter, BuiltFromGraph):
        return _through_graph(work, work.exporter, component, verify)
    return _part(work, work.exporter, component, verify)


def _part(work: Work, exporter: Exporter | Packaging, component: Component, verify: bool) -> Part:
    from diffship.exporters.protocol import Packaging

    started = time.perf_counter()
    if isinstance(exporter, Packaging):
        part = exporter.package(component, work.pipeline, work.folder, work.job)
    else:
        part = exporter.export(component, work.folder, work.job)
    seconds = round(time.perf_counter() - started, 2)
    if not verify:
        part = replace(part, proof={"status": "unproven", "reason": "exported with --no-verify"})
    elif work.runs_here:
        part = _proved(work, exporter, component, part)
    else:
        part = _unproven(work, component, part)
    return replace(part, proof={**part.proof, "export_seconds": seconds})


def _unproven(work: Work, component: Component, part: Part) -> Part:
    """`part` with golden vectors, for a machine that has an engine for it."""
    reason = "no engine of this machine runs it: `diffship verify` proves it on one that has an engine"
    return replace(part, golden=_whole(work, part), proof={"status": "unproven", "reason": reason})


def _through_graph(work: Work, exporter: BuiltFromGraph, component: Component, verify: bool) -> Part:
    """A part of a target that is built from an ONNX graph and runs on another machine.

    The graph is proved here, block by block, at sizes of its own; what was built of it is not, and says so until
    `verify` runs where it can, on golden vectors at sizes that the engine takes.
    """
    # inside the draft, which the next export sweeps up if this process is killed
    with temporary_folder("graph", work.folder) as folder:
        graphs = exporter.through(component)
        sizes = {component.name: graphs.golden_sizes(component, work.pipeline.family, BATCH)}
        inner = replace(work, exporter=graphs, folder=folder, runs_here=True, sizes=sizes)
        graph = _part(inner, graphs, component, verify)
        started = time.perf_counter()
        part = exporter.build(component, work.pipeline, graph, inner.folder, work.folder, work.job)
        seconds = round(time.perf_counter() - started, 2)
        proof = {"status": "unproven", "export_seconds": seconds, "graph": graph.proof}
        proof["reason"] = "built, not run: `diffship verify` proves it on a machine with the GPU"
        return replace(part, golden=_whole(work, part) if verify else None, proof=proof)


def _proved(work: Work, exporter: Exporter | Packaging, component: Component, part: Part) -> Part:
    """`part` with golden vectors and the figures of an engine that meets them; raises ParityError otherwise."""
    from diffship.exporters.protocol import Packaging
    from diffship.runtimes.engines.engine import choose_engine, make_engine
    from diffship.runtimes.proof.verify import check_part

    work.job.progress(f"prove {part.name}", 0, 2)
    part = replace(part, golden=_whole(work, part) if isinstance(exporter, Packaging) else _golden(work, part))
    work.job.progress(f"prove {part.name}", 1, 2)
    engine = make_engine(choose_engine(exporter.name))
    found = check_part(_unfinished(work, part), part, engine, work.gate_bytes)
    work.job.progress(f"prove {part.name}", 2, 2)
    found.require(f"part {part.name} ({part.precision})")
    assert found.report is not None
    worst = found.report.worst.to_json()
    figures = {name: worst[name] for name in ("max_abs", "mean_abs", "max_rel", "psnr_db", "cosine")}
    probe = engine.probe()
    proof = {"status": "proved", "engine": f"{probe.engine} {probe.version}", "stages": found.stages, **figures}
    proof["blocks"] = [block.to_json() for block in found.blocks]
    if found.quality is not None and math.isfinite(found.quality.worst.psnr_db):
        proof["quality_db"] = round(found.quality.worst.psnr_db, 2)
    return replace(part, proof={**proof, "output": worst["name"], "seconds": round(found.seconds, 3)})


def _golden(work: Work, part: Part) -> Golden:
    """References of the whole part and of its blocks."""
    from diffship.exporters.golden_blocks import block_sizes, write_blocks

    truth = work.against[part.name]
    sizes = block_sizes(work.sizes[part.name], work.pipeline.family.vae_factor)
    feeds = part.format.feeds(truth.inputs, work.feeds.inside(truth, sizes))
    blocks = write_blocks(truth, feeds, work.folder, _format(work, part), work.gate_bytes // 2)
    return replace(_whole(work, part), blocks=blocks)


def _format(work: Work, part: Part) -> Precision:
    """The part's precision, with its packings, and ranges of its calibration if it has any."""
    from diffship.exporters.protocol import Bound

    if part.format.packing is not None and isinstance(work.exporter, Bound):
        return work.exporter.bound(work.pipeline.components[part.name])
    return part.format


def _whole(work: Work, part: Part) -> Golden:
    """References of the whole part alone."""
    from diffship.exporters.golden import write_golden

    truth, sizes = work.against[part.name], work.sizes[part.name]
    calls = work.feeds.calls(truth, sizes)
    return write_golden(truth, calls, sizes, work.folder, _format(work, part), work.gate_bytes // 2)


def _unfinished(work: Work, part: Part, trajectory: GoldenTrajectory | None = None) -> Bundle:
    """The draft as a Bundle of one part, whose files are there but not hashed yet."""
    made = Manifest(work.exporter.name, work.pipeline.family, (part,), trajectory=trajectory)
    files = {name: FileRecord((work.folder / name).stat().st_size, "0" * 64) for name in made.named_files()}
    return Bundle(work.folder, replace(made, files=files))


def drawn(work: Work, whole: Pipeline, made: Sequence[Part], steps: int) -> GoldenTrajectory:
    """Draw the golden trajectory with torch; if an engine of this machine reads the target, check that it draws the
    same.

    Raises:
        ParityError: it does not; the message has the figures by step.
    """
    from diffship.exporters.golden_trajectory import write_trajectory
    from diffship.runtimes.engines.engine import choose_engine, make_engine
    from diffship.runtimes.proof.verify_trajectory import check_trajectory

    denoiser = next(part for part in made if part.name == whole.family.kind.denoiser)
    work.job.progress("draw trajectory", 0, 1)
    golden = write_trajectory(
        whole, work.sizes[denoiser.name], work.folder, steps, _format(work, denoiser), work.gate_bytes // 2
    )
    if work.runs_here:
        engine = make_engine(choose_engine(work.exporter.name))
        found = check_trajectory(_unfinished(work, denoiser, golden), golden, engine, work.gate_bytes)
        if found.status == "failed":
            raise ParityError(f"the exported {denoiser.name} does not draw the same: {found.text()}")
    work.job.progress("draw trajectory", 1, 1)
    return golden
