"""What one request asks of a model's worker: how its trajectories begin, how far they go, what comes out."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError, HandoffError
from diffship.runtimes.handoff.arrival import check_arrival
from diffship.runtimes.serve.forms import Drawing, GenerateForm, HandoffForm, ResumeForm
from diffship.sampling.control import Control, Controlled
from diffship.sampling.controlled import require_controls
from diffship.sampling.generate import conditioned, finish, require_parts, start
from diffship.sampling.init_image import Canvas, controlled
from diffship.sampling.model import Model
from diffship.sampling.picture import Picture, grey, image_in
from diffship.sampling.request import Request, Settled, settle
from diffship.sampling.trajectory import Trajectory
from diffship.sampling.wire import pack, unpack


class Drawn:
    """What a request gave: pictures, or the bytes of a trajectory.

    The engine's thread hands over pixels. Whoever first asks for `pictures` makes PNG files of them, which takes up to
    half a second each: no thread that others wait for asks.
    """

    def __init__(self, pictures: Sequence[Picture] = (), trajectory: bytes = b"") -> None:
        self.trajectory = trajectory
        self.settings: tuple[dict[str, Any], ...] = tuple(picture.settings for picture in pictures)
        self._pixels = [Picture(picture.pixels, picture.settings) for picture in pictures]
        self._files: tuple[bytes, ...] = ()
        self._lock = threading.Lock()

    @property
    def pictures(self) -> tuple[tuple[bytes, dict[str, Any]], ...]:
        """PNG files with their settings."""
        with self._lock:
            if self._pixels:
                self._files, self._pixels = tuple(picture.png() for picture in self._pixels), []
        return tuple(zip(self._files, self.settings, strict=True))

    @property
    def size_bytes(self) -> int:
        """What it takes up now."""
        pixels = sum(picture.pixels.nbytes for picture in self._pixels)
        return len(self.trajectory) + pixels + sum(map(len, self._files))


@dataclass(frozen=True, eq=False)
class Order:
    """`calls` are those that each of `images` still needs, `shape` is that of its latents.

    `until` is the call to stop before (None: the end). `deadline` in seconds, None for the server's.
    `previews`: one every so many calls, 0 for none. `warnings` are for the client. `encodes`, `decodes`: whether it
    begins with text to encode and ends with pictures to decode, which is what takes time there. `guided`: whether a
    call computes two rows an image. `controls`: names of the ControlNets that every call computes too.
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
    guided: bool = False
    controls: tuple[str, ...] = ()

    def goal(self, trajectory: Trajectory) -> int:
        return trajectory.calls if self.until is None else min(self.until, trajectory.calls)


def generate_order(form: GenerateForm, model: Model) -> Order:
    """Pictures of a prompt.

    Raises:
        ConfigError: what the form cannot know but the model does: a size, number of steps or seed that does not fit.
        UnsupportedError: a sampler option that is not built; the model has no decoder.
    """
    require_parts(model, model.family.kind.decoder)
    settled, warnings = _settled(form, model, form.images)
    return Order(
        begin=lambda opened: start(opened, settled.request),
        end=_pictures,
        calls=settled.sampler.calls(settled.steps) - settled.begin,
        images=form.images,
        shape=settled.latent_shape,
        deadline=form.deadline_seconds,
        previews=form.previews,
        warnings=warnings,
        guided=_guided(settled.guidance, model),
        controls=_names(settled.request.controls),
    )


def handoff_order(form: HandoffForm, model: Model) -> Order:
    """The first `split` calls of a prompt, as a trajectory. Raises as `generate_order`."""
    settled, warnings = _settled(form, model, 1)
    calls, begin = settled.sampler.calls(settled.steps), settled.begin
    if not begin <= form.split <= calls:
        raise ConfigError(
            f"split is {form.split}; {settled.steps} steps are {calls} calls: legal is from {begin} to {calls}"
        )
    return Order(
        begin=lambda opened: start(opened, settled.request),
        end=_packing(form),
        calls=form.split - begin,
        images=1,
        shape=settled.latent_shape,
        until=form.split,
        deadline=form.deadline_seconds,
        warnings=warnings,
        decodes=False,
        guided=_guided(settled.guidance, model),
        controls=_names(settled.request.controls),
    )


def resume_order(data: bytes, form: ResumeForm, model: Model) -> Order:
    """A trajectory's next calls: to `until`, or to its end and the picture.

    Raises:
        HandoffError: the bytes are damaged, or made for another model.
        ConfigError: `until` lies behind where the trajectory stands, or past its end.
        UnsupportedError: a picture is asked for, and the model has no decoder.
    """
    if form.until is None:
        require_parts(model, model.family.kind.decoder)
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
        guided=_guided(trajectory.guidance, model),
        controls=_names(trajectory.controls),
    )


def _settled(form: Drawing, model: Model, images: int) -> tuple[Settled, tuple[str, ...]]:
    """The settled request, whose pictures have the size of what is drawn already, and warnings of them."""
    require_controls(model, [control.name for control in form.controls])
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
        prompt_syntax=form.prompt_syntax,
        clip_skip=form.clip_skip,
        eta=form.eta,
        images=images,
        strength=form.strength,
    )
    read = {name: _picture(name, text) for name in ("image", "mask") if (text := getattr(form, name)) is not None}
    pixels: dict[str, Any] = {name: grey(found) if name == "mask" else found for name, (found, _) in read.items()}
    controls, told = _controls(form)
    request = replace(request, controls=controls, guess=form.guess, **pixels)
    settled, resized = _fitted(settle(request, model.family, model.scheduler))
    if settled.request.image is not None:
        require_parts(model, model.family.kind.encoder)
    canvas = Canvas.of(settled)
    told = tuple(warning for _, warnings in read.values() for warning in warnings) + told + resized
    if canvas is None:
        return settled, told
    # a queue of requests holds pictures of the size that is drawn, whatever came
    mask = None if canvas.mask is None else (canvas.mask * 255).astype(np.uint8)
    return replace(settled, request=replace(settled.request, image=canvas.image, mask=mask)), told + canvas.warnings


def _controls(form: Drawing) -> tuple[tuple[Control, ...], tuple[str, ...]]:
    """The controls of a form with their pictures as they came, and warnings."""
    made: list[Control] = []
    told: list[str] = []
    for control in form.controls:
        pixels, warnings = _picture(f"image of control {control.name}", control.image)
        made.append(Control(control.name, pixels, control.scale, control.start, control.end))
        told += warnings
    return tuple(made), tuple(told)


def _fitted(settled: Settled) -> tuple[Settled, tuple[str, ...]]:
    """The same with the pictures of its controls in the size of what is drawn, and warnings."""
    fitting, told = controlled(settled)
    images = [np.ascontiguousarray(one.image.transpose(1, 2, 0), dtype=np.uint8) for one in fitting]
    pairs = zip(settled.request.controls, images, strict=True)
    controls = tuple(replace(control, image=image) for control, image in pairs)
    return replace(settled, request=replace(settled.request, controls=controls)), told


def _names(controls: Sequence[Control | Controlled]) -> tuple[str, ...]:
    return tuple(control.name for control in controls)


def _picture(name: str, text: str) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Pixels of a file in base64, and warnings. Raises ConfigError: it is neither."""
    try:
        data = base64.b64decode(text, validate=True)
    except ValueError:
        raise ConfigError(
            f"{name} is not base64; give a PNG, JPEG or WebP file in base64, without data: before"
        ) from None
    return image_in(data, name)


def _guided(guidance: float, model: Model) -> bool:
    return guidance > 1.0 and not model.family.takes_guidance


def _require_legible(trajectory: Trajectory) -> None:
    """Facts go into the picture's texts; what no text can hold is refused here rather than after all calls."""
    try:
        json.dumps(trajectory.facts, ensure_ascii=False, allow_nan=False).encode("utf-8")
    except ValueError:
        raise HandoffError("trajectory: its facts hold text or numbers that no PNG can") from None


def _pictures(model: Model, batch: Sequence[Trajectory]) -> Drawn:
    return Drawn(finish(model, batch))


def _packing(form: HandoffForm | ResumeForm) -> Callable[[Model, Sequence[Trajectory]], Drawn]:
    return lambda model, batch: Drawn(trajectory=pack(batch[0], form.dtype, form.embeddings))
