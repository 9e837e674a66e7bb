"""A dry run: what each pass would leave of the part that it changes, and the hours that it would take on this machine.

Hours come from one timed call of the source's U-Net, on the device that torch would train on, in float32. A call of
another U-Net is taken to last as long as its share of multiply-accumulates: half precision is faster, reading pictures
and encoding them comes on top.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.compression.outline import Outline
from diffship.core.brief import brief
from diffship.core.job import available_memory
from diffship.core.kind import DENOISER
from diffship.core.lazy import lazy
from diffship.core.limits import GIB
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.walks.cost import Cost, cost

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")

_MOST_MACS = 2e11  # of the call that is timed: seconds on two CPU cores
_ENOUGH_MACS, _MOST_PICTURES = 2e10, 16  # small models are timed with more pictures, as they are trained
_NOT_ASKED = "nothing was timed"


@dataclass(frozen=True)
class Step:
    """One pass: the cost of `part`, which it changes, before and after it (None if that is not known), seconds
    (None: not timed, or the pass cannot run), what the figures hang on, and what is not there that the pass reads."""

    kind: str
    before: Cost | None
    after: Cost | None
    seconds: float | None
    part: str
    note: str = ""
    absent: str = ""


@brief
@dataclass(frozen=True)
class Estimate:
    """All passes, the pipeline that they are taken to make, and what was timed, in words."""

    steps: tuple[Step, ...]
    pipeline: Pipeline
    timed: str


def estimate(pipeline: Pipeline, passes: Sequence[Any], found: Sequence[Outline], timing: bool = True) -> Estimate:
    """Figures for `passes` on `pipeline`, of which `found` tells the first ones; reads and writes nothing.

    Costs are of one call for one picture of the default size.
    """
    costs, calling = _Costs(), any(outline.calls for outline in found)
    per_mac, timed = _seconds_per_mac(pipeline, costs) if timing and calling else (None, _NOT_ASKED)
    steps, held = [], pipeline
    for step, outline in zip(passes, found, strict=False):
        part = _part_of(step, held)
        before, after = (costs.of(one, one.components[part]) for one in (held, outline.pipeline))
        absent = absent_data(step)
        seconds = None if absent else _seconds(outline, per_mac, costs)
        steps.append(Step(step.kind, before, after, seconds, part, outline.note, absent))
        held = outline.pipeline
    unknown = "known only when it runs"
    for place, step in enumerate(passes[len(found) :]):
        part = _part_of(step, held)
        first = None if place else costs.of(held, held.components[part])
        steps.append(Step(step.kind, first, None, None, part, unknown))
    return Estimate(tuple(steps), found[-1].pipeline if found else pipeline, timed)


def _part_of(step: Any, pipeline: Pipeline) -> str:
    """The part that a pass changes, or the main one of them."""
    return pipeline.family.kind.part_of(getattr(step, "role", DENOISER))


def absent_data(step: Any) -> str:
    """Why a pass that trains cannot begin: its option `data` names no folder. Empty if it does, or needs none."""
    data = getattr(step, "data", None)
    if data is None or Path(data).expanduser().is_dir():
        return ""
    return f"data={data} is not a folder here, and the run would stop at once; docs/compression.md says what it holds"


def sized_cost(pipeline: Pipeline, part: Component, px: int | None = None) -> Cost:
    """Of one call of `part` for one picture of `px` (the default size of `pipeline`)."""
    px = px or pipeline.family.default_size
    return cost(part, {"image_height": px, "image_width": px, **_sides(pipeline, px)})


def _sides(pipeline: Pipeline, px: int) -> Mapping[str, int]:
    side = px // pipeline.family.vae_factor
    return {"height": side, "width": side}


class _Costs:
    """Costs that were counted; a pass that only trains leaves the shapes that it found."""

    def __init__(self) -> None:
        self._known: list[tuple[Component, int, Cost]] = []

    def of(self, pipeline: Pipeline, part: Component, px: int | None = None) -> Cost:
        px = px or pipeline.family.default_size
        for component, size, known in self._known:
            if component is part and size == px:
                return known
        found = sized_cost(pipeline, part, px)
        self._known.append((part, px, found))
        return found


def _seconds(outline: Outline, per_mac: float | None, costs: _Costs) -> float | None:
    if not outline.calls:
        return 0.0
    if per_mac is None:
        return None
    return sum(costs.of(outline.pipeline, calls.part).macs * calls.count * per_mac for calls in outline.calls)


def _seconds_per_mac(pipeline: Pipeline, costs: _Costs) -> tuple[float | None, str]:
    """Seconds for one multiply-accumulate of the U-Net here, and what was timed; None if memory does not suffice."""
    unet, free = pipeline.denoiser, available_memory()
    needed = 4 * costs.of(pipeline, unet).params
    if free is not None and 2 * needed > free:
        return None, f"nothing was timed: the U-Net takes {needed / GIB:.1f} GiB in float32"
    px = _affordable(pipeline, costs)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    macs = costs.of(pipeline, unet, px).macs
    batch = max(1, min(_MOST_PICTURES, int(_ENOUGH_MACS // macs)))
    seconds = time_call(unet, {"batch_size": batch, **_sides(pipeline, px)}, device)
    said = f"timed: one call of the source's U-Net on {device}, float32, batch {batch} at {px} px: {seconds:.3g} s"
    return seconds / (batch * macs), f"{said}; everything else by its multiply-accumulates"


def _affordable(pipeline: Pipeline, costs: _Costs) -> int:
    """The default size, or the half, quarter, ... of it whose call is short enough to be timed."""
    family, px = pipeline.family, pipeline.family.default_size
    while costs.of(pipeline, pipeline.denoiser, px).macs > _MOST_MACS and px // 2 >= family.size_step:
        px = px // 2 // family.size_step * family.size_step
    return px


def time_call(unet: Component, sizes: Mapping[str, int], device: str) -> float:
    """Seconds of one call of `sizes`, on made-up weights; the second of two, as the first one allocates."""
    module = unet.meta.to_empty(device=device)
    with torch.inference_mode():
        for parameter in module.parameters():
            parameter.fill_(0.01)  # what an empty tensor holds may be numbers that are slow to compute with
        feeds = unet.example(0, sizes)
        given = [torch.from_numpy(feeds[spec.name]).to(device) for spec in unet.inputs]
        for _ in range(2):
            started = time.perf_counter()
            module(*given)
            if device == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - started
    return seconds
