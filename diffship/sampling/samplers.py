"""The table of samplers, and the sampler of a diffusers scheduler config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.registry import SAMPLERS as SAMPLERS
from diffship.core.registry import load as load_class
from diffship.core.strict import load as load_fields
from diffship.sampling.sampler import CONFIG, Sampler
from diffship.sampling.schedule import Schedule, known

_BY_CLASS = {
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "deis",
    "DPMSolverMultistepScheduler": "dpmpp-2m",
    "DPMSolverSDEScheduler": "dpmpp-sde",
    "DPMSolverSinglestepScheduler": "dpmpp-2s",
    "EDMDPMSolverMultistepScheduler": "edm-dpmpp",
    "EDMEulerScheduler": "edm-euler",
    "EulerAncestralDiscreteScheduler": "euler-a",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "flow-euler",
    "FlowMatchHeunDiscreteScheduler": "flow-heun",
    "HeunDiscreteScheduler": "heun",
    "KDPM2AncestralDiscreteScheduler": "kdpm2-a",
    "KDPM2DiscreteScheduler": "kdpm2",
    "LCMScheduler": "lcm",
    "PNDMScheduler": "pndm",
    "TCDScheduler": "tcd",
    "UniPCMultistepScheduler": "unipc",
}
CONSISTENCY = ("LCMScheduler", "TCDScheduler")  # of models that were distilled to draw in a few steps
_OTHERS = {"EDM": "edm", "FlowMatch": "flow"}  # how the names of classes of another noise begin
# Every class of diffusers whose noise is that of betas: their configs can be taken over by each other.
WITH_BETAS = (
    *(name for name in _BY_CLASS if not name.startswith(tuple(_OTHERS))),
    *("LMSDiscreteScheduler", "SASolverScheduler"),
    *("DDIMInverseScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler", "DPMSolverMultistepInverseScheduler"),
)


def make_sampler(config: Mapping[str, Any], name: str | None = None) -> Sampler:
    """The sampler of a diffusers scheduler config, or the one called `name` over the same config.

    With a name this is diffusers' `Scheduler.from_config(pipe.scheduler.config)`.

    Raises:
        ConfigError: unknown name or class, or a value that diffusers refuses too.
        UnsupportedError: an option that is not supported, named, or a model that was trained on another kind of noise.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"the scheduler config is a {type(config).__name__}; it must be a table")
    kind = _load(_name_of(config) if name is None else name)
    require_noise(config, kind.process_kind)
    return kind.from_config({**config, **kind.promised.get(name or "", {})})


def require_noise(config: Mapping[str, Any], kind: str) -> None:
    """Raises UnsupportedError, naming the key, for a model that was trained on another noise than that of `kind`."""
    found, key = _noise_of(config)
    if found in (kind, ""):
        return
    fitting = [name for name in SAMPLERS if _load(name).process_kind == found]
    can = f"draw with {', '.join(fitting)}" if fitting else "no sampler here draws with it"
    raise UnsupportedError(
        f"{CONFIG}: {key} is {str(config.get(key))[:80]!r}, so the noise that the model was "
        f"trained on is not that of {_NOISES[kind]}: {can}"
    )


_NOISES = {"betas": "betas", "edm": "EDM (Karras et al. 2022)", "flow": "flow matching"}


def _noise_of(config: Mapping[str, Any]) -> tuple[str, str]:
    """(kind of the noise, "" if nothing is said of it; the key that says so)."""
    if str(config.get("prediction_type", "")).startswith("flow"):
        return "flow", "prediction_type"
    if config.get("sigma_data"):
        return "edm", "sigma_data"
    for key in ("use_flow_sigmas", "use_dynamic_shifting"):
        if config.get(key):
            return "flow", key
    named = str(config.get("_class_name", ""))
    if named in WITH_BETAS or not named:
        return "betas" if named else "", "_class_name"
    return next((kind for start, kind in _OTHERS.items() if named.startswith(start)), "unknown"), "_class_name"


def noise_schedule(config: Mapping[str, Any]) -> Schedule:
    """The betas and timesteps that a model was trained with, whatever its scheduler draws with.

    Raises:
        ConfigError: a value that diffusers refuses too.
        UnsupportedError: a scheduler without betas, such as one of flow matching.
    """
    require_noise(config, "betas")
    name, names = str(config.get("_class_name", "")), {field.name for field in fields(_Trained)} - _DRAWING
    if name not in _BY_CLASS and not ({"beta_start", "trained_betas"} & config.keys()):
        raise UnsupportedError(f"the scheduler {name!r} says nothing of betas; models of diffusion have them")
    kind = _load(_BY_CLASS[name]) if name in _BY_CLASS else _Trained
    own = {field.name: field.default for field in fields(kind) if field.default is not MISSING}
    return load_fields(_Trained, {**known(own, names), **known(config, names)}, "scheduler config")


@dataclass(frozen=True)
class _Trained(Schedule):
    rescale_betas_zero_snr: bool = False


_DRAWING = {"timestep_spacing", "steps_offset"}


def _load(name: str) -> type[Sampler]:
    kind: type[Sampler] = load_class(SAMPLERS, name, "sampler")
    return kind


def _name_of(config: Mapping[str, Any]) -> str:
    name = str(config.get("_class_name", ""))
    if name not in _BY_CLASS:
        raise ConfigError(
            f"{CONFIG}: _class_name is {name!r}, a scheduler that is not built; name a sampler: {', '.join(SAMPLERS)}"
        )
    return _BY_CLASS[name]
