"""Whether a bundle that is there already is the one that an export would make, told from its manifest and its files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from diffship.core.bundle import Bundle
from diffship.core.bundle_check import digest_file
from diffship.core.errors import ConfigError
from diffship.core.leftovers import temporary_folder
from diffship.core.manifest import Manifest
from diffship.core.safetensors_file import read_header
from diffship.core.strict import load, plain
from diffship.models.digests import remembered_digest
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline


@dataclass(frozen=True)
class Source:
    """What all bundles of a fleet are made of: the chosen parts alone, with their ControlNets and words."""

    pipeline: Pipeline

    @cached_property
    def digests(self) -> dict[str, str]:
        """sha256 (hex) over the source tensors, by part; the first time it reads all of them."""
        return {name: remembered_digest(part.weights) for name, part in self.pipeline.components.items()}


@dataclass(frozen=True)
class Wanted:
    """One bundle that is asked for. `trajectory`: denoising steps that lie in it; None for any number."""

    exporter: Any
    source: Source
    verify: bool
    trajectory: int | None

    @property
    def pipeline(self) -> Pipeline:
        """What it is made of."""
        return self.source.pipeline


def difference(bundle: Bundle, wanted: Wanted) -> str:
    """How `bundle` differs from what an export of `wanted` would write, in a few words; "" if it does not.

    The bundle counts as the same if its target, its exporter's options, its parts, the weights that they were made of,
    the family, scheduler and tokenizers are, and if it has the proof that is asked for. Where the source lay, which
    versions wrote it and how long that took do not count.
    """
    looks: tuple[Callable[[Bundle, Wanted], Iterator[str]], ...] = (_options, _parts, _outputs, _pipeline, _proof)
    return next((told for look in looks for told in look(bundle, wanted)), "")


def _options(bundle: Bundle, wanted: Wanted) -> Iterator[str]:
    manifest, exporter = bundle.manifest, wanted.exporter
    if manifest.target != exporter.name:
        yield f"it is for {manifest.target}, and {exporter.name} is asked for"
        return
    try:
        made = _exporter(manifest, type(exporter))
    except ConfigError as fault:
        yield f"this version does not know its options: {fault}"
        return
    for field in fields(exporter):
        was, asked = getattr(made, field.name), getattr(exporter, field.name)
        if was != asked:
            yield f"its {field.name} is {_shown(was)}, and {_shown(asked)} is asked for"
    yield from _calibration(manifest, exporter)


def _exporter(manifest: Manifest, cls: type[Any]) -> Any:
    """The exporter that wrote a bundle, from the recipe in its manifest."""
    steps = manifest.recipe.get("target")
    entry = steps[0] if isinstance(steps, list) and steps and isinstance(steps[0], dict) else {}
    return load(cls, {key: value for key, value in entry.items() if key != "to"}, "its recipe")


def _calibration(manifest: Manifest, exporter: Any) -> Iterator[str]:
    """Another calibration in a folder of the same name."""
    folder = plain(exporter).get("calibration")
    if not folder:
        return
    from diffship.calibration.stored import calibration_digest

    used = [part.extra["calibration"] for part in manifest.parts if "calibration" in part.extra]
    if {said.get("digest") for said in used if isinstance(said, dict)} != {calibration_digest(folder)}:
        yield f"it was made with another calibration than {folder} holds now"


def _parts(bundle: Bundle, wanted: Wanted) -> Iterator[str]:
    made = {part.name: part.source_digest for part in bundle.manifest.parts}
    was, asked = (", ".join(sorted(names)) for names in (made, wanted.pipeline.components))
    if was != asked:
        yield f"its parts are {was}, and {asked} are asked for"
        return
    for name, digest in wanted.source.digests.items():
        if made[name] != digest:
            yield f"its {name} was made of other weights than the source has"


def _outputs(bundle: Bundle, wanted: Wanted) -> Iterator[str]:
    """Clip-skip is such: states of earlier layers, which are more outputs of the same weights."""
    for part in bundle.manifest.parts:
        made = [spec.name for spec in part.outputs]
        asked = [spec.name for spec in _held(wanted.exporter, wanted.pipeline.components[part.name]).outputs]
        if made != asked:
            yield f"its {part.name} gives {', '.join(made)}, and {', '.join(asked)} is asked for"


def _held(exporter: Any, component: Component) -> Component:
    from diffship.exporters.protocol import Packaging

    return exporter.held(component) if isinstance(exporter, Packaging) else component


def _pipeline(bundle: Bundle, wanted: Wanted) -> Iterator[str]:
    """The family, and the files of the whole pipeline: they are small, so they are written once more and compared."""
    if bundle.manifest.family != wanted.pipeline.family:
        yield "its family has other numbers than the source's"
    with temporary_folder("fleet") as folder:
        wanted.exporter.finish(wanted.pipeline, folder)
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            name = path.relative_to(folder).as_posix()
            record = bundle.manifest.files.get(name)
            if record is None or record.sha256 != digest_file(path):
                yield f"its {name} is not the source's"


def _proof(bundle: Bundle, wanted: Wanted) -> Iterator[str]:
    if wanted.verify and any(part.golden is None for part in bundle.manifest.parts):
        yield "it has no proof (--no-verify)"
    if wanted.trajectory is not None and wanted.trajectory != _steps(bundle):
        yield f"its golden trajectory has {_steps(bundle)} steps, and {wanted.trajectory} are asked for"


def _steps(bundle: Bundle) -> int:
    """Denoising steps of the golden trajectory; 0 if there is none."""
    golden = bundle.manifest.trajectory
    if golden is None:
        return 0
    return sum(name.startswith("step.") for name in read_header(Path(bundle.path, golden.latents)).entries)


def _shown(value: object) -> str:
    return "not set" if value in ("", (), None) else str(plain(value))
