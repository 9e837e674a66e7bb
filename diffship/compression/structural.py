"""The structural pruning pass: torch-pruning's dependency graph and importance over the interiors of a U-Net.

Residual blocks lose the same positions in all of their norm groups, so that every channel that stays is normalised with
the same neighbours as before; Hybrid SD's narrowing (arXiv 2408.06646) takes any channels and lets the groups shift.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from diffship import __version__
from diffship.compression.narrow import Indices, Kept, Scores, narrow_unet
from diffship.compression.outline import U_NETS, Calls, Outline
from diffship.compression.ranking import Layer, kept_budget, kept_share
from diffship.compression.stored import settings_key
from diffship.compression.taylor import Loss, drawn, examples, until_small
from diffship.compression.traced import KINDS, Interior, channel_scores, filled, kept_of, traced
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.job import Job, kept_json
from diffship.core.lazy import lazy, need
from diffship.core.problem import Problem
from diffship.core.strict import bounded, bounds, choices
from diffship.models.model import PipelineModel
from diffship.models.parts.component import fill
from diffship.models.pipeline import Pipeline
from diffship.sampling.samplers import noise_schedule

if TYPE_CHECKING:
    import torch
    import torch_pruning as tp
    from torch import nn

    from diffship.training.paired import PairedPictures
else:
    torch, tp = lazy("torch"), lazy("torch_pruning")

GRADIENTS = ("taylor", "diff-pruning")
Table = dict[str, Scores]


@dataclass(frozen=True)
@bounded
class PrunePass:
    """Prune residual blocks, attention heads and feed-forward channels by torch-pruning's importance.

    keep: share of the units that stays in every layer, rounded down. parameters: or the share of the U-Net's parameters
    that stays; every layer then keeps one unit at least. One of the two is given.
    criterion: `magnitude` (squared weights), `taylor` (|sum of weight times gradient| over all timesteps),
    `diff-pruning` (sum of |weight times gradient| over the informative timesteps) or `random`.
    ranking: `layer` takes the same share of every layer, `global` ranks all layers of a kind together.
    layers: which kinds are pruned: `inner` (of residual blocks), `heads`, `feedforward`.
    threshold: of Diff-Pruning; timesteps end at the first whose loss is below this share of its largest.
    stride: every how many-th timestep adds gradients. data: folder of pictures with captions, for gradients.
    batch: pictures of the one batch. seed: of the batch, its noise, and random scores.
    """

    kind: ClassVar[str] = "prune"
    networks: ClassVar[tuple[str, ...]] = U_NETS
    kept: ClassVar[bool] = False  # the job keeps scores that take long; cutting takes seconds

    keep: float | None = field(default=None, metadata=bounds(0.01, 1))
    parameters: float | None = field(default=None, metadata=bounds(0.01, 1))
    criterion: str = field(default="magnitude", metadata=choices("magnitude", *GRADIENTS, "random"))
    ranking: str = field(default="layer", metadata=choices("layer", "global"))
    layers: tuple[str, ...] = field(default=KINDS, metadata=choices(*KINDS))
    threshold: float = field(default=0.05, metadata=bounds(0, 1))
    stride: int = field(default=1, metadata=bounds(1, 1000))
    data: str | None = None
    batch: int = field(default=32, metadata=bounds(1, 4096))
    seed: int = field(default=0, metadata=bounds(0, 2**31 - 1))

    def __post_init__(self) -> None:
        if (self.keep is None) == (self.parameters is None):
            raise ConfigError(
                "give either keep (share of every layer) or parameters (share of the whole), as in keep=0.5"
            )
        if not self.layers:
            raise ConfigError(f"no layers are given; legal: {', '.join(KINDS)}")
        if self.criterion in GRADIENTS and self.data is None:
            raise ConfigError(f"criterion {self.criterion} needs pictures with captions: data=FOLDER")
        if self.criterion not in GRADIENTS and self.data is not None:
            raise ConfigError(f"criterion {self.criterion} takes no data; legal with data: {', '.join(GRADIENTS)}")

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """Everything that would stop `run`, found from configs, and the headers of the data.

        Raises:
            MissingExtra: torch-pruning is not installed.
        """
        need("torch_pruning")
        problems = []
        try:
            self._unscored(pipeline)
        except DiffshipError as fault:
            problems.append(Problem(pipeline.family.kind.denoiser, str(fault)))
        return [*problems, *self._data_problems(pipeline)]

    def outline(self, pipeline: Pipeline) -> Outline:
        """Shapes as they will be; if layers are ranked together, only how much is pruned in all is known."""
        made = narrow_unet(pipeline, self._unscored(pipeline), self._entry())
        note = "which layers become narrower hangs on their scores" if self.ranking == "global" else ""
        if self.criterion not in GRADIENTS:
            return Outline(made, note=note)
        steps = math.ceil(noise_schedule(pipeline.scheduler).num_train_timesteps / self.stride)
        return Outline(made, (Calls(pipeline.denoiser, 3.0 * self.batch * steps),), note)

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the narrowed U-Net; its tensors are cut when they are read.

        Raises:
            MissingExtra: torch-pruning is not installed.
            ConfigError: scores or losses are not finite, or the data does not fit.
        """
        need("torch_pruning")
        module, interiors = traced(pipeline.denoiser, self.layers)
        facts: dict[str, Any] = {}
        if self.criterion in GRADIENTS:
            scores, facts = self._by_gradients(pipeline, module, interiors, job)
        else:
            scores = self._by_weights(pipeline, interiors, job)
        kept = kept_of(interiors, self._kept(pipeline, interiors, scores))
        return narrow_unet(pipeline, kept, {**self._entry(), **facts})

    def _entry(self) -> dict[str, Any]:
        """What the history says of the options that were used."""
        options = asdict(self)
        unused = {"taylor": ("threshold",), "diff-pruning": ()}.get(self.criterion, ("threshold", "stride", "batch"))
        said = {key: value for key, value in options.items() if value is not None and key not in unused}
        said |= {"data": Path(self.data).name} if self.data else {}
        if self.parameters is not None:
            said["parameters_share"] = said.pop("parameters")  # `parameters` is the count that results
        return {"pass": self.kind, **said}

    def _unscored(self, pipeline: Pipeline) -> Kept:
        """What stays if all scores are equal: as much as with any others, but for a global ranking."""
        _, interiors = traced(pipeline.denoiser, self.layers)
        return kept_of(
            interiors, self._kept(pipeline, interiors, {one.name: np.zeros(len(one.units)) for one in interiors})
        )

    def _kept(self, pipeline: Pipeline, interiors: Sequence[Interior], scores: Table) -> Mapping[str, Indices]:
        layers = [Layer(one.kind, one.name, scores[one.name], one.cost) for one in interiors]
        if self.keep is not None:
            return kept_share(layers, self.ranking, self.keep)
        count = pipeline.denoiser.parameters
        target = int(count * (self.parameters or 0))
        try:
            return kept_budget(layers, self.ranking, count - target)
        except ConfigError:
            least = count - sum(layer.cost * (len(layer.scores) - 1) for layer in layers)
            raise ConfigError(
                f"parameters {self.parameters} asks for {target:,} of {count:,}; pruning {', '.join(self.layers)} can "
                f"reach {least:,}, so {least / count:.4f} is the least"
            ) from None

    def _by_weights(self, pipeline: Pipeline, interiors: Sequence[Interior], job: Job) -> Table:
        """Scores that need weights alone; those of one layer are in memory at a time."""
        magnitude = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
        by_chance = self.criterion == "random"
        importance = tp.importance.RandomImportance() if by_chance else magnitude
        weights, scores = pipeline.denoiser.weights, {}
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(self.seed)  # the CPU's, which alone is forked
            for done, one in enumerate(interiors, 1):
                with nullcontext() if by_chance else filled(one, weights):
                    scores[one.name] = _finite(one, channel_scores(one, importance))
                job.progress(f"prune: {self.criterion}", done, len(interiors))
        return scores

    def _by_gradients(
        self, pipeline: Pipeline, module: nn.Module, interiors: Sequence[Interior], job: Job
    ) -> tuple[Table, dict[str, Any]]:
        """Scores, and what the history says of the timesteps; kept by the job under all that they depend on."""
        pictures, model = self._pictures(pipeline), PipelineModel(pipeline).digest
        job.progress(pictures.told, 1, 1)
        told = {
            key: value for key, value in self._entry().items() if key not in ("keep", "parameters_share", "ranking")
        }
        settings = [settings_key(pipeline), pictures.size]
        made_by = [__version__, version("torch-pruning")]
        text = json.dumps([told, model, pictures.digest, settings, made_by], sort_keys=True)

        def make(place: Path) -> None:
            scores, losses = self._measured(pipeline, module, interiors, pictures, job)
            table = {name: values.tolist() for name, values in scores.items()}
            place.write_text(json.dumps({"scores": table, "losses": losses}), encoding="utf-8")

        place = job.once(f"prune-{hashlib.sha256(text.encode()).hexdigest()}", make)
        scores, losses = kept_json(place, _table)
        steps = {"timesteps": len(losses), "last_timestep": losses[-1][0], "losses": [losses[0][1], losses[-1][1]]}
        return scores, {"data_digest": pictures.digest, **steps}

    def _measured(
        self,
        pipeline: Pipeline,
        module: nn.Module,
        interiors: Sequence[Interior],
        pictures: PairedPictures,
        job: Job,
    ) -> tuple[Table, list[Loss]]:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        batch = examples(pipeline, pictures, drawn(pictures, self.batch, self.seed), self.seed, device)
        fill(module, pipeline.denoiser.weights, device, torch.float32, pipeline.family.kind.denoiser)
        for one in interiors:
            for layer in one.layers.values():
                layer.requires_grad_(True)
        steps = range(0, len(batch.alphas), self.stride)

        def backward(done: int, step: int) -> Loss:
            job.progress(f"prune: {self.criterion}", done, len(steps))
            return step, batch.backward(module, step)

        passes = (backward(done, step) for done, step in enumerate(steps))
        losses = until_small(passes, self.threshold if self.criterion == "diff-pruning" else 0.0)
        job.progress(f"prune: {self.criterion}", len(steps), len(steps))
        importance = tp.importance.GroupTaylorImportance(normalizer=None, multivariable=self.criterion == "taylor")
        return {one.name: _finite(one, channel_scores(one, importance)) for one in interiors}, losses

    def _pictures(self, pipeline: Pipeline) -> PairedPictures:
        from diffship.training.paired import PairedPictures

        return PairedPictures.open(Path(str(self.data)).expanduser(), pipeline.family.default_size)

    def _data_problems(self, pipeline: Pipeline) -> list[Problem]:
        if self.criterion not in GRADIENTS:
            return []
        family, missing = pipeline.family, {pipeline.family.kind.encoder} - set(pipeline.components)
        problems = [Problem(part, "gradients need it, and the source has none: --base SOURCE") for part in missing]
        if family.unet_channels != family.latent_channels:
            why = "gradients of a model that fills masks are not built; use magnitude"
            problems.append(Problem(family.kind.denoiser, why))
        try:
            noise_schedule(pipeline.scheduler)
            pictures = self._pictures(pipeline)
            if len(pictures) < self.batch:
                problems.append(Problem("data", f"batch is {self.batch}; {self.data} has {len(pictures)} pictures"))
        except DiffshipError as fault:
            problems.append(Problem.of("data", fault))
        return problems


def _table(kept: Any) -> tuple[Table, list[Any]]:
    """Scores and losses of the JSON that they were kept as."""
    scores = {name: np.array(values, np.float64) for name, values in kept["scores"].items()}
    return scores, [(int(timestep), float(loss)) for timestep, loss in kept["losses"]]


def _finite(interior: Interior, channels: Scores) -> Scores:
    """Scores of units; ConfigError if one is NaN or infinite."""
    if not np.isfinite(channels).all():
        raise ConfigError(f"the scores of {interior.name} are not finite; are its weights damaged?")
    return interior.of_units(channels)
