"""Several opened models as one Denoiser: each computes its share of the model calls, and the trajectory alone moves.

Hybrid SD (Yan et al. 2024, arXiv 2408.06646): a large model draws the first steps, a small one the last.
Latents, the sampler's history, noise and embeddings pass from one model to the next as they are.
"""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.limits import LIMITS
from diffship.sampling.controlled import denoising_parts
from diffship.sampling.encode import require_text, text_parts
from diffship.sampling.generate import checked, conditioned, finish, start
from diffship.sampling.kernel import Array
from diffship.sampling.loop import Denoiser, OnStep, denoise, denoiser_of
from diffship.sampling.model import Model
from diffship.sampling.picture import Picture
from diffship.sampling.request import Request, drawn_size
from diffship.sampling.trajectory import Trajectory, conditions_fit


def check_split(split: Sequence[int], models: int, steps: int | None = None) -> int:
    """The number of steps that `split` divides among `models` models.

    Raises:
        ConfigError: another number of entries, a negative one, or a sum that is not `steps` or not legal.
    """
    given = ",".join(map(str, split))
    low, high = LIMITS.steps
    if len(split) != models:
        raise ConfigError(
            f"split {given} has {len(split)} entries for {models} models; give one per model, such as 10,15"
        )
    if any(share < 0 for share in split) or not low <= sum(split) <= high:
        raise ConfigError(f"split {given} is not legal: entries are 0 or more, and together {low} to {high} steps")
    if steps is not None and sum(split) != steps:
        raise ConfigError(f"split {given} makes {sum(split)} steps, asked are {steps}: they must be the same")
    return sum(split)


def boundaries(split: Sequence[int], calls: int) -> tuple[int, ...]:
    """The call before which each model stops, of `calls` in all; model i computes from boundary i - 1 on.

    A sampler that makes more calls than steps (PNDM) gives the surplus to the last model that has a share.
    """
    last = max(place for place, share in enumerate(split) if share)
    return tuple(calls if place >= last else end for place, end in enumerate(accumulate(split)))


@dataclass
class Share:
    """What one model has computed: calls counted per picture, seconds on the clock without loading it."""

    calls: int = 0
    seconds: float = 0.0


class Router:
    """A Denoiser over `models`, of which model i makes `split[i]` calls of every trajectory, in this order.

    With one model `split` may be left out. A model is loaded when its first call comes and kept, or, with `keep`
    False, kept until another one's call comes. `shares` counts; several threads must not share a router.
    """

    def __init__(
        self,
        models: Sequence[Model],
        split: Sequence[int] | None = None,
        keep: bool = True,
        make: Callable[[Model], Denoiser] = denoiser_of,
    ) -> None:
        """`make` opens the denoiser of a model, whole or in parts.

        Raises:
            ConfigError: a split that `check_split` refuses. UnsupportedError: a part is missing.
        """
        self._make = make
        self.split = None if split is None and len(models) == 1 else tuple(split or ())
        if self.split is not None:
            check_split(self.split, len(models))
        self.models = tuple(models)
        self.keep = keep
        self.shares = [Share() for _ in models]
        self._denoisers: dict[int, Denoiser] = {}
        for place, model in enumerate(self.models):
            kind = model.family.kind
            needed = {kind.denoiser: self._share(place), kind.decoder: place == len(models) - 1}
            missing = [part for part, wanted in needed.items() if wanted and part not in model.parts]
            if missing:
                raise UnsupportedError(f"{model.name} has no {', '.join(missing)}; export with --parts, or --base")

    def __call__(self, batch: Sequence[Trajectory]) -> list[Array]:
        """Guided outputs of `batch`, whose members may stand in the shares of different models."""
        owners = [self.place_of(trajectory) for trajectory in batch]
        outputs: list[Array] = [None] * len(batch)
        for owner in sorted(set(owners)):
            places = [place for place, other in enumerate(owners) if other == owner]
            for place, output in zip(places, self._call(owner, [batch[place] for place in places]), strict=True):
                outputs[place] = output
        return outputs

    def place_of(self, trajectory: Trajectory) -> int:
        """Which model makes the next call of `trajectory`; the last one if none is left.

        Raises:
            ConfigError: the trajectory has another number of steps than the split.
        """
        if self.split is None:
            return 0
        check_split(self.split, len(self.models), trajectory.steps)
        ends = boundaries(self.split, trajectory.calls)
        return min(bisect_right(ends, trajectory.step), len(ends) - 1)

    @property
    def starter(self) -> Model:
        """The first model that has a share: its settings and text encoder are used."""
        return next(model for place, model in enumerate(self.models) if self._share(place))

    def release(self, place: int) -> None:
        """Free the denoiser of one model; its next call loads it again."""
        if self._denoisers.pop(place, None) is not None:
            for part in denoising_parts(self.models[place]):
                self.models[place].release(part)

    def _share(self, place: int) -> bool:
        """Whether this model makes any call."""
        return self.split is None or self.split[place] > 0

    def _call(self, place: int, batch: Sequence[Trajectory]) -> Sequence[Array]:
        denoiser = self._denoiser(place)
        begin = time.perf_counter()
        outputs = denoiser(batch)
        self.shares[place].seconds += time.perf_counter() - begin
        self.shares[place].calls += len(batch)
        return outputs

    def _denoiser(self, place: int) -> Denoiser:
        if not self.keep:
            for other in [other for other in self._denoisers if other != place]:
                self.release(other)
        if place not in self._denoisers:
            model = self.models[place]
            self._denoisers[place] = checked(self._make(model), model.family.kind.denoiser)
        return self._denoisers[place]


def begin(router: Router, request: Request) -> list[Trajectory]:
    """The trajectories of a request before the first model call, as `generate.start` by the router's first model.

    Raises:
        ConfigError: steps that are not those of the split, a size that one of the models cannot draw, and as `start`.
    """
    if router.split is None:
        return start(router.starter, request)
    steps = check_split(router.split, len(router.models), request.steps)
    size = drawn_size(request, router.starter.family)
    facts = []
    for model, share in zip(router.models, router.split, strict=True):
        model.family.check_size(*size)
        facts.append({"model": model.name, "model_digest": model.digest, "steps": share})
    batch = start(router.starter, replace(request, steps=steps, size=size))
    return [replace(trajectory, facts={**trajectory.facts, "split": facts}) for trajectory in batch]


def draw(
    router: Router,
    batch: Sequence[Trajectory],
    on_step: OnStep | None = None,
    cancel: Callable[[], bool] | None = None,
) -> list[Picture]:
    """Denoise trajectories of one size from wherever they stand, and decode them with the last model.

    All share the model calls; a router that keeps nothing (low memory) takes one after the other through each model
    before it loads the next, and decodes in tiles. Raises as `generate`.
    """
    low = not router.keep
    _require_readers(router, batch)
    done = [conditioned(router.models[router.place_of(trajectory)], trajectory) for trajectory in batch]
    if low:
        for model in router.models:
            for part in (*text_parts(model), model.family.kind.encoder):
                model.release(part)
    for place, until in enumerate(_stops(router)):
        done = [_told_again(router, place, trajectory) for trajectory in done]
        for group in [[i] for i in range(len(done))] if low else [list(range(len(done)))]:
            active = denoise([done[i] for i in group], router, until, on_step, cancel)
            for i, trajectory in zip(group, active, strict=True):
                done[i] = trajectory
        if low:
            router.release(place)
    return finish(router.models[-1], done, low, cancel)


def takes(model: Model, trajectory: Trajectory) -> bool:
    """Whether the denoiser of `model` takes the trajectory's embeddings; it does if there are none yet."""
    return trajectory.positive is None or conditions_fit(trajectory.positive, model.family)


def _told_again(router: Router, place: int, trajectory: Trajectory) -> Trajectory:
    """The trajectory with its prompt encoded by model `place`, if that one goes on and takes other embeddings.

    The sampler begins without history there, as stock diffusers does where SDXL's refiner goes on.
    """
    model = router.models[place]
    if trajectory.done or router.place_of(trajectory) != place or takes(model, trajectory):
        return trajectory
    told = conditioned(model, trajectory.without_conditioning())
    if not router.keep:
        for part in text_parts(model):
            model.release(part)
    return replace(told, history=())


def _require_readers(router: Router, batch: Sequence[Trajectory]) -> None:
    """Raises UnsupportedError, before anything is computed, for a model that must read the prompt and cannot."""
    for place, model in enumerate(router.models):
        if router._share(place) and not all(takes(model, trajectory) for trajectory in batch):
            require_text(model)


def _stops(router: Router) -> list[int | None]:
    """Where each model stops, None for the end: that is not the same for every sampler."""
    if router.split is None:
        return [None]
    ends = boundaries(router.split, sum(router.split))
    return [end if end < ends[-1] else None for end in ends]
