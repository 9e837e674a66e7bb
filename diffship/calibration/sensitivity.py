"""How much each layer matters: what the output loses if that layer alone is quantised, and a budget spent by it.

Errors of single layers are added up as if they were independent, as HAWQ-V2 adds up its perturbations (Dong et al.
2020, arXiv 1911.03852). What came out of all of them together stands beside the prediction in a bundle's manifest.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.calibration.budget import Option, solve
from diffship.calibration.capture import Capture
from diffship.calibration.packed import packed_bytes
from diffship.calibration.packings import packings
from diffship.calibration.ranges import affine, by_mse
from diffship.calibration.simulation import coded_inputs, unpacked
from diffship.calibration.stored import Calibration
from diffship.core.atomic import write_file
from diffship.core.document import read_json
from diffship.core.errors import ConfigError
from diffship.core.job import Job, digest_of, kept_json
from diffship.core.lazy import lazy
from diffship.core.limits import LIMITS
from diffship.core.precision import INT4_WEIGHTS, INT8, INT8_WEIGHTS, Packing, Precision
from diffship.core.strict import bounded, bounds, load, plain
from diffship.models.model import PipelineModel
from diffship.models.parts.component import Component
from diffship.models.parts.filling import INNER
from diffship.models.parts.runner import TorchRunner
from diffship.models.pipeline import Pipeline
from diffship.sampling.generate import start
from diffship.sampling.loop import advance
from diffship.sampling.loop import plain as plain_denoiser

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

NAME = "sensitivity.json"
SCHEMA = 1
CALLS = 3  # of the denoiser, evenly over the steps, that errors are measured on
_TRIED = (INT8_WEIGHTS, INT4_WEIGHTS, INT8)
_LABEL = "sensitivity"


@dataclass(frozen=True)
@bounded
class Sensitivity:
    """Of the part whose source tensors have `digest`.

    peak: largest |value| of its output in float32. errors: {layer: {precision: mean squared error of the output}} if
    that layer alone is in that precision.
    """

    schema: int
    part: str
    digest: str
    peak: float = field(metadata=bounds(0, math.inf))
    errors: dict[str, dict[str, float]]

    def psnr(self, error: float) -> float:
        """dB of a mean squared error; infinite for none."""
        return 20 * math.log10(self.peak) - 10 * math.log10(error) if error > 0 and self.peak > 0 else math.inf

    def worst(self, precision: str, count: int) -> list[tuple[str, float]]:
        """The `count` layers that cost most in `precision`, and the PSNR that is left with each of them alone."""
        listed = sorted(self.errors, key=lambda layer: -self.errors[layer][precision])
        return [(layer, self.psnr(self.errors[layer][precision])) for layer in listed[:count]]


@dataclass(frozen=True)
class Chosen:
    """packings: of weights by name; those that are not there stay float32. bits: stored ones a weight, of all layers
    that could be packed. predicted_db: PSNR of the output if errors of layers just add up."""

    packings: Mapping[str, Packing]
    bits: float
    predicted_db: float


def measure(pipeline: Pipeline, capture: Capture, calibration: Calibration, job: Job) -> Sensitivity:
    """The sensitivity of every layer of the denoiser that can be packed, on calls of the first batch of prompts.

    Every layer is kept by `job` as it is measured.

    Raises:
        ConfigError: the calibration is of another model, or lacks the denoiser.
    """
    component = pipeline.denoiser
    with PipelineModel(pipeline) as model:
        digest = model.digests[component.name]
        seen = calibration.of(component.name, digest)
        calls, module = _recorded(model, capture, component)
    true = _outputs(module, calls)
    peak = max(float(one.abs().max()) for one in true)
    found = {precision.name: packings(component, precision) for precision in _TRIED}
    errors: dict[str, dict[str, float]] = {}
    for done, layer in enumerate(seen):
        job.progress(_LABEL, done, len(seen))
        ways = {
            kind.name: replace(
                kind,
                chosen={f"{layer}.weight": found[kind.name][f"{layer}.weight"]},
                ranges={layer: affine(by_mse(seen[layer], kind.inputs), kind.inputs)} if kind.inputs else {},
            )
            for kind in _TRIED
        }
        key = digest_of({"model": digest, "layer": layer, "drawn": plain(calibration.drawn), "calls": CALLS})
        place = job.once(key, partial(_write_errors, module, layer, ways, calls, true))
        errors[layer] = kept_json(place, lambda table: {name: float(value) for name, value in table.items()})
    job.progress(_LABEL, len(seen), len(seen))
    return Sensitivity(SCHEMA, component.name, digest, peak, errors)


def choose(table: Sensitivity, component: Component, bits: float) -> Chosen:
    """The precision of each layer (float32, 8 or 4 bits) with the least sum of errors at `bits` a weight or fewer.

    Raises:
        ConfigError: no choice is that small, or the table is of other layers.
    """
    ways = {precision.name: packings(component, precision) for precision in (INT8_WEIGHTS, INT4_WEIGHTS)}
    names = list(ways[INT8_WEIGHTS.name])
    if {name.removesuffix(".weight") for name in names} != set(table.errors):
        raise ConfigError(f"the sensitivity is not of the layers of this {component.name}. Run: diffship calibrate")
    metas = {name: component.weights.meta(name) for name in names}
    total = sum(meta.count for meta in metas.values())
    options = [[Option(4 * metas[name].count, 0.0)] for name in names]
    for layer, name in zip(options, names, strict=True):
        for kind, chosen in ways.items():
            error = table.errors[name.removesuffix(".weight")][kind]
            layer.append(Option(packed_bytes(chosen[name], metas[name].shape), error))
    try:
        found = solve(options, int(bits * total / 8))
    except ConfigError:
        least = 8 * sum(min(option.cost for option in layer) for layer in options) / total
        raise ConfigError(f"{bits:g} bits a weight cannot be met; the least is {least:.3f}") from None
    kinds = list(ways.values())
    picked = {name: kinds[way - 1][name] for name, way in zip(names, found.chosen, strict=True) if way}
    return Chosen(picked, 8 * found.cost / total, table.psnr(found.score))


def write_sensitivity(table: Sensitivity, folder: str | Path) -> None:
    """Write NAME into `folder`."""
    write_file(Path(folder) / NAME, json.dumps(plain(table), indent=1) + "\n")


def read_sensitivity(folder: str | Path, part: str, digest: str) -> Sensitivity:
    """The sensitivity in `folder`, of the `part` whose source tensors have `digest`.

    Raises:
        ConfigError: there is none, or it is of another part or model.
    """
    place = Path(folder) / NAME
    if not place.exists():
        raise ConfigError(f"{folder} has no {NAME}. Run: diffship calibrate SOURCE --sensitivity -o CAL")
    table = load(Sensitivity, read_json(place, LIMITS.manifest_bytes), str(place))
    if (table.schema, table.part, table.digest) != (SCHEMA, part, digest):
        raise ConfigError(f"{place} is of another {table.part}. Run: diffship calibrate SOURCE --sensitivity -o CAL")
    return table


def measured_part(folder: str | Path) -> str:
    """The part that the sensitivity in `folder` is of. Raises ConfigError if there is none."""
    place = Path(folder) / NAME
    if not place.exists():
        raise ConfigError(f"{folder} has no {NAME}. Run: diffship calibrate SOURCE --sensitivity -o CAL")
    return load(Sensitivity, read_json(place, LIMITS.manifest_bytes), str(place)).part


def _recorded(
    model: PipelineModel, capture: Capture, component: Component
) -> tuple[list[tuple[torch.Tensor, ...]], nn.Module]:
    """What the denoiser is given at CALLS of the steps of the first batch of prompts, and the denoiser."""
    batch = [start(model, request)[0] for request in capture.requests()[: capture.batch]]
    module = component.module()
    taken: list[tuple[torch.Tensor, ...]] = []
    hook = module.register_forward_pre_hook(lambda _, inputs: taken.append(tuple(one.clone() for one in inputs)))
    denoiser = plain_denoiser(TorchRunner(module, component.inputs, component.outputs), model.family.kind)
    while not batch[0].done:
        batch = advance(batch, denoiser)
    hook.remove()
    places = sorted({round(i * (len(taken) - 1) / max(CALLS - 1, 1)) for i in range(CALLS)})
    return [taken[place] for place in places], module


def _outputs(module: nn.Module, calls: list[tuple[torch.Tensor, ...]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [module(*inputs)[0] for inputs in calls]


def _write_errors(
    module: nn.Module,
    layer: str,
    ways: Mapping[str, Precision],
    calls: list[tuple[torch.Tensor, ...]],
    true: list[torch.Tensor],
    place: Path,
) -> None:
    weight = module.get_parameter(f"{INNER}{layer}.weight")
    kept = weight.detach().clone()
    errors = {}
    for name, precision in ways.items():
        assert precision.chosen is not None
        with torch.no_grad():
            weight.copy_(unpacked(kept, precision.chosen[f"{layer}.weight"]))
            with coded_inputs(module, precision):
                found = _outputs(module, calls)
            weight.copy_(kept)
        errors[name] = sum(float(((a - b) ** 2).mean()) for a, b in zip(found, true, strict=True)) / len(true)
    write_file(place, json.dumps(errors))
