"""The facts of a U-Net pipeline, from the configs of its parts, checked as they are read: no bundle may hold others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.family import PREDICTIONS, Family
from diffship.core.strict import legal_value

if TYPE_CHECKING:
    from diffship.kinds.unet import UNetKind
    from diffship.models.pipeline import Material

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
_RGB = 3
_UNSET = ("time_cond_proj_dim", "scaling_factor", "shift_factor")  # null means the default there


def family_facts(kind: UNetKind, material: Material) -> dict[str, Any]:
    """Fields of Family that the configs of complete and repaired material say.

    Raises:
        SourceError: the parts do not fit each other (latent channels, text width), or a config lacks what it must say.
        UnsupportedError: latents are scaled channel by channel, or the U-Net takes more than latents and a mask.
    """
    from diffship.models.parts.autoencoder import vae_factor
    from diffship.models.parts.component import reading
    from diffship.models.parts.unet import check_config
    from diffship.models.pipeline import own_facts

    parts = dict(material.modules)
    unet, vae = parts.pop(kind.denoiser), parts.pop("vae")
    with reading(kind.denoiser, unet.class_name):
        check_config(unet.config)
    with reading("U-Net, VAE and text encoders", "pipeline"):
        factor, scheduler = vae_factor(vae.class_name, vae.config), material.scheduler or {}
        check_facts(unet.config, vae.config, scheduler, own_facts(material.index), factor)
        texts = {name: module.config for name, module in parts.items()}
        return _facts(unet.config, vae.class_name, vae.config, scheduler, texts, kind.pooled_part)


def _facts(
    unet: Config,
    vae_class: str,
    vae: Config,
    scheduler: Config,
    texts: Mapping[str, Config],
    pooled_of: str | None,
) -> dict[str, Any]:
    from diffship.models.parts.autoencoder import scaling_factor, vae_factor
    from diffship.models.parts.unet import text_time_widths, text_width

    lcm, factor = unet.get("time_cond_proj_dim"), vae_factor(vae_class, vae)
    pooled, ids = text_time_widths(unet) if unet.get("addition_embed_type") == "text_time" else (None, None)
    step = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    _check_texts(texts, text_width(unet), pooled, pooled_of)
    _check_latents(unet, vae)
    width, height = _default_sides(unet, factor, step)
    return {
        "latent_channels": int(vae.get("latent_channels", 4)),
        "vae_factor": factor,
        "size_step": step,
        "default_size": width,
        "default_height": None if height == width else height,
        "scaling_factor": scaling_factor(vae_class, vae),
        "prediction_type": _prediction(scheduler),
        "text_width": text_width(unet),
        "pooled_width": pooled,
        "time_ids": ids,
        "time_cond_dim": int(lcm) if lcm else None,
        "unet_channels": int(unet.get("in_channels", 4)),
    }


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


def _prediction(scheduler: Config) -> str:
    found = scheduler.get("prediction_type", PREDICTIONS[0])
    if found not in PREDICTIONS:
        raise UnsupportedError(
            f"scheduler/scheduler_config.json: prediction_type is {str(found)[:80]!r}; legal: {', '.join(PREDICTIONS)}"
        )
    return str(found)


def _default_sides(unet: Config, factor: int, step: int) -> tuple[int, int]:
    """(width, height) in pixels that `sample_size` says, latents as [height, width] or one number for both."""
    size = unet.get("sample_size") or 64
    height, width = (size, size) if isinstance(size, int) else size
    for side in (height, width):
        if side * factor % step:
            raise UnsupportedError(
                f"unet/config.json: sample_size {size} makes pictures of {width * factor}x{height * factor} pixels; "
                f"this U-Net draws multiples of {step}: write {max(side * factor // step, 1) * step // factor} there"
            )
    return int(width) * factor, int(height) * factor


def _check_texts(texts: Mapping[str, Config], width: int, pooled: int | None, pooled_of: str | None) -> None:
    given = sum(int(config.get("hidden_size", 512)) for config in texts.values())
    if given != width:
        raise SourceError(f"the U-Net takes text {width} wide, the text encoders give {given}: not one family")
    second = texts.get(pooled_of or "")
    if pooled and second and int(second.get("projection_dim", 512)) != pooled:
        raise SourceError(
            f"the U-Net takes pooled text {pooled} wide, {pooled_of} gives {second.get('projection_dim')}"
        )
    for name, config in texts.items():
        if config.get("use_attention_mask") and pooled is None:
            raise UnsupportedError(f"{name}/config.json: use_attention_mask is on, and padding is not masked here")


def _check_latents(unet: Config, vae: Config) -> None:
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(key):
            raise UnsupportedError(
                f"vae/config.json: {key} is {str(vae[key])[:60]}; only VAEs whose latents are scaled by one number "
                "(scaling_factor) are drawn with"
            )
    _check_channels(unet, vae)


def _check_channels(unet: Config, vae: Config) -> None:
    latents, channels = int(vae.get("latent_channels", 4)), int(unet.get("in_channels", 4))
    if channels not in (latents, 2 * latents + 1):
        raise UnsupportedError(
            f"unet/config.json: in_channels is {channels}, the VAE's latents have {latents}; legal is {latents} "
            f"(text to image) or {2 * latents + 1} (inpainting)"
        )
    if latents != int(unet.get("out_channels", 4)):
        raise SourceError(
            f"unet/config.json: out_channels is {unet.get('out_channels')}; legal is {latents}, the latent_channels of "
            "vae/config.json"
        )
    require_rgb(vae)


def require_rgb(vae: Config) -> None:
    """Raises UnsupportedError if a VAE reads or writes pictures of other channels than red, green and blue."""
    for key in ("in_channels", "out_channels"):
        if vae.get(key, _RGB) != _RGB:
            raise UnsupportedError(
                f"vae/config.json: {key} is {str(vae[key])[:60]}; pictures of {_RGB} channels are run"
            )
