"""Facts that a source states about itself, checked where they are read: no bundle may hold others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.family import Family
from diffship.core.strict import legal_value

Config = Mapping[str, Any]
# where a config lies -> {its key: the field of Family that takes the value}
_KEYS = {
    "unet/config.json: ": {"in_channels": "unet_channels", "time_cond_proj_dim": "time_cond_dim"},
    "vae/config.json: ": {
        "latent_channels": "latent_channels",
        "scaling_factor": "scaling_factor",
        "shift_factor": "shift_factor",
    },
    "scheduler/scheduler_config.json: ": {"prediction_type": "prediction_type"},
    "model_index.json: _diffship.": {"guidance_default": "guidance_default", "steps_default": "steps_default"},
}
_UNSET = ("time_cond_proj_dim", "scaling_factor", "shift_factor")  # null means the default there


def check_facts(unet: Config, vae: Config, scheduler: Config, own: Config, factor: int) -> None:
    """Check what the configs say against the bounds of Family. `own` is `_diffship` in model_index.json, `factor` how
    many pixels one latent is wide.

    Raises:
        SourceError: naming the file, the key, the value and what is legal.
        UnsupportedError: the model was trained by flow matching.
    """
    _refuse_flow(scheduler)
    for (place, keys), config in zip(_KEYS.items(), (unet, vae, scheduler, own), strict=True):
        for key, field in keys.items():
            if key in config and not (key in _UNSET and config[key] is None):
                legal_value(Family, field, config[key], f"{place}{key}", SourceError)
    size = unet.get("sample_size")
    for side in size if isinstance(size, (list, tuple)) else [size or 64]:
        where = f"unet/config.json: sample_size is {size}; the default side of a picture, {factor} times that,"
        legal_value(Family, "default_size", side * factor, where, SourceError)


def _refuse_flow(scheduler: Config) -> None:
    signs = {
        "_class_name": str(scheduler.get("_class_name", "")).startswith("FlowMatch"),
        "prediction_type": str(scheduler.get("prediction_type")).startswith("flow"),
        "use_flow_sigmas": bool(scheduler.get("use_flow_sigmas")),
    }
    for key, found in signs.items():
        if found:
            raise UnsupportedError(
                f"scheduler/scheduler_config.json: {key} is {str(scheduler[key])[:80]}: the model was trained by flow "
                "matching, which is not built; models that predict epsilon, v_prediction or sample are"
            )
