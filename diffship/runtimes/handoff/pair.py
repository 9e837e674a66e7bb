"""Whether models may share a trajectory: found from facts and digests, before any of them computes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.core.strict import load, plain
from diffship.sampling.process import ALPHAS
from diffship.sampling.sampler import Sampler
from diffship.sampling.samplers import CONSISTENCY, make_sampler
from diffship.sampling.schedule import F32

_FACTS = {  # of the family: what a trajectory's arrays are made of and what the denoiser takes beside them
    "latent_channels": "latent channels",
    "vae_factor": "VAE factor",
    "text_width": "text width",
    "pooled_width": "pooled text width",
    "time_ids": "number of time ids",
    "time_cond_dim": "width of timestep_cond",
    "unet_channels": "U-Net input channels",
}
_TEXT = ("text_width", "pooled_width", "time_ids")  # of _FACTS: what a model that encodes the prompt itself may have
_SCALE = {
    "scaling_factor": "latent scale",
    "shift_factor": "latent shift",
    "latents_mean": "latent mean",
    "latents_std": "latent deviation",
}


class Facts(Protocol):
    """The side of a Model that a pair check reads; every Model has it."""

    @property
    def name(self) -> str: ...

    @property
    def family(self) -> Family: ...

    @property
    def scheduler(self) -> Mapping[str, Any]: ...

    @property
    def digests(self) -> Mapping[str, str]: ...


@dataclass(frozen=True)
class ModelFacts:
    """The facts of a model that is elsewhere; `of(model).to_json()` is what a server tells of its own."""

    name: str
    family: Family
    scheduler: dict[str, Any]  # a diffusers scheduler config
    digests: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, model: Facts) -> ModelFacts:
        return cls(model.name, model.family, dict(model.scheduler), dict(model.digests))

    def to_json(self) -> dict[str, Any]:
        return {**plain(self), "family": self.family.to_json()}

    @classmethod
    def from_json(cls, data: object) -> ModelFacts:
        """The inverse of `to_json`; raises ConfigError for an unknown key or a wrong type."""
        return load(cls, data, "model facts")


@dataclass(frozen=True)
class Differences:
    """`reasons` forbid a handoff, `warnings` do not."""

    reasons: tuple[str, ...]
    warnings: tuple[str, ...]


def check_pair(
    models: Sequence[Facts], sampler: str | None = None, shared_latents: bool = False, encode: bool = False
) -> tuple[str, ...]:
    """Warnings for `models` that draw one picture in this order with `sampler` (default: that of the first).

    Latents mean the same to two models if the halves of a VAE that both have are the same. One equal digest, of the
    encoder or of the decoder, is enough: decoders are fine-tuned under a fixed encoder, and only the last model
    decodes. `shared_latents` takes the caller's word for it (a tiny VAE made for the other's latents, an fp16 copy of
    an fp32 one) and compares neither digests nor scale and shift: the scale belongs to the VAE, and the latents that
    travel are the U-Net's. With `encode` each model reads the prompt itself if it takes other embeddings, as SDXL's
    refiner does.

    Raises:
        ConfigError: two of them cannot share a trajectory; every reason is named.
        UnsupportedError: a scheduler option that is not built.
    """
    first, warnings = models[0], []
    for other in models[1:]:
        found = differences(first, other, sampler, shared_latents, encode)
        if found.reasons:
            raise ConfigError(f"{first.name} and {other.name} cannot share a trajectory: {'; '.join(found.reasons)}")
        warnings += [f"{first.name} and {other.name}: {warning}" for warning in found.warnings]
    return tuple(dict.fromkeys(warnings))


def differences(
    first: Facts, other: Facts, sampler: str | None = None, shared_latents: bool = False, encode: bool = False
) -> Differences:
    """All that `check_pair` has to say of two models."""
    named = _FACTS if shared_latents else _FACTS | _SCALE
    named = {key: label for key, label in named.items() if not (encode and key in _TEXT)}
    reasons = [
        f"{label} is {getattr(first.family, key)} and {getattr(other.family, key)}"
        for key, label in named.items()
        if getattr(first.family, key) != getattr(other.family, key)
    ]
    if first.family.kind.denoiser != other.family.kind.denoiser:
        kinds = [f"{model.family.kind.denoiser} ({model.family.name})" for model in (first, other)]
        reasons.append(f"the denoiser is {' and '.join(kinds)}")
    reasons += [] if shared_latents else _other_vae(first, other)
    reasons += _other_kind(first, other)
    ours = sampler_of(first, sampler)
    reasons += other_schedule(ours, sampler_of(other, sampler or ours.name))
    warnings = [] if shared_latents else _unknown_vae(first, other)
    warnings += [*_other_text(first, other), *_other_sampler(first, other, sampler)]
    return Differences(tuple(reasons), tuple(warnings))


def sampler_of(model: Facts, name: str | None) -> Sampler:
    """The model's own sampler, or the one called `name` over the betas of its training."""
    return make_sampler({"prediction_type": model.family.prediction_type, **model.scheduler}, name)


def other_schedule(ours: Sampler, theirs: Sampler) -> list[str]:
    """How two samplers of one kind differ in what the models were trained on; grids and orders do not matter."""
    mine, others = ours.process.trained(), theirs.process.trained()
    if ours.process.kind != theirs.process.kind:
        return [f"the noise of training is {ours.process.kind} and {theirs.process.kind}"]
    pairs = {label: (mine[label], others[label]) for label in mine if label != ALPHAS}
    for key in ("original_inference_steps", "timestep_scaling"):  # of consistency distillation
        pairs[key] = (getattr(ours, key, None), getattr(theirs, key, None))
    reasons = [f"{label} is {value} and {other}" for label, (value, other) in pairs.items() if value != other]
    if ALPHAS in mine:
        reasons += _other_betas(mine[ALPHAS], others[ALPHAS])
    return reasons


def _other_betas(first: F32, second: F32) -> list[str]:
    if len(first) == len(second) and not np.array_equal(first, second):
        far = int(np.abs(first - second).argmax())
        return [f"the betas differ (at timestep {far} alpha_cumprod is {first[far]:.6g} and {second[far]:.6g})"]
    return []


def other_texts(first: Facts, other: Facts) -> list[str]:
    """Text encoders that both have and that are not the same weights."""
    ours, theirs, parts = first.digests, other.digests, first.family.kind.text_parts
    return [part for part in parts if part in ours and part in theirs and ours[part] != theirs[part]]


def _vae_halves(first: Facts, other: Facts) -> list[str]:
    kind = first.family.kind
    return [part for part in (kind.decoder, kind.encoder) if part in first.digests and part in other.digests]


def _unknown_vae(first: Facts, other: Facts) -> list[str]:
    if _vae_halves(first, other):
        return []
    return ["one comes without VAE: whether their latents are the same cannot be told"]


def _other_vae(first: Facts, other: Facts) -> list[str]:
    both = _vae_halves(first, other)
    if not both or any(first.digests[part] == other.digests[part] for part in both):
        return []
    shown = ", ".join(f"{part} {first.digests[part][:8]} and {other.digests[part][:8]}" for part in both)
    return [
        f"the VAEs differ ({shown}); where their latents are known to be the same, as those of a tiny VAE made for "
        "the other or of an fp16 copy, say so: --shared-latents"
    ]


def _other_kind(first: Facts, other: Facts) -> list[str]:
    lcm = [model.scheduler.get("_class_name") in CONSISTENCY for model in (first, other)]
    if lcm[0] == lcm[1]:
        return []
    name = (first if lcm[0] else other).name
    return [f"only {name} is a consistency model (LCM, TCD): its steps are not those of the other"]


def _other_text(first: Facts, other: Facts) -> list[str]:
    parts = other_texts(first, other)
    return [f"{' and '.join(parts)} differ; the embeddings of the model that starts travel"] if parts else []


def _other_sampler(first: Facts, other: Facts, sampler: str | None) -> list[str]:
    names = [str(model.scheduler.get("_class_name")) for model in (first, other)]
    if sampler is not None or names[0] == names[1]:
        return []
    return [f"their schedulers are {names[0]} and {names[1]}; the sampler of the model that starts travels"]
