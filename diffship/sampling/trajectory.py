"""Trajectory: one image between two model calls, with everything that the next call needs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from diffship.core.brief import brief
from diffship.core.errors import ConfigError, HandoffError
from diffship.core.family import Family
from diffship.core.kind import Shape
from diffship.core.reading import PLAIN, Reading
from diffship.sampling.control import Controlled
from diffship.sampling.rng import Noise
from diffship.sampling.sampler import Sampler

Array = Any


@brief
@dataclass(frozen=True, eq=False)
class Conditioning(Mapping[str, Array]):
    """What a denoiser is told of one prompt: its own inputs by name, float32, without a batch axis.

    Stable Diffusion: `encoder_hidden_states` (tokens, width); SDXL also `text_embeds` (width,) and `time_ids` (6,) or
    (5,). Two of them are equal if they are the same object: the arrays are not compared.
    """

    arrays: Mapping[str, Array]

    def __getitem__(self, name: str) -> Array:
        return self.arrays[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.arrays)

    def __len__(self) -> int:
        return len(self.arrays)

    __eq__ = object.__eq__
    __hash__ = object.__hash__


@brief
@dataclass(frozen=True)
class Origin:
    """The kind of model that a trajectory began with, and the digests of the parts that the next model should share."""

    family: Family
    digests: Mapping[str, str] = field(default_factory=dict)  # of shared parts; empty if weights still change


def warnings_in(facts: Mapping[str, Any]) -> list[str]:
    """The warnings in a trajectory's facts. Facts come from the sender, so anything that is not a list is ignored."""
    found = facts.get("warnings")
    return [str(text) for text in found] if isinstance(found, list) else []


@brief
@dataclass(frozen=True, eq=False)
class Trajectory:
    """One image after `step` of `sampler.calls(steps)` model calls.

    Latents are float32 without a batch axis, (channels, height, width) as a rule; the kind of model says which shape.
    `guidance` is classifier-free guidance over (`negative`, `positive`); models with a time condition take it as an
    embedding instead. `history` is newest first, as the sampler's matrix has it. Frozen: a step makes a new one.
    """

    latents: Array
    step: int
    steps: int
    sampler: Sampler
    noise: Noise
    size: tuple[int, int]  # width, height in pixels
    guidance: float = 1.0
    positive: Conditioning | None = None
    negative: Conditioning | None = None
    history: tuple[Array, ...] = ()
    mask: Array | None = None  # as the latents with one channel, 1 = draw here
    masked_latents: Array | None = None  # as the latents, for models that read them
    init_latents: Array | None = None  # as the latents: what is put back where the mask is 0, under `init_noise`
    init_noise: Array | None = None  # as the latents, standard normal
    controls: tuple[Controlled, ...] = ()
    prompt: str = ""
    negative_prompt: str | None = None  # None: none was given, which SDXL encodes as zeros
    facts: dict[str, Any] = field(default_factory=dict)  # settings that only label the picture
    origin: Origin | None = None
    reading: Reading = PLAIN  # how `prompt` and `negative_prompt` are read

    @property
    def calls(self) -> int:
        """Number of model calls from start to end."""
        return self.sampler.calls(self.steps)

    @property
    def done(self) -> bool:
        """Whether no call is left."""
        return self.step >= self.calls

    def without_conditioning(self) -> Trajectory:
        """The same without embeddings: a receiver encodes `prompt` and `negative_prompt` itself."""
        return replace(self, positive=None, negative=None)

    def require_fit(self, family: Family) -> None:
        """Raises HandoffError, naming the value, unless a model of `family` can go on from here."""
        try:
            shape, legal = family.latent_shape(*self.size), family.kind.conditions(family)
        except ConfigError as fault:
            raise HandoffError(f"the trajectory does not fit this model: {fault}") from None
        _same("latents", tuple(self.latents.shape), shape)
        _same("prediction type", self.sampler.process.prediction, family.prediction_type)
        self._require_mask(family.fills_masks)
        if self.controls and family.kind.controlled is None:
            raise HandoffError(
                f"the trajectory does not fit this model: a ControlNet acts on it, and {family.name} has none"
            )
        for control in self.controls:
            _same(f"picture of control {control.name}", tuple(control.image.shape), (3, *self.size[::-1]))
        for condition in (self.positive, self.negative):
            if condition is not None:
                _same("conditioning", sorted(condition), sorted(legal))
                for name, array in condition.items():
                    _require_shape(name, tuple(array.shape), legal[name])

    @property
    def blends(self) -> bool:
        """Whether the image is put back, after every call, where the mask is 0: the denoiser knows of no mask then."""
        return self.init_latents is not None

    def _require_mask(self, read: bool) -> None:
        """Raises HandoffError unless there is all that a mask needs: if the denoiser reads it (`read`), masked latents;
        otherwise either nothing, or the image and its noise."""
        given = [name for name in _MASKS if getattr(self, name) is not None]
        legal = (["mask", "masked_latents"],) if read else ([], ["mask", "init_latents", "init_noise"])
        if given not in legal:
            _same("of a mask present", given or "nothing", " or ".join(str(names or "nothing") for names in legal))
        for name in given:
            channels = 1 if name == "mask" else self.latents.shape[0]
            _same(name, tuple(getattr(self, name).shape), (channels, *self.latents.shape[1:]))


_MASKS = ("mask", "masked_latents", "init_latents", "init_noise")


def conditions_fit(condition: Conditioning, family: Family) -> bool:
    """Whether a denoiser of `family` takes these conditions."""
    legal = family.kind.conditions(family)
    return set(condition) == set(legal) and all(_fits(tuple(condition[name].shape), legal[name]) for name in legal)


def _fits(shape: tuple[int, ...], legal: Shape) -> bool:
    return len(shape) == len(legal) and all(side in (None, ours) for ours, side in zip(shape, legal, strict=True))


def _require_shape(name: str, shape: tuple[int, ...], legal: Shape) -> None:
    if not _fits(shape, legal):
        _same(name, shape, tuple("any" if side is None else side for side in legal))


def _same(what: str, ours: object, theirs: object) -> None:
    if ours != theirs:
        raise HandoffError(f"the trajectory does not fit this model: {what} is {ours}, the model has {theirs}")


def at_step(trajectory: Trajectory, latents: Array, history: tuple[Array, ...], noise: Noise) -> Trajectory:
    """The trajectory one call later."""
    return replace(trajectory, latents=latents, history=history, noise=noise, step=trajectory.step + 1)


def as_numpy(array: Array) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Any array type as float32 numpy; it may share memory with `array`, so it is not written to."""
    value = array.detach().float().cpu().numpy() if hasattr(array, "detach") else np.asarray(array)
    return np.asarray(value, np.float32)
