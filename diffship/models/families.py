"""Which family a pipeline belongs to, from the configs of its parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.family import PREDICTIONS, Family
from diffship.models.facts import check_facts
from diffship.models.parts.autoencoder import KL, vae_factor
from diffship.models.parts.component import reading
from diffship.models.parts.unet import check_config, text_time_widths, text_width
from diffship.models.stock import CLASSES, default_steps, stock_class

Config = Mapping[str, Any]
OWN = "_diffship"
_RGB = 3


def family_of(
    unet: Config, vae_class: str, vae: Config, scheduler: Config, index: Config, text: Mapping[str, Config]
) -> Family:
    """Facts of the pipeline; `text` holds the configs of its text encoders by part name.

    Raises:
        SourceError: the parts do not fit each other (latent channels, text width), or a config lacks what it must say.
        UnsupportedError: latents are scaled channel by channel, the U-Net takes more than latents and a mask, or the
            model_index names a class that is not drawn here.
    """
    with reading("unet", "UNet2DConditionModel"):
        check_config(unet)
    with reading("U-Net, VAE and text encoders", "pipeline"):
        check_facts(unet, vae, scheduler, own_facts(index), vae_factor(vae_class, vae))
        return _family(unet, vae_class, vae, scheduler, index, text)


def _family(
    unet: Config, vae_class: str, vae: Config, scheduler: Config, index: Config, text: Mapping[str, Config]
) -> Family:
    name, stock = _name(unet), stock_class(index, unet)
    lcm = unet.get("time_cond_proj_dim")
    guidance, steps = _defaults(index, stock, unet)
    pooled, ids = text_time_widths(unet) if unet.get("addition_embed_type") == "text_time" else (None, None)
    factor = vae_factor(vae_class, vae)
    step = factor * 2 ** (len(unet["block_out_channels"]) - 1)
    _check_fit(unet, vae, text, pooled)
    width, height = _default_sides(unet, factor, step)
    return Family(
        name=name,
        latent_channels=int(vae.get("latent_channels", 4)),
        vae_factor=factor,
        size_step=step,
        default_size=width,
        default_height=None if height == width else height,
        scaling_factor=float(vae.get("scaling_factor") or (0.18215 if vae_class == KL else 1.0)),
        prediction_type=_prediction(scheduler),
        text_width=text_width(unet),
        pooled_width=pooled,
        time_ids=ids,
        time_cond_dim=int(lcm) if lcm else None,
        unet_channels=int(unet.get("in_channels", 4)),
        force_zeros_for_empty_prompt=bool(index.get("force_zeros_for_empty_prompt", name != "sd")),
        guidance_default=guidance,
        steps_default=steps,
        strength_default=CLASSES[stock].strength,
    )


def _prediction(scheduler: Config) -> str:
    found = scheduler.get("prediction_type", PREDICTIONS[0])
    if found not in PREDICTIONS:
        raise UnsupportedError(
            f"scheduler/scheduler_config.json: prediction_type is {str(found)[:80]!r}; legal: {', '.join(PREDICTIONS)}"
        )
    return str(found)


def own_facts(index: Config) -> Config:
    """What a model_index says under `_diffship` (recommended settings, history); stock diffusers skips the key."""
    own = index.get(OWN)
    return own if isinstance(own, dict) else {}


def _defaults(index: Config, stock: str, unet: Config) -> tuple[float, int]:
    own = own_facts(index)
    guidance, steps = CLASSES[stock].guidance, default_steps(stock, unet)
    return float(own.get("guidance_default", guidance)), int(own.get("steps_default", steps))


def _name(unet: Config) -> str:
    if unet.get("addition_embed_type") != "text_time":
        return "sd"
    return "sdxl" if text_time_widths(unet)[1] == 6 else "sdxl-refiner"


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
    for key in ("latents_mean", "latents_std", "shift_factor"):
        if vae.get(key):
            raise UnsupportedError(
                f"vae/config.json: {key} is {str(vae[key])[:60]}; only VAEs whose latents are scaled by one number "
                "(scaling_factor) are drawn with"
            )
    if text.get("text_encoder", {}).get("use_attention_mask") and pooled is None:
        raise UnsupportedError("text_encoder/config.json: use_attention_mask is on, and padding is not masked here")
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
    for key in ("in_channels", "out_channels"):
        if vae.get(key, _RGB) != _RGB:
            raise UnsupportedError(
                f"vae/config.json: {key} is {str(vae[key])[:60]}; pictures of {_RGB} channels are run"
            )
