"""What one request asks of a model's worker: how its trajectories begin, how far they go, what comes out."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffship.core.errors import ConfigError, HandoffError
from diffship.runtimes.handoff.arrival import check_arrival
from diffship.runtimes.serve.forms import Drawing, GenerateForm, HandoffForm, ResumeForm
from diffship.sampling.generate import conditioned, finish, start
from diffship.sampling.model import Model
from diffship.sampling.request import Request, Settled, settle
from diffship.sampling.trajectory import Trajectory
from diffship.sampling.wire import pack, unpack


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a request gave: PNG files with their settings, or the bytes of a trajectory."""

    pictures: tuple[tuple[bytes, dict[str, Any]], ...] = ()
    trajectory: bytes = b""

    @property
    def size_bytes(self) -> int:
        return len(self.trajectory) + sum(len(png) for png, _ in self.pictures)


@dataclass(frozen=True, eq=False)
class Order:
    """`calls` are those that each of `images` still needs, `shape` is that of its latents (channels, height, width).

    `until` is the call to stop before (None: the end). `deadline` in seconds, None for the server's.
    `previews`: one every so many calls, 0 for none. `warnings` are for the client. `encodes`, `decodes`: whether it
    begins with text to encode and ends with pictures to decode, which is what takes time there.
    """

    begin: Callable[[Model], list[Trajectory]]
    end: Callable[[Model, Sequence[Trajectory]], Drawn]
    calls: int
    images: int
    shape: tuple[int, ...]
    until: int | None = None
    deadline: float | None = None
    previews: int = 0
    warnings: tuple[str, ...] = ()
    encodes: bool = True
    decodes: bool = True

    def goal(self, trajectory: Trajectory) -> int:
        return trajectory.calls if self.until is None else min(self.until, trajectory.calls)


def generate_order(form: GenerateForm, model: Model) -> Order:
    """Pictures of a prompt.

    Raises:
        ConfigError: what the form cannot know but the model does: a size, number of steps or seed that does not fit.
        UnsupportedError: a sampler option that is not built.
    """
    settled = _settled(form, model, form.images)
    return Order(
        begin=lambda opened: start(opened, settled.request),
        end=_pictures,
        calls=settled.sampler.calls(settled.steps),
        images=form.images,
        shape=settled.latent_shape,
        deadline=form.deadline_seconds,
        previews=form.previews,
    )


def handoff_order(form: HandoffForm, model: Model) -> Order:
    """The first `split` calls of a prompt, as a trajectory. Raises as `generate_order`."""
    settled = _settled(form, model, 1)
    calls = settled.sampler.calls(settled.steps)
    if form.split > calls:
        raise ConfigError(f"split is {form.split}; {settled.steps} steps are {calls} calls: legal is from 0 to {calls}")
    return Order(
        begin=lambda opened: start(opened, settled.request),
        end=_packing(form),
        calls=form.split,
        images=1,
        shape=settled.latent_shape,
        until=form.split,
        deadline=form.deadline_seconds,
        decodes=False,
    )


def resume_order(data: bytes, form: ResumeForm, model: Model) -> Order:
    """A trajectory's next calls: to `until`, or to its end and the picture.

    Raises:
        HandoffError: the bytes are damaged, or made for another model.
        ConfigError: `until` lies behind where the trajectory stands, or past its end.
    """
    trajectory = unpack(data)
    warnings = check_arrival(trajectory, model, form.shared_latents)
    _require_legible(trajectory)
    until = trajectory.calls if form.until is None else form.until
    if not trajectory.step <= until <= trajectory.calls:
        raise ConfigError(f"until is {until}; legal is from {trajectory.step}, where it stands, to {trajectory.calls}")
    return Order(
        begin=lambda opened: [conditioned(opened, trajectory)],
        end=_pictures if form.until is None else _packing(form),
        calls=until - trajectory.step,
        images=1,
        shape=tuple(trajectory.latents.shape),
        until=form.until,
        deadline=form.deadline_seconds,
        previews=form.previews,
        warnings=warnings,
        encodes=trajectory.positive is None and not trajectory.done,
        decodes=form.until is None,
    )


def _settled(form: Drawing, model: Model, images: int) -> Settled:
    size = None if form.width is None or form.height is None else (form.width, form.height)
    request = Request(
        form.prompt,
        negative=form.negative_prompt,
        steps=form.steps,
        guidance=form.guidance,
        size=size,
        seed=form.seed,
        rng=form.rng,
        sampler=form.sampler,
        spacing=form.spacing,
        images=images,
    )
    return settle(request, model.family, model.scheduler)


def _require_legible(trajectory: Trajectory) -> None:
    """Facts go into the picture's texts; what no text can hold is refused here rather than after all calls."""
    try:
        json.dumps(trajectory.facts, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError:
        raise HandoffError("trajectory: its facts hold text or numbers that no PNG can") from None


def _pictures(model: Model, batch: Sequence[Trajectory]) -> Drawn:
    return Drawn(tuple((picture.png(), picture.settings) for picture in finish(model, batch)))


def _packing(form: HandoffForm | ResumeForm) -> Callable[[Model, Sequence[Trajectory]], Drawn]:
    return lambda model, batch: Drawn(trajectory=pack(batch[0], form.dtype, form.embeddings))
