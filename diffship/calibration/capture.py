"""Draw pictures with torch as the model is deployed, and note what goes into every layer that can be quantised.

Q-Diffusion (Li et al. 2023, arXiv 2302.04304, section 3.2) takes inputs from the sampler's own trajectories, evenly
over its steps; so does this, at every step. Both halves of classifier-free guidance are rows of one call, as in use.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship import __version__
from diffship.calibration.observed import BINS, Observed, Seen, edge_of, join, note, nothing, observed_bytes
from diffship.calibration.packings import packings
from diffship.calibration.stored import (
    Calibration,
    Drawn,
    PartRanges,
    read_calibration,
    with_prompts,
    write_calibration,
)
from diffship.core.errors import ConfigError, RunnerError
from diffship.core.job import Job, digest_of
from diffship.core.lazy import lazy
from diffship.core.precision import INT8_WEIGHTS
from diffship.core.runner import Runner
from diffship.core.strict import unknown
from diffship.models.model import PipelineModel
from diffship.models.parts.component import Component
from diffship.models.parts.filling import INNER
from diffship.models.parts.runner import TorchRunner
from diffship.models.pipeline import Pipeline
from diffship.sampling.decode import decode
from diffship.sampling.generate import start
from diffship.sampling.loop import advance, plain
from diffship.sampling.request import Request, settle

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch, nn = lazy("torch"), lazy("torch.nn")

MOST_BYTES = 1 << 30  # of all that is noted
_LABEL = "calibrate"
_PER_CALL = 4  # rows that a call may give to the reservoir


@dataclass(frozen=True)
class Capture:
    """What is drawn. None is the model's default.

    prompts: one picture each; that of prompt i starts from the noise of seed + i. size: side of a picture in pixels.
    batch: prompts in a call of the denoiser. parts: whose layers are watched; empty: the denoiser alone.
    """

    prompts: tuple[str, ...]
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    seed: int = 0
    batch: int = 4
    parts: tuple[str, ...] = ()

    def requests(self) -> list[Request]:
        side = None if self.size is None else (self.size, self.size)
        shared: dict[str, Any] = {"steps": self.steps, "guidance": self.guidance, "size": side}
        return [Request(prompt, seed=self.seed + i, **shared) for i, prompt in enumerate(self.prompts)]


def calibrate(pipeline: Pipeline, capture: Capture, job: Job) -> Calibration:
    """What goes into the layers of `capture.parts` while its pictures are drawn.

    What is measured of one batch of prompts is kept by `job`, so that the same call goes on where an earlier one
    stopped. At most MOST_BYTES are held beside the model.

    Raises:
        ConfigError: no prompt, an unknown part, a part without layers to quantise, or the model cannot draw this.
        RunnerError: a layer's input is not finite.
    """
    if not capture.prompts:
        raise ConfigError("there is no prompt to calibrate with; name one at least")
    with _Bench(pipeline, capture) as bench:
        pieces = range(0, len(capture.prompts), capture.batch)
        total: Calibration | None = None
        for done, first in enumerate(pieces):
            job.progress(_LABEL, done, len(pieces))
            place = job.once(bench.digest(first), partial(bench.write_piece, first))
            piece = read_calibration(place)
            total = piece if total is None else _joined(total, piece)
        job.progress(_LABEL, len(pieces), len(pieces))
    assert total is not None
    return total


def _joined(total: Calibration, piece: Calibration) -> Calibration:
    for name, part in total.parts.items():
        for layer, observed in part.layers.items():
            join(observed, piece.parts[name].layers[layer])
    return with_prompts(total, (*total.drawn.prompts, *piece.drawn.prompts))


class _Bench:
    """A pipeline whose watched parts note their layers' inputs."""

    def __init__(self, pipeline: Pipeline, capture: Capture) -> None:
        self._capture, self._kind = capture, pipeline.family.kind
        self._settled = settle(capture.requests()[0], pipeline.family, pipeline.scheduler)
        calls = self._settled.sampler.calls(self._settled.steps)
        names = capture.parts or (self._kind.denoiser,)
        widths = {name: _widths_of(pipeline, name) for name in names}
        seen = {name: calls if name == self._kind.denoiser else 1 for name in names}
        needed = sum(observed_bytes(seen[name], width) for name in names for width in widths[name].values())
        if needed > MOST_BYTES:
            raise ConfigError(f"{needed:,} bytes would be noted, {MOST_BYTES:,} are legal; take fewer parts or steps")
        self._model = _Watched(pipeline, seen, widths)

    def __enter__(self) -> _Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self._model.close()

    def digest(self, first: int) -> str:
        """Names all that the piece beginning at prompt `first` depends on."""
        asked = {key: value for key, value in asdict(self._capture).items() if key != "prompts"}
        facts = {"version": __version__, "model": self._model.digest, "first": first, **asked}
        return digest_of({**facts, "scheduler": self._model.scheduler, "prompts": self._prompts(first)})

    def write_piece(self, first: int, place: Path) -> None:
        """Write what the prompts from `first` on, one batch of them, send through the watched layers."""
        model, kind, known = self._model, self._kind, self._settled
        model.begin(first)
        requests = self._capture.requests()[first : first + self._capture.batch]
        batch = [start(model, request)[0] for request in requests]
        denoiser = plain(model.use(kind.denoiser), kind)
        while not batch[0].done:
            model.call = batch[0].step
            batch = advance(batch, denoiser)
        if kind.decoder in model.watched:
            for trajectory in batch:
                decode(model, trajectory.latents)
        parts = {name: PartRanges(model.digests[name], layers) for name, layers in model.observed.items()}
        facts = (known.steps, float(known.guidance), known.size[0], self._capture.seed, known.sampler.name)
        write_calibration(Calibration(model.name, Drawn(self._prompts(first), *facts), parts), place)

    def _prompts(self, first: int) -> tuple[str, ...]:
        return self._capture.prompts[first : first + self._capture.batch]


class _Watched(PipelineModel):
    """A model on torch in float32. `watched`: how often each watched part is called for a picture; `widths`: channels
    of the inputs of its layers.

    call: which call of the denoiser comes next.
    """

    def __init__(self, pipeline: Pipeline, watched: Mapping[str, int], widths: Mapping[str, Mapping[str, int]]) -> None:
        super().__init__(pipeline)
        self.watched = dict(watched)
        self._widths = widths
        self.call = 0
        self.observed: dict[str, dict[str, Observed]] = {}
        self._rng = np.random.default_rng(0)

    def begin(self, first: int) -> None:
        """Forget what was seen; `first` seeds the choice of rows."""
        self._rng = np.random.default_rng(first)
        self.observed = {
            name: {layer: nothing(calls, width) for layer, width in self._widths[name].items()}
            for name, calls in self.watched.items()
        }

    def use(self, part: str) -> Runner:
        if part in self.watched and part not in self._runners:
            component = self.pipeline.components[part]
            module = component.module()
            for layer in self._widths[part]:
                watch = partial(self._watch, part, layer)
                module.get_submodule(f"{INNER}{layer}").register_forward_pre_hook(watch)
            self._runners[part] = TorchRunner(module, component.inputs, component.outputs)
        return super().use(part)

    def _watch(self, part: str, layer: str, module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        call = self.call if self.watched[part] > 1 else 0
        note(self.observed[part][layer], call, self._seen(f"{part}: {layer}", module, inputs[0]))

    def _seen(self, label: str, module: nn.Module, x: torch.Tensor) -> Seen:
        rows = (x.movedim(1, -1) if isinstance(module, nn.Conv2d) else x).reshape(-1, _width(module))
        low, high = (float(value) for value in torch.aminmax(x))
        if not math.isfinite(low) or not math.isfinite(high):
            raise RunnerError(f"{label} is given values that are not finite; the model cannot be calibrated")
        edge = edge_of(max(abs(low), abs(high)))
        counts = torch.histc(x.float(), BINS, -(2.0**edge), 2.0**edge).numpy().astype(np.int64)
        places = self._rng.integers(len(rows), size=_PER_CALL)
        return Seen(
            *(low, high, edge, counts, rows.abs().amax(0).numpy()),
            *(rows[torch.from_numpy(places)].numpy(), self._rng.random(_PER_CALL)),
        )


def _widths_of(pipeline: Pipeline, name: str) -> dict[str, int]:
    if name not in pipeline.components:
        raise ConfigError(unknown("part", name, pipeline.components))
    found = layer_widths(pipeline.components[name])
    if not found:
        raise ConfigError(f"{name} has no layer that can be quantised; leave it out")
    return found


def layer_widths(component: Component) -> dict[str, int]:
    """{path of a layer that can be quantised: channels of its input}."""
    module = component.meta
    inner = module.get_submodule("inner")
    paths = (name.removesuffix(".weight") for name in packings(component, INT8_WEIGHTS, module))
    return {path: _width(inner.get_submodule(path)) for path in paths}


def _width(module: nn.Module) -> int:
    return int(module.in_channels if isinstance(module, nn.Conv2d) else module.in_features)  # type: ignore[arg-type]
