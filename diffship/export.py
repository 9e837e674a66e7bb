"""export: source to bundle, proved. The one place that joins exporter, golden vectors (torch) and runner (engine)."""

from __future__ import annotations

import importlib.metadata
import math
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeAlias

from diffship.core.bundle import Bundle, FileRecord, require_place, write_bundle
from diffship.core.errors import BundleError, ConfigError, MissingExtra, ParityError, SourceError, UnsupportedError
from diffship.core.job import Job, available_memory, require_disk, require_memory
from diffship.core.leftovers import temporary_folder
from diffship.core.limits import LIMITS, check_range
from diffship.core.load_options import AS_SAID, LoadOptions
from diffship.core.manifest import Golden, GoldenTrajectory, Manifest, Part, parse_manifest
from diffship.core.precision import Precision
from diffship.core.problem import refuse
from diffship.core.registry import EXPORTERS, load
from diffship.core.strict import load as load_options
from diffship.core.strict import unknown

if TYPE_CHECKING:
    from diffship.exporters.golden_feeds import GoldenFeeds
    from diffship.exporters.protocol import BuiltFromGraph, Exporter, Packaging
    from diffship.exporters.staged import StagedFeeds
    from diffship.models.parts.component import Component
    from diffship.models.pipeline import Pipeline

BATCH = 2  # samples of a golden call, at different timesteps: one value for all would not show one that is ignored
GATE_BYTES = 1 << 30  # memory for one stage of the proof, so that a part of any size is proved in a small process
_MIN_GATE = 512 << 20
_SIDE_BYTES = 16 << 20  # golden vectors, tokenizers and configs
_PACKAGES = (
    "diffship",
    "torch",
    "diffusers",
    "transformers",
    "onnx",
    "onnxruntime",
    "coremltools",
    "numpy",
    "safetensors",
)


AnyExporter: TypeAlias = "Exporter | BuiltFromGraph | Packaging"


@dataclass(frozen=True)
class _Work:
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


def export(
    source: str | Path | Pipeline,
    to: str = "onnx",
    out: str | Path = "",
    *,
    parts: Iterable[str] | None = None,
    verify: bool = True,
    trajectory: int | None = None,
    base: str | None = None,
    revision: str | None = None,
    loading: LoadOptions = AS_SAID,
    overwrite: bool = False,
    clip_skip: int | None = None,
    embeddings: Sequence[str] = (),
    job: Job | None = None,
    against: Pipeline | None = None,
    controlnets: Mapping[str, str] | None = None,
    stages: int | None = None,
    cut: str | None = None,
    **options: Any,
) -> Bundle:
    """Compile `source` for target `to` into the folder `out`, and prove each part against torch.

    Options are the fields of the exporter (`precision`, `opset`). Nothing appears at `out` unless all parts pass; with
    `verify=False` the manifest says "unproven". `trajectory` is how many denoising steps lie in the bundle for `verify`
    to draw again (default: what the target says). `base`, `revision` and `loading` are those of `open_source`. A `job`
    with a folder keeps graphs for the next export.

    With `clip_skip` N the CLIP text encoders also give the states without their last 1 to N layers, for pictures with
    clip-skip up to N. `embeddings` are textual inversions, FILE or WORD=FILE, whose words prompts may then use.

    `against` is a pipeline with the same parts. If it is given, torch computes the references from it instead of from
    `source`: so a graph of one implementation is proved against another.

    `controlnets` are folders or hub ids by the name that each gets in the bundle. Its denoiser is then there twice: as
    it was, and as a graph over the same weights that takes their residuals.
    `stages` cuts the denoiser for that many devices (`exporters.staged.find_staging`): each stage is a part of its own,
    proved on what the stages before it give. `cut` says where.

    Without torch, `emoji` alone can be exported: the package ships its proved bundle, to which weights are added.

    Raises:
        MissingExtra: torch is needed and not installed.
        ConfigError: an unknown target, option or part, or the place is taken.
        SourceError: the source cannot be read, or its weights are damaged.
        UnsupportedError: a part has no form in this target, or disk or memory do not suffice.
        ParityError: a part does not compute the same; the message has the figures.
    """
    from diffship.exporters.card import write_card
    from diffship.exporters.staged import check_stages, find_staging, references, staged
    from diffship.models.inversions import with_texts
    from diffship.models.sources.controlnet import with_controlnets

    exporter: AnyExporter = load_options(load(EXPORTERS, to, "target"), options, f"target {to}")
    if not str(out):
        raise ConfigError("no folder for the bundle is given; name one with -o DIR")
    require_place(out, overwrite)  # before torch is imported, which takes seconds
    job = job or Job()
    if find_spec("torch") is None:
        changes = (parts, base, clip_skip, trajectory or None, embeddings or None, controlnets, stages)
        usual = all(one is None for one in changes) and loading == AS_SAID
        plain = usual and verify and exporter == type(exporter)()
        return _restored(source, to, Path(out), overwrite, job) if plain else _without_torch()
    whole = with_texts(_opened(source, base, revision, loading), embeddings, clip_skip)
    if controlnets:
        if stages is not None:
            raise UnsupportedError("a denoiser in stages takes no ControlNets: leave --stages or --controlnet out")
        whole = with_controlnets(whole, controlnets, exporter.name)
    pipeline = _chosen(whole, parts)
    truth = whole if against is None else with_texts(against, embeddings, clip_skip)
    check_stages(exporter, stages, cut, trajectory)
    staging = None if stages is None else find_staging(pipeline, stages, cut)
    pipeline = pipeline if staging is None else staged(pipeline, staging)
    _check(exporter, pipeline, Path(out), verify)
    runs_here = _runs_here(exporter, verify)
    sizes = _golden_sizes(exporter, pipeline)
    steps = _steps(exporter, whole, sizes.get(whole.family.kind.denoiser), verify, trajectory, job)
    started, gate = time.perf_counter(), _gate_bytes()
    with write_bundle(out, overwrite) as draft:
        truth = _held(exporter, truth)
        work = _Work(
            exporter, pipeline, draft.folder, job, gate, sizes, runs_here, *references(truth, staging, gate // 2)
        )
        made = [_made(work, component, verify) for component in pipeline.components.values()]
        exporter.finish(pipeline, draft.folder)
        drawn = _drawn(work, truth, made, steps) if steps else None
        manifest = _manifest(exporter, pipeline, made, round(time.perf_counter() - started, 1))
        manifest = replace(manifest, trajectory=drawn, staging=staging)
        write_card(manifest, draft.folder, pipeline.licence)
        return draft.finish(manifest)


def _held(exporter: AnyExporter, pipeline: Pipeline) -> Pipeline:
    """`pipeline` as torch must compute it to be compared with what `exporter` writes."""
    from diffship.exporters.protocol import Packaging

    if not isinstance(exporter, Packaging):
        return pipeline
    parts = {name: exporter.held(component) for name, component in pipeline.components.items()}
    return replace(pipeline, components=parts)


def _restored(source: str | Path | Pipeline, to: str, out: Path, overwrite: bool, job: Job) -> Bundle:
    """The bundle of `source` that the package ships without weights, and its weights added: what an export with torch
    would write."""
    from diffship.exporters.onnx.prepared import restore
    from diffship.models.sources.opening import packaged

    home = packaged(str(source))
    if home is None or not (home / to).is_dir():
        return _without_torch()
    job.progress(f"restore {source}", 0, 1)
    bundle = restore(home / to, home, out, overwrite)
    job.progress(f"restore {source}", 1, 1)
    return bundle


def _without_torch() -> NoReturn:
    raise MissingExtra("torch", "torch,onnx")


def _opened(source: str | Path | Pipeline, base: str | None, revision: str | None, loading: LoadOptions) -> Pipeline:
    if not isinstance(source, (str, Path)):
        return source
    from diffship.compression.vae_beside import open_tried

    return open_tried(str(source), base, revision, loading)


def _chosen(pipeline: Pipeline, parts: Iterable[str] | None) -> Pipeline:
    if parts is None:
        return pipeline
    wanted = list(dict.fromkeys(parts))
    for name in wanted:
        if name not in pipeline.components:
            raise ConfigError(unknown("part", name, pipeline.components))
    if not wanted:
        raise ConfigError(f"no part is chosen; this source has {', '.join(pipeline.components)}")
    chosen = [pipeline.components[name] for name in wanted]
    for part in chosen:
        if part.shares is not None and part.shares not in wanted:
            raise ConfigError(f"part {part.name} lies over the data of {part.shares}: name both in --parts, or neither")
    chosen.sort(key=lambda part: part.shares is not None)  # after the part whose data it is over
    return replace(pipeline, components={part.name: part for part in chosen})


def _check(exporter: AnyExporter, pipeline: Pipeline, out: Path, verify: bool) -> None:
    """All that can be known to fail, before any work."""
    refuse(exporter.check(pipeline))
    _rehearse(exporter, pipeline)
    components = pipeline.components.values()
    require_disk(out, sum(map(exporter.disk_bytes, components)) + _SIDE_BYTES, "the bundle")
    if verify:
        # a part that is proved in stages has one of them in a temporary folder
        largest = max(map(exporter.disk_bytes, components))
        require_disk(tempfile.gettempdir(), min(largest, GATE_BYTES // 2), "the proof (see TMPDIR)")
    require_memory(max(map(exporter.memory_bytes, components)), "the export")


def _rehearse(exporter: AnyExporter, pipeline: Pipeline) -> None:
    """Write and read a manifest with everything that the source says of itself.

    Raises:
        SourceError: it says something that no manifest can hold.
    """
    parts = [
        Part(part.name, ("file",), part.inputs, part.outputs, "fp32", "0" * 64) for part in pipeline.components.values()
    ]
    try:
        parse_manifest(_manifest(exporter, pipeline, parts, 0.0).to_bytes())
    except BundleError as fault:
        raise SourceError(
            f"{pipeline.source.get('id')}: no bundle could be opened with what it says: {fault}"
        ) from None


def _runs_here(exporter: AnyExporter, verify: bool) -> bool:
    """Whether an engine of this machine reads what the exporter writes.

    Raises:
        UnsupportedError: there is none, and the proof needs one; MissingExtra if it can be installed.
    """
    from diffship.exporters.protocol import BuiltFromGraph
    from diffship.runtimes.engines.engine import choose_engine

    if not verify:
        return False
    built = isinstance(exporter, BuiltFromGraph)
    try:
        choose_engine("onnx" if built else exporter.name)
    except UnsupportedError:
        if isinstance(exporter, BuiltFromGraph) or exporter.proved_here:
            raise
        return False
    return not built


def _steps(
    exporter: AnyExporter,
    whole: Pipeline,
    sizes: dict[str, int] | None,
    verify: bool,
    asked: int | None,
    job: Job,
) -> int:
    """How many steps the golden trajectory has: those `asked` for, else the target's default, or 0 if none can be
    drawn.

    sizes: of the denoiser by axis; None if it is not exported.
    """
    from diffship.exporters.golden_trajectory import why_not

    reason = "the proof is skipped" if not verify else f"{whole.family.kind.denoiser} is not exported"
    if verify and sizes is not None:
        reason = why_not(whole, sizes, exporter.trajectory_steps if asked is None else asked)
    if asked is None:
        if reason and verify and exporter.trajectory_steps:
            job.progress(f"no golden trajectory: {reason}", 1, 1)
        return 0 if reason else int(exporter.trajectory_steps)
    check_range("trajectory", asked, 0, LIMITS.steps[1])
    if asked and reason:
        raise ConfigError(f"there can be no golden trajectory: {reason}. Leave --trajectory out")
    return asked


def _golden_sizes(exporter: AnyExporter, pipeline: Pipeline) -> dict[str, dict[str, int]]:
    parts = pipeline.components.items()
    return {name: exporter.golden_sizes(component, pipeline.family, BATCH) for name, component in parts}


def _gate_bytes() -> int:
    free = available_memory()
    return GATE_BYTES if free is None else max(min(GATE_BYTES, free // 2), _MIN_GATE)


def _made(work: _Work, component: Component, verify: bool) -> Part:
    from diffship.exporters.protocol import BuiltFromGraph

    if isinstance(work.exporter, BuiltFromGraph):
        return _through_graph(work, work.exporter, component, verify)
    return _part(work, work.exporter, component, verify)


def _part(work: _Work, exporter: Exporter | Packaging, component: Component, verify: bool) -> Part:
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


def _unproven(work: _Work, component: Component, part: Part) -> Part:
    """`part` with golden vectors, for a machine that has an engine for it."""
    reason = "no engine of this machine runs it: `diffship verify` proves it on one that has an engine"
    return replace(part, golden=_whole(work, part), proof={"status": "unproven", "reason": reason})


def _through_graph(work: _Work, exporter: BuiltFromGraph, component: Component, verify: bool) -> Part:
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


def _proved(work: _Work, exporter: Exporter | Packaging, component: Component, part: Part) -> Part:
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


def _golden(work: _Work, part: Part) -> Golden:
    """References of the whole part and of its blocks."""
    from diffship.exporters.golden_blocks import block_sizes, write_blocks

    truth = work.against[part.name]
    sizes = block_sizes(work.sizes[part.name], work.pipeline.family.vae_factor)
    feeds = part.format.feeds(truth.inputs, work.feeds.inside(truth, sizes))
    blocks = write_blocks(truth, feeds, work.folder, _format(work, part), work.gate_bytes // 2)
    return replace(_whole(work, part), blocks=blocks)


def _format(work: _Work, part: Part) -> Precision:
    """The part's precision, with its packings, and ranges of its calibration if it has any."""
    from diffship.exporters.protocol import Bound

    if part.format.packing is not None and isinstance(work.exporter, Bound):
        return work.exporter.bound(work.pipeline.components[part.name])
    return part.format


def _whole(work: _Work, part: Part) -> Golden:
    """References of the whole part alone."""
    from diffship.exporters.golden import write_golden

    truth, sizes = work.against[part.name], work.sizes[part.name]
    calls = work.feeds.calls(truth, sizes)
    return write_golden(truth, calls, sizes, work.folder, _format(work, part), work.gate_bytes // 2)


def _unfinished(work: _Work, part: Part, trajectory: GoldenTrajectory | None = None) -> Bundle:
    """The draft as a Bundle of one part, whose files are there but not hashed yet."""
    made = Manifest(work.exporter.name, work.pipeline.family, (part,), trajectory=trajectory)
    files = {name: FileRecord((work.folder / name).stat().st_size, "0" * 64) for name in made.named_files()}
    return Bundle(work.folder, replace(made, files=files))


def _drawn(work: _Work, whole: Pipeline, made: Sequence[Part], steps: int) -> GoldenTrajectory:
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


def _manifest(exporter: AnyExporter, pipeline: Pipeline, parts: list[Part], seconds: float) -> Manifest:
    recipe = {"schema": 1, "source": pipeline.source.get("id"), "target": [{"to": exporter.name, **asdict(exporter)}]}
    return Manifest(
        target=exporter.name,
        family=pipeline.family,
        parts=tuple(parts),
        sampler=dict(pipeline.scheduler),
        source=dict(pipeline.source),
        recipe=recipe,
        history=list(pipeline.history),
        tools={**_tools(), "python": platform.python_version(), "export_seconds": seconds},
        licence=dict(pipeline.licence),
    )


def _tools() -> Mapping[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
