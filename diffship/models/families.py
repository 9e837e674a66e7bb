"""Which family a pipeline belongs to, from the configs of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.family import Family
from diffship.models.autoencoder import KL, vae_factor
from diffship.models.component import reading
from diffship.models.facts import check_facts
from diffship.models.unet import check_config, text_time_widths, text_width

Config = Mapping[str, Any]
OWN = "_diffship"
_DEFAULTS = {"sd": (7.5, 25), "sdxl": (5.0, 30), "sdxl-refiner": (5.0, 30), "lcm": (8.0, 4)}


def family_of(
    unet: Config, vae_class: str, vae: Config, scheduler: Config, index: Config, text: Mapping[str, Config]
) -> Family:
    """Facts of the pipeline; `text` holds the configs of its text encoders by part name.

    Raises:
        SourceError: the parts do not fit each other (latent channels, text width), or a config lacks what it must say.
        UnsupportedError: latents are scaled channel by channel, or the U-Net takes more than latents and a mask.
    """
    with reading("unet", "UNet2DConditionModel"):
        check_config(unet)
    with reading("U-Net, VAE and text encoders", "pipeline"):
        check_facts(unet, vae, scheduler, own_facts(index), vae_factor(vae_class, vae))
        return _family(unet, vae_class, vae, scheduler, index, text)


def _family(
    unet: Config, vae_class: str, vae: Config, scheduler: Config, index: Config, text: Mapping[str, Config]
) -> Family:
    name = _name(unet, text)
    lcm = unet.get("time_cond_proj_dim")
    guidance, steps = _defaults(index, "lcm" if lcm else name)
    pooled, ids = text_time_widths(unet) if unet.get("addition_embed_type") == "text_time" else (None, None)
    factor = vae_factor(vae_class, vae)
    step = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    _check_fit(unet, vae, text, pooled)
    return Family(
        name=name,
        latent_channels=int(vae.get("latent_channels", 4)),
        vae_factor=factor,
        size_step=step,
        default_size=_default_size(unet, factor, step),
        scaling_factor=float(vae.get("scaling_factor") or (0.18215 if vae_class == KL else 1.0)),
        shift_factor=float(vae.get("shift_factor") or 0.0),
        prediction_type=str(scheduler.get("prediction_type", "epsilon")),
        text_width=text_width(unet),
        pooled_width=pooled,
        time_ids=ids,
        time_cond_dim=int(lcm) if lcm else None,
        unet_channels=int(unet.get("in_channels", 4)),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", name == "sdxl")),
        guidance_default=guidance,
        steps_default=steps,
    )


def own_facts(index: Config) -> Config:
    """What a model_index says under `_diffship` (recommended settings, history); stock diffusers skips the key."""
    own = index.get(OWN)
    return own if isinstance(own, dict) else {}


def _defaults(index: Config, kind: str) -> tuple[float, int]:
    own = own_facts(index)
    guidance, steps = _DEFAULTS[kind]
    return float(own.get("guidance_default", guidance)), int(own.get("steps_default", steps))


def _name(unet: Config, text: Mapping[str, Config]) -> str:
    if unet.get("addition_embed_type") != "text_time":
        return "sd"
    return "sdxl" if text_time_widths(unet)[1] == 6 else "sdxl-refiner"


def _default_size(unet: Config, factor: int, step: int) -> int:
    size = unet.get("sample_size") or 64
    side = int(size if isinstance(size, int) else min(size)) * factor
    return max(side // step, 1) * step


def _check_fit(unet: Config, vae: Config, text: Mapping[str, Config], pooled: int | None) -> None:
    given = sum(int(config.get("hidden_size", 512)) for config in text.values())
    if given != text_width(unet):
        raise SourceError(
            f"the U-Net takes text {text_width(unet)} wide, the text encoders give {given}: not one family"
        )
    second = text.get("text_encoder_2")
    if pooled and second and int(second.get("projection_dim", 512)) != pooled:
        raise SourceError(
            f"the U-Net takes pooled text {pooled} wide, text_encoder_2 gives {second.get('projection_dim')}"
        )
    if vae.get("latents_mean") is not None or vae.get("latents_std") is not None:
        raise UnsupportedError(
            "the VAE scales its latents channel by channel (latents_mean, latents_std); not built yet"
        )
    latents, channels = int(vae.get("latent_channels", 4)), int(unet.get("in_channels", 4))
    if channels not in (latents, 2 * latents + 1):
        raise UnsupportedError(
            f"the U-Net takes {channels} channels; text to image ({latents}) and inpainting ({2 * latents + 1}) are run"
        )
    if int(vae.get("latent_channels", 4)) != int(unet.get("out_channels", 4)):
        raise SourceError(
            f"the VAE has {vae.get('latent_channels')} latent channels, the U-Net {unet.get('out_channels')}"
        )
