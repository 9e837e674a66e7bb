"""Measure what each layer of a U-Net does to the pictures: narrow it alone, draw the prompts, compare the latents.

The score is that of Hybrid SD (arXiv 2408.06646): with mean and (population) standard deviation of the final latents
taken elementwise over the prompts, `|mean(P) - mean(P_l)|_2 + |std(P) - std(P_l)|_2`, for the pipeline P and the one in
which only layer l is narrow, P_l. Every run starts from the same noise, which the released code does not see to.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from safetensors import numpy as tensor_file

from diffship import __version__
from diffship.compression.interior import Layer, largest_kept
from diffship.compression.narrow import cut
from diffship.compression.scores import LayerScores, ScoreTable, Settings, Shift
from diffship.compression.stored import settings_key
from diffship.core.atomic import write_file
from diffship.core.job import REMEDY, Job, kept_json
from diffship.core.lazy import lazy
from diffship.core.weights import renamed
from diffship.models.model import PipelineModel
from diffship.models.parts.component import Component, fill, torch_dtype
from diffship.models.parts.filling import INNER
from diffship.models.parts.runner import TorchRunner
from diffship.models.parts.unet import unet
from diffship.models.pipeline import Pipeline
from diffship.models.reduced.widths import widths_of, with_widths
from diffship.sampling.generate import checked, start
from diffship.sampling.loop import denoise, plain
from diffship.sampling.request import Request, Settled, settle
from diffship.sampling.trajectory import Trajectory
from diffship.training.saving import read_tensors, save_tensors

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

LABEL = "significance scores"
Moments = tuple[NDArray[np.float64], NDArray[np.float64]]  # mean and std, each (channels, height, width)


@dataclass(frozen=True)
class Drawing:
    """What is drawn to score a layer; None is the model's default.

    prompts: at least two. steps, guidance, size: of every picture; size is its side in pixels. seed: prompt i starts
    from the noise of seed + i, whatever is narrowed. batch: prompts in a model call. precision: of all parts.
    """

    prompts: tuple[str, ...]
    steps: int | None = None
    guidance: float | None = None
    size: int | None = None
    seed: int = 0
    batch: int = 8
    precision: str = "float32"

    def requests(self, seed: int) -> list[Request]:
        """One request a prompt, the first with `seed`."""
        side = None if self.size is None else (self.size, self.size)
        shared = {"steps": self.steps, "guidance": self.guidance, "size": side}
        return [Request(prompt, seed=seed + i, **shared) for i, prompt in enumerate(self.prompts)]  # type: ignore[arg-type]

    def settled(self, pipeline: Pipeline) -> Settled:
        """The first request with the model's defaults filled in; raises ConfigError if the model cannot draw it."""
        return settle(self.requests(self.seed)[0], pipeline.family, pipeline.scheduler)

    def settings(self, pipeline: Pipeline) -> Settings:
        """All that a score depends on, beside the model."""
        known = self.settled(pipeline)
        prompts = hashlib.sha256("\n".join(self.prompts).encode()).hexdigest()
        facts = (len(self.prompts), known.steps, known.guidance, known.size[0], self.seed)
        return Settings(prompts, *facts, known.sampler.name, self.precision)


def model_calls(pipeline: Pipeline, drawing: Drawing, counts: Mapping[str, Sequence[int]]) -> tuple[int, int]:
    """(calls of the U-Net, rows in all of them): what `measure` costs with an empty cache."""
    known = drawing.settled(pipeline)
    runs = 2 + sum(len(kept) for kept in counts.values())
    rows = 2 if known.guidance > 1 and pipeline.family.time_cond_dim is None else 1
    return runs * _calls(drawing, known), runs * rows * len(drawing.prompts) * known.sampler.calls(known.steps)


def measure(
    pipeline: Pipeline, layers: Sequence[Layer], counts: Mapping[str, Sequence[int]], drawing: Drawing, job: Job
) -> ScoreTable:
    """Score every layer at every width in `counts` ({layer: channels or heads that stay}), one narrow layer at a time.

    What is measured is kept by `job`, so that the same call goes on where an interrupted one stopped.

    Raises:
        ConfigError: the model cannot draw what is asked. RunnerError: a narrowed U-Net's output is not finite.
    """
    bench = _Bench(pipeline, drawing, counts, job)
    whole = bench.moments("whole", drawing.seed)
    other = bench.moments("noise", drawing.seed + len(drawing.prompts))
    scored = []
    for layer in layers:
        shifts = [bench.shift(whole, layer, kept) for kept in sorted(counts[layer.name], reverse=True)]
        scored.append(LayerScores(layer.name, layer.kind, layer.size, tuple(shifts)))
    digest = pipeline.denoiser.digest
    return ScoreTable(digest, drawing.settings(pipeline), _distance(whole, other)[2], tuple(scored))


class _Bench:
    """A loaded U-Net whose layers are exchanged one at a time, and the latents it starts from."""

    def __init__(self, pipeline: Pipeline, drawing: Drawing, counts: Mapping[str, Sequence[int]], job: Job) -> None:
        self._pipeline, self._drawing, self._job = pipeline, drawing, job
        self._component = pipeline.denoiser
        self._settled = drawing.settled(pipeline)
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model = PipelineModel(pipeline, self._device, drawing.precision)
        self._run = _calls(drawing, self._settled)
        self._done, self._total = 0, model_calls(pipeline, drawing, counts)[0]

    def moments(self, name: str, seed: int) -> Moments:
        """Of the whole U-Net's latents, from the noise of `seed`."""
        place = self._once({"run": name}, lambda path: _write_moments(path, self._draw(self._starts(seed))))
        kept = read_tensors(place, ("mean", "std"), REMEDY)
        return kept["mean"].numpy(), kept["std"].numpy()

    def shift(self, whole: Moments, layer: Layer, kept: int) -> Shift:
        """The score of `layer` narrowed to `kept`."""

        def make(path: Path) -> None:
            with swapped(self._module, layer.name, self._narrowed(layer, kept)):
                found = _distance(whole, self._draw(self._first))
            write_file(path, json.dumps(found))

        place = self._once({"layer": layer.name, "kept": kept}, make)
        return kept_json(place, lambda found: Shift(kept, *map(float, found)))

    def _once(self, run: Mapping[str, object], make: Any) -> Path:
        before = self._done
        key = json.dumps({**self._key, **run}, sort_keys=True)
        place = self._job.once(f"scores-{hashlib.sha256(key.encode()).hexdigest()[:40]}", make)
        self._done = before + self._run
        self._job.progress(LABEL, self._done, self._total)
        return place

    @cached_property
    def _key(self) -> dict[str, object]:
        settings = vars(self._drawing.settings(self._pipeline))
        facts = {"model": self._model.digest, "settings": settings_key(self._pipeline), "device": self._device}
        return {"version": __version__, **facts, **settings}

    @cached_property
    def _module(self) -> nn.Module:
        return self._component.module(self._device, self._drawing.precision)

    @cached_property
    def _first(self) -> list[Trajectory]:
        return self._starts(self._drawing.seed)

    def _starts(self, seed: int) -> list[Trajectory]:
        """Every prompt encoded, with the noise of seed, seed + 1, ..."""
        found = [start(self._model, request)[0] for request in self._drawing.requests(seed)]
        self._model.close()
        return found

    def _draw(self, starts: Sequence[Trajectory]) -> Moments:
        drawing, component = self._drawing, self._component
        kind = torch_dtype(drawing.precision)
        runner = TorchRunner(self._module, component.inputs, component.outputs, self._device, kind)
        denoiser, latents = checked(plain(runner, self._model.family.kind), component.name), []
        for first in range(0, len(starts), drawing.batch):
            done = denoise(starts[first : first + drawing.batch], denoiser, on_step=self._step)
            latents += [np.asarray(trajectory.latents, np.float64) for trajectory in done]
        return np.mean(latents, 0), np.std(latents, 0)

    def _step(self, _: object) -> None:
        self._done += 1
        self._job.progress(LABEL, self._done, self._total)

    def _narrowed(self, layer: Layer, kept: int) -> nn.Module:
        return narrowed_layer(self._component, layer, kept, self._device, self._drawing.precision)


def narrowed_layer(component: Component, layer: Layer, kept: int, device: str, precision: str) -> nn.Module:
    """A layer of the U-Net `component`, built with `kept` channels or heads, the largest, and filled."""
    stays = largest_kept(component.weights, [layer], {layer.name: kept})
    config = with_widths(component.config, stays.widths.over(widths_of(component.config)))
    small = unet(config, component.weights).meta.get_submodule(INNER + layer.name)
    weights = cut(component.weights, stays, {layer.name: layer.size})
    prefix = f"{layer.name}."
    own = {name.removeprefix(prefix): name for name in weights.names() if name.startswith(prefix)}
    fill(small, renamed(weights, own), device, torch_dtype(precision), layer.name)
    return small.eval()


@contextmanager
def swapped(module: nn.Module, name: str, layer: nn.Module) -> Iterator[None]:
    """While open, `layer` stands where the U-Net part `module` had its own layer `name`."""
    old = module.get_submodule(INNER + name)
    module.set_submodule(INNER + name, layer)
    try:
        yield
    finally:
        module.set_submodule(INNER + name, old)


def _calls(drawing: Drawing, settled: Settled) -> int:
    """Calls of the U-Net in one run over all prompts."""
    return -(-len(drawing.prompts) // drawing.batch) * settled.sampler.calls(settled.steps)


def _distance(whole: Moments, other: Moments) -> tuple[float, float, float]:
    """(L2 norm of the change of the mean, of the standard deviation, their sum)."""
    mean, std = (float(np.linalg.norm(a - b)) for a, b in zip(whole, other, strict=True))
    return mean, std, mean + std


def _write_moments(path: Path, moments: Moments) -> None:
    save_tensors(tensor_file.save_file, {"mean": moments[0], "std": moments[1]}, path)
