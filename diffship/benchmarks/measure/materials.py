"""What cases need on disk: equal weights for everyone as a diffusers folder, our bundles of them, equal feeds, facts.

Runs as a process of its own (`python -m diffship.benchmarks.measure.materials '{...}'`), so that neither its memory
nor torch counts in the process that measures. Everything is kept by digest: a second run finds it.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.benchmarks.measure.machine import code_digest
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.family import Family
from diffship.core.job import Job, digest_of
from diffship.core.kind import DENOISER
from diffship.core.registry import EXPORTERS, RUNNERS
from diffship.core.strict import load
from diffship.models.saving import save

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline

RANDOM = "random weights"
TRAINED = "trained weights"
WEIGHTS = ("core", "models", "kinds")  # the rooms that make the folder
_TEXT = "sequence_length"
GRAPHS = ("targets", "exporters", "export.py")  # and those that make a bundle of it


@dataclass(frozen=True)
class Order:
    """What to make of one target. batches: images at once. engines: ours that a bundle is made for; folder: whether a
    runner reads the source's weights."""

    target: str
    work: str
    size: int
    guidance: float
    precision: str
    batches: tuple[int, ...]
    parts: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    folder: bool = True


@dataclass(frozen=True)
class Materials:
    """Where things lie, and the facts of each part.

    `folder` (diffusers) is None for a bundle, and if only bundles are measured. `bundles` has what each engine of
    ours reads, `refused` why there is nothing for it. `parts[name]` holds `parameters`, `file_bytes` by "folder" and
    engine, and, for one row at this size, `conv_linear_macs` and `attention_macs` (None if only a bundle is known).
    `feeds[name][batch]` is a safetensors file of canonical inputs. `roles[name]` is what the part does (`core.kind`).
    """

    target: str
    weights: str
    folder: str | None
    bundles: dict[str, str]
    size: int
    rows_per_image: int
    parts: dict[str, dict[str, Any]]
    feeds: dict[str, dict[str, str]]
    roles: dict[str, str]
    refused: dict[str, str] = field(default_factory=dict)


def slug(target: str) -> str:
    """A folder name for a target, unlike that of any other."""
    digest = hashlib.sha256(str(target).encode()).hexdigest()[:8]
    return f"{re.sub('[^a-z0-9]+', '-', target.lower()).strip('-')[-40:]}-{digest}"


def prepare(order: Order) -> Materials:
    """Make what is not there yet.

    Raises:
        ConfigError, SourceError, BundleError, UnsupportedError: the target cannot be read or exported.
    """
    if (Path(order.target) / "diffship.json").is_file():
        return _of_bundle(order)
    return _of_source(order)


def _of_source(order: Order) -> Materials:
    from diffship.models.sources.opening import open_source

    pipeline = open_source(order.target)
    job = Job(Path(order.work) / slug(order.target))
    origin = [order.target, pipeline.source]
    # what an edit elsewhere cannot change is not made again: it is gigabytes and minutes
    key = f"folder-{_digest([origin, code_digest(names=WEIGHTS)])}"
    folder = job.once(key, lambda out: save(pipeline, out)) if order.folder else None
    made_by = _digest([origin, code_digest(names=(*WEIGHTS, *GRAPHS))])
    bundles, refused = _bundles(order, job, folder or order.target, made_by)
    size = order.size or pipeline.family.default_size
    kind = pipeline.family.kind
    chosen = [name for name in kind.parts if name in pipeline.components]
    parts = {
        name: {**_facts(pipeline, name, size), "file_bytes": _bytes(folder, bundles, name, kind.slot_of(name).folder)}
        for name in chosen
    }
    random = pipeline.source.get("kind") == "arch"
    rows = _rows_per_image(pipeline.family, order.guidance)
    roles = {name: kind.role_of(name) for name in chosen}
    feeds = _feeds(order, job, {name: pipeline.components[name] for name in chosen}, size, rows, roles, pipeline.family)
    weights = RANDOM if random else TRAINED
    where = None if folder is None else str(folder)
    return Materials(order.target, weights, where, bundles, size, rows, parts, feeds, roles, refused)


def _bundles(order: Order, job: Job, source: Path | str, origin: str) -> tuple[dict[str, str], dict[str, str]]:
    """(bundle, why there is none) by engine; engines of one target share a bundle.

    Raises:
        DiffshipError: the source has no ONNX graph, without which there is nothing of ours to measure.
    """
    from diffship.runtimes.engines.engine import engine_class

    found: dict[str, str] = {}
    refused: dict[str, str] = {}
    for engine in order.engines:
        for target in sorted(engine_class(engine).targets & set(EXPORTERS)):
            try:
                found[engine] = str(_bundle(order, job, source, origin, target))
            except DiffshipError as fault:
                if target == "onnx":
                    raise
                refused[engine] = str(fault)
    return found, refused


def _bundle(order: Order, job: Job, source: Path | str, origin: str, target: str) -> Path:
    from diffship.export import export

    options: dict[str, Any] = {"precision": order.precision}
    if target == "tensorrt":
        from diffship.runtimes.engines.tensorrt.library import flavour_here

        flavour, sm = flavour_here()
        # the graph is proved as ONNX, and shapes are those that are measured
        options |= {"flavour": flavour, "sm": sm, "verify": False}

    def make(out: Path) -> None:
        export(str(source), to=target, out=out, **options)

    return job.once(f"{target}-{order.precision}-{origin}", make)


def _of_bundle(order: Order) -> Materials:
    """A bundle alone: no layers to count, and nothing that a peer could load."""
    from diffship.core.bundle import Bundle
    from diffship.runtimes.engines.engine import engine_class

    bundle = Bundle.open(order.target)
    manifest = bundle.manifest
    size = order.size or manifest.family.default_size
    rows = _rows_per_image(manifest.family, order.guidance)
    readers = [name for name in RUNNERS if manifest.target in engine_class(name).targets]
    parts, known = {}, {part.name: part for part in manifest.parts}
    kind = manifest.family.kind
    for name in (name for name in kind.parts if name in known):
        size_bytes = sum(manifest.files[file].size for file in known[name].files)
        unknown = dict.fromkeys(("conv_linear_macs", "attention_macs"))
        parameters = known[name].extra.get("parameters")
        parts[name] = {"parameters": parameters, **unknown, "file_bytes": dict.fromkeys(readers, size_bytes)}
    job = Job(Path(order.work) / slug(order.target))
    roles = {name: kind.role_of(name) for name in parts}
    feeds = _feeds(order, job, {name: known[name] for name in parts}, size, rows, roles, manifest.family)
    random = str(manifest.source.get("kind")) == "arch"
    weights = RANDOM if random else TRAINED
    bundles = dict.fromkeys(readers, order.target)
    return Materials(order.target, weights, None, bundles, size, rows, parts, feeds, roles)


def _rows_per_image(family: Family, guidance: float) -> int:
    """Two with classifier-free guidance, one without or if the model takes none or takes it as an input."""
    return 2 if guidance > 1 and family.guided and not family.takes_guidance else 1


def _facts(pipeline: Pipeline, name: str, size: int) -> dict[str, Any]:
    from diffship.models.walks.cost import cost

    part = pipeline.components[name]
    found = cost(part, _sizes(pipeline.family, size, 1, part.smallest_sizes().get(_TEXT, 77)))
    macs = {"conv_linear_macs": found.conv_linear_macs, "attention_macs": found.attention_macs}
    return {"parameters": found.params, **macs}


def _sizes(family: Family, size: int, batch: int, text: int = 77) -> dict[str, int]:
    """Sizes of the axes of all parts for pictures of `size` pixels a side and texts of `text` tokens."""
    latent = {f"latent_{side}": size // family.kind.decoder_factor(family) for side in ("height", "width")}
    pixels = {f"{prefix}{side}": size for prefix in ("image_", "sample_") for side in ("height", "width")}
    drawn = family.kind.axis_sizes(family, size, size)
    return {"batch_size": batch, "sequence_length": text, **latent, **pixels, **drawn}


def _bytes(folder: Path | None, bundles: Mapping[str, str], name: str, own: str) -> dict[str, int]:
    """Weight files of a part in its folder `own` of the diffusers folder (a VAE's both halves in one) and in each
    engine's bundle."""
    found = {}
    if folder is not None:
        found["folder"] = sum(file.stat().st_size for file in (folder / own).glob("*.safetensors"))
    for engine, bundle in bundles.items():
        files = [file for file in (Path(bundle) / name).glob("*") if file.suffix != ".json"]
        found[engine] = sum(file.stat().st_size for file in files)
    return found


def _feeds(
    order: Order, job: Job, parts: Mapping[str, Any], size: int, rows: int, roles: Mapping[str, str], family: Family
) -> dict[str, dict[str, str]]:
    """Feeds of every wanted part for every batch; a denoiser has `rows` rows per image."""
    from safetensors.numpy import save_file

    found: dict[str, dict[str, str]] = {}
    for name, part in parts.items():
        if order.parts and name not in order.parts:
            continue
        for batch in order.batches:
            count = batch * rows if roles[name] == DENOISER else batch
            arrays = _example(part, count, size, family)
            key = _digest([order.target, name, count, size, [list(array.shape) for array in arrays.values()]])
            file = job.once(f"feeds-{key}", lambda out, arrays=arrays: save_file(arrays, out))  # type: ignore[misc]
            found.setdefault(name, {})[str(batch)] = str(file)
    return found


def _example(part: Any, rows: int, size: int, family: Family) -> dict[str, Any]:
    """Feeds of a Component, or of a manifest's Part, which has the same specs and no config."""
    import numpy as np

    if hasattr(part, "example"):
        sizes = _sizes(family, size, rows, part.smallest_sizes().get(_TEXT, 77))
        return dict(part.example(0, sizes))
    known = part.golden.sizes if part.golden is not None else {}
    sizes, rng = _sizes(family, size, rows, known.get(_TEXT, 77)), np.random.default_rng(0)
    return {spec.name: _plain(spec, sizes, rng) for spec in part.inputs}


def _plain(spec: Any, sizes: Mapping[str, int], rng: Any) -> Any:
    import numpy as np

    shape = spec.resolve(sizes)
    if spec.name in ("input_ids", "attention_mask"):
        return np.ones(shape, np.int64)
    if spec.name in ("timestep", "time_ids"):
        return np.full(shape, 500.0 if spec.name == "timestep" else float(sizes["image_height"]), np.float32)
    return rng.standard_normal(shape).astype(np.float32)


def _digest(value: object) -> str:
    return digest_of(value)[:16]


def main() -> None:
    from diffship.benchmarks.measure.clock import report

    try:
        report(asdict(prepare(load(Order, json.loads(sys.argv[1]), "order"))))
    except DiffshipError as fault:
        report({"error": str(fault), "exit_code": fault.exit_code})
        raise SystemExit(1) from None


def read_materials(document: Mapping[str, Any]) -> Materials:
    """What `main` printed.

    Raises:
        ConfigError: it printed why it could not.
    """
    if "error" in document:
        raise ConfigError(str(document["error"]))
    return load(Materials, document, "materials")


if __name__ == "__main__":
    main()
