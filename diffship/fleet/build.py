"""export_fleet: every target of a recipe from one source, checked together before the first export starts."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.bundle import Bundle, require_place
from diffship.core.errors import (
    BundleError,
    Cancelled,
    ConfigError,
    DiffshipError,
    MissingExtra,
    SourceError,
    UnsupportedError,
)
from diffship.core.job import Job, require_disk
from diffship.core.lazy import need
from diffship.core.limits import LIMITS, check_range
from diffship.core.load_options import AS_SAID, LoadOptions
from diffship.core.manifest import MANIFEST_NAME
from diffship.core.problem import refuse
from diffship.export import SIDE_BYTES, choose_parts, engine_here, export, open_given
from diffship.fleet.done import Source, Wanted, difference
from diffship.fleet.recipe import FleetTarget, require_distinct

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline


@dataclass(frozen=True)
class Outcome:
    """What became of one target: "made", "kept" (it was there already), "skipped" (optional, and not installed here) or
    "failed". `bundle` is given for the first two, `fault` for the last two."""

    target: FleetTarget
    state: str
    bundle: Bundle | None = None
    fault: DiffshipError | None = None


@dataclass(frozen=True)
class FleetReport:
    """What became of each target, in the order of the recipe. `digests`: sha256 (hex) over the source tensors by part,
    which all bundles have in common."""

    folder: Path
    outcomes: tuple[Outcome, ...]
    digests: Mapping[str, str]

    @property
    def exit_code(self) -> int:
        """That of the first failure; 0 if nothing failed."""
        return next((one.fault.exit_code for one in self.outcomes if one.state == "failed" and one.fault), 0)


def export_fleet(
    source: str | Path | Pipeline,
    targets: Sequence[FleetTarget],
    out: str | Path,
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
    controlnets: Mapping[str, str] | None = None,
    job: Job | None = None,
) -> FleetReport:
    """Compile `source` for all `targets`, each into the folder `out`/NAME, as `diffship.export.export` does for one.
    The keyword arguments are those of `export` and hold for every target.

    The source is opened once, and a graph that two targets need is made once. All targets are checked before the first
    export starts. A bundle that is there already and was made of the same weights with the same options is kept, so
    that the same call goes on with what is missing; any other is replaced with `overwrite` alone. A target that fails
    does not stop the others: the report has its error.

    Raises:
        ConfigError: no target, two of one name, an option that is not legal, or a place is taken by something else.
        SourceError: the source cannot be read.
        UnsupportedError: a target is not installed here and not optional, a part has no form in it, or the disk is too
            small for all of them.
        Cancelled: the job was stopped; finished bundles stay.
    """
    from diffship.models.inversions import with_texts

    require_distinct(targets, "the fleet")
    if trajectory is not None:
        check_range("trajectory", trajectory, 0, LIMITS.steps[1])
    folder = _fleet_folder(out)
    need("torch")
    opened, job = open_given(source, base, revision, loading), job or Job()
    whole = _controlled(with_texts(opened, embeddings, clip_skip), controlnets, targets)
    parts = None if parts is None else tuple(parts)
    shared = Source(choose_parts(whole, parts))
    wanted = [Wanted(target.exporter, shared, verify, trajectory) for target in targets]
    plans = [_plan(target, one, folder, overwrite) for target, one in zip(targets, wanted, strict=True)]
    _require_room(folder, [one for one, plan in zip(wanted, plans, strict=True) if plan is None])
    options: dict[str, Any] = {"parts": parts, "verify": verify, "trajectory": trajectory, "clip_skip": clip_skip}
    options |= {"embeddings": embeddings, "controlnets": controlnets, "overwrite": overwrite, "job": job}
    with _made(folder):
        outcomes = [
            plan or _export(opened, target, folder, shared, options)
            for target, plan in zip(targets, plans, strict=True)
        ]
    return FleetReport(folder, tuple(outcomes), shared.digests)


def _fleet_folder(out: str | Path) -> Path:
    """`out`, if bundles can be put into it."""
    if not str(out):
        raise ConfigError("no folder for the fleet is given; name one with -o DIR")
    folder = Path(os.path.abspath(out))
    if (folder / MANIFEST_NAME).exists():
        raise ConfigError(f"{folder} is a bundle; a fleet is a folder of bundles: choose another one")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; a fleet is a folder of bundles: choose another one")
    if not folder.parent.is_dir():
        raise ConfigError(f"{folder.parent} is not a folder; create it first: mkdir -p {folder.parent}")
    return folder


def _controlled(pipeline: Pipeline, sources: Mapping[str, str] | None, targets: Sequence[FleetTarget]) -> Pipeline:
    """`pipeline` with ControlNets, which every target must have a form for."""
    if not sources:
        return pipeline
    from diffship.models.sources.controlnet import with_controlnets

    return [with_controlnets(pipeline, sources, target.exporter.name) for target in targets][-1]


def _plan(target: FleetTarget, wanted: Wanted, folder: Path, overwrite: bool) -> Outcome | None:
    """The outcome of a target for which there is nothing to do; None if it is to be exported.

    Raises:
        ConfigError, UnsupportedError: it cannot be; the message begins with the target's name.
    """
    place = folder / target.name
    try:
        if (kept := _kept(place, wanted, overwrite)) is not None:
            return Outcome(target, "kept", kept)
        refuse(target.exporter.check(wanted.pipeline))
        engine_here(target.exporter, wanted.verify)
    except MissingExtra as fault:
        if target.optional:
            return Outcome(target, "skipped", fault=fault)
        told = f"target {target.name}: {fault}, or say optional = true in its [[target]]"
        raise UnsupportedError(told) from fault
    except DiffshipError as fault:
        raise type(fault)(f"target {target.name}: {fault}") from fault
    return None


def _kept(place: Path, wanted: Wanted, overwrite: bool) -> Bundle | None:
    """The bundle at `place` if it is the one that is wanted; None if the place is free, or to be overwritten.

    Raises:
        ConfigError: something else is there.
    """
    if not os.path.lexists(place) or (place.is_dir() and not any(place.iterdir())):
        require_place(place)
        return None
    try:
        bundle = Bundle.open(place)
        why = difference(bundle, wanted)
    except (BundleError, SourceError) as fault:
        why = str(fault)
    else:
        if not why:
            return bundle
    if not overwrite:
        raise ConfigError(
            f"{place} is there and not what is asked for: {why}. Pass --overwrite, or choose another -o DIR"
        )
    require_place(place, overwrite)
    return None


def _require_room(folder: Path, wanted: Sequence[Wanted]) -> None:
    """Raises UnsupportedError if the disk cannot hold all the bundles that are to be made."""
    sizes = [one.exporter.disk_bytes(part) for one in wanted for part in one.pipeline.components.values()]
    require_disk(folder, sum(sizes) + len(wanted) * SIDE_BYTES, "the fleet")


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """The folder of the fleet, made if it is missing; then it is removed at the end if nothing came into it."""
    missing = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
        yield
    finally:
        if missing:
            with suppress(OSError):
                folder.rmdir()


def _export(opened: Pipeline, target: FleetTarget, folder: Path, shared: Source, options: Mapping[str, Any]) -> Outcome:
    """Make one bundle; a failure is an outcome, and stops nobody else."""
    options["job"].progress(f"target {target.name}", 1, 1)
    given = {field.name: getattr(target.exporter, field.name) for field in fields(target.exporter)}
    try:
        bundle = export(opened, target.exporter.name, folder / target.name, **options, **given)
        _require_source(bundle, shared)
    except Cancelled:
        raise
    except DiffshipError as fault:
        return Outcome(target, "failed", fault=fault)
    return Outcome(target, "made", bundle)


def _require_source(bundle: Bundle, shared: Source) -> None:
    """Raises SourceError if the weights of `bundle` are not those that the others were made of."""
    made = {part.name: part.source_digest for part in bundle.manifest.parts}
    for name, digest in shared.digests.items():
        if made.get(name) != digest:
            raise SourceError(
                f"the weights of {name} are not those that the fleet began with: the source changed meanwhile. Run it "
                "again, with --overwrite, once nobody writes to it"
            )
