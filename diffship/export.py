"""export: source to bundle, proved. The one place that joins exporter, golden vectors (torch) and runner (engine)."""

from __future__ import annotations

import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from diffship.core.bundle import Bundle, require_place, write_bundle
from diffship.core.errors import BundleError, ConfigError, MissingExtra, SourceError, UnsupportedError
from diffship.core.job import Job, available_memory, require_disk, require_memory
from diffship.core.limits import LIMITS, check_range
from diffship.core.load_options import AS_SAID, LoadOptions
from diffship.core.manifest import Manifest, Part, parse_manifest
from diffship.core.problem import refuse
from diffship.core.registry import EXPORTERS, load
from diffship.core.strict import load as load_options
from diffship.core.strict import unknown
from diffship.proved_part import BATCH, AnyExporter, Work, drawn, made_part

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline

GATE_BYTES = 1 << 30  # memory for one stage of the proof, so that a part of any size is proved in a small process
_MIN_GATE = 512 << 20
SIDE_BYTES = 16 << 20  # golden vectors, tokenizers and configs
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
    whole = with_texts(open_given(source, base, revision, loading), embeddings, clip_skip)
    if controlnets:
        if stages is not None:
            raise UnsupportedError("a denoiser in stages takes no ControlNets: leave --stages or --controlnet out")
        whole = with_controlnets(whole, controlnets, exporter.name)
    pipeline = choose_parts(whole, parts)
    truth = whole if against is None else with_texts(against, embeddings, clip_skip)
    check_stages(exporter, stages, cut, trajectory)
    staging = None if stages is None else find_staging(pipeline, stages, cut)
    pipeline = pipeline if staging is None else staged(pipeline, staging)
    _check(exporter, pipeline, Path(out), verify)
    runs_here = engine_here(exporter, verify)
    sizes = _golden_sizes(exporter, pipeline)
    steps = _steps(exporter, whole, sizes.get(whole.family.kind.denoiser), verify, trajectory, job)
    started, gate = time.perf_counter(), _gate_bytes()
    with write_bundle(out, overwrite) as draft:
        truth = _held(exporter, truth)
        work = Work(
            exporter, pipeline, draft.folder, job, gate, sizes, runs_here, *references(truth, staging, gate // 2)
        )
        made = [made_part(work, component, verify) for component in pipeline.components.values()]
        exporter.finish(pipeline, draft.folder)
        golden = drawn(work, truth, made, steps) if steps else None
        manifest = _manifest(exporter, pipeline, made, round(time.perf_counter() - started, 1))
        manifest = replace(manifest, trajectory=golden, staging=staging)
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


def open_given(source: str | Path | Pipeline, base: str | None, revision: str | None, loading: LoadOptions) -> Pipeline:
    """`source` itself if it is open already."""
    if not isinstance(source, (str, Path)):
        return source
    from diffship.compression.vae_beside import open_tried

    return open_tried(str(source), base, revision, loading)


def choose_parts(pipeline: Pipeline, parts: Iterable[str] | None) -> Pipeline:
    """`pipeline` with these parts alone, or with all of them for None.

    Raises:
        ConfigError: it has no such part, none is named, or one lies over the data of a part that is not.
    """
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
    require_disk(out, sum(map(exporter.disk_bytes, components)) + SIDE_BYTES, "the bundle")
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


def engine_here(exporter: AnyExporter, verify: bool) -> bool:
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


def _manifest(exporter: AnyExporter, pipeline: Pipeline, parts: list[Part], seconds: float) -> Manifest:
    recipe = {"schema": 1, "source": pipeline.source.get("id"), "target": [{"to": exporter.name, **_options(exporter)}]}
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


def _options(exporter: AnyExporter) -> dict[str, Any]:
    """The options that the recipe tells: all but later ones at their default, which older bundles do not have."""
    quiet = {
        one.name for one in fields(exporter) if one.metadata.get("later") and getattr(exporter, one.name) == one.default
    }
    return {name: value for name, value in asdict(exporter).items() if name not in quiet}


def _tools() -> Mapping[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
