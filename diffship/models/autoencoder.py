"""The `vae_encoder` and `vae_decoder` parts of AutoencoderKL and of the tiny auto-encoder (TAESD)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.strict import bounded, bounds, load
from diffship.core.weights import Weights, renamed, subset
from diffship.models.component import Component
from diffship.models.widths import KEY

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch import nn
    from torch.nn import Module
else:
    diffusers, nn = lazy("diffusers"), lazy("torch.nn")
    Module = lazy_base("torch.nn", "Module")

KL, TINY = "AutoencoderKL", "AutoencoderTiny"
# names of attention tensors before diffusers 0.18; checkpoints on the hub still have them
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
@bounded
class Narrow:
    """What a KL auto-encoder's config says under `diffship`. decoder: channels of the decoder's levels, counted as
    `block_out_channels` counts the encoder's, where it is narrower than that (the small VAE of Hybrid SD)."""

    decoder: tuple[int, ...] = field(metadata=bounds(1, 65536))


class Encoder(Module):
    """(sample,) -> (latent_parameters,): mean and log variance for KL, the latents themselves for the tiny one."""

    inner: Any

    def __init__(self, class_name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = _half(class_name, _stock(config), ("encoder", "quant_conv"))

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        encoded = self.inner.encoder(sample)
        return (self.inner.quant_conv(encoded) if hasattr(self.inner, "quant_conv") else encoded,)


class Decoder(Module):
    """(latent_sample,) -> (sample,) in [-1, 1]; the latents are divided by the scaling factor already."""

    inner: Any

    def __init__(self, class_name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = _half(class_name, _of_decoder(config), ("decoder", "post_quant_conv"))

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        if hasattr(self.inner, "post_quant_conv"):
            latent_sample = self.inner.post_quant_conv(latent_sample)
        return (self.inner.decoder(latent_sample),)


def autoencoder(
    class_name: str, config: Mapping[str, Any], weights: Weights, smallest_px: int = 64
) -> tuple[Component, Component]:
    """(vae_encoder, vae_decoder) over one set of weights.

    Raises:
        UnsupportedError: another class than AutoencoderKL or AutoencoderTiny.
        SourceError: what stands under `diffship` in its config is not known here, or does not fit the rest.
    """
    if class_name not in (KL, TINY):
        raise UnsupportedError(f"vae: {class_name} is not supported; legal: {KL}, {TINY}")
    check_narrow(class_name, config)
    weights = renamed(weights, {_current(name): name for name in weights.names()})
    factor, latents = vae_factor(class_name, config), int(config.get("latent_channels", 4))
    image = TensorSpec("sample", "float32", ("batch_size", 3, "sample_height", "sample_width"))
    parameters = TensorSpec(
        "latent_parameters",
        "float32",
        (
            "batch_size",
            latents * (2 if class_name == KL else 1),
            f"sample_height / {factor}",
            f"sample_width / {factor}",
        ),
    )
    latent = TensorSpec("latent_sample", "float32", ("batch_size", latents, "latent_height", "latent_width"))
    picture = TensorSpec(
        "sample", "float32", ("batch_size", 3, f"latent_height * {factor}", f"latent_width * {factor}")
    )
    side = smallest_px // factor
    encoder = Component(
        "vae_encoder", class_name, dict(config), partial(Encoder, class_name, dict(config)), weights, (image,),
        (parameters,), {"batch_size": 1, "sample_height": smallest_px, "sample_width": smallest_px},
    )  # fmt: skip
    decoder = Component(
        "vae_decoder", class_name, dict(config), partial(Decoder, class_name, dict(config)), weights, (latent,),
        (picture,), {"batch_size": 1, "latent_height": side, "latent_width": side},
    )  # fmt: skip
    return _owning(encoder), _owning(decoder)


def decoder_widths(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Channels of the levels of a KL decoder, which stock configs cannot say apart from those of the encoder."""
    if KEY not in config:
        return tuple(config["block_out_channels"])
    return load(Narrow, config[KEY], f"vae config: {KEY}", SourceError).decoder


def narrower(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Three quarters of the channels of a KL decoder, in whole norm groups: what Hybrid SD's small one has of SD1.5."""
    groups = int(config["norm_num_groups"])
    return tuple(max(groups, 3 * width // 4 // groups * groups) for width in decoder_widths(config))


def check_narrow(class_name: str, config: Mapping[str, Any]) -> None:
    """Raises SourceError where what stands under `diffship` makes no decoder."""
    if KEY not in config:
        return
    if class_name != KL:
        raise SourceError(f"vae config: {KEY} has widths of a decoder, which {class_name} says by itself")
    levels, groups = len(config["block_out_channels"]), int(config.get("norm_num_groups", 32))
    widths = decoder_widths(config)
    if len(widths) != levels or any(width % groups for width in widths):
        raise SourceError(
            f"vae config: {KEY} has the decoder widths {list(widths)}; legal are {levels} multiples of {groups}"
        )


def _stock(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != KEY}


def _of_decoder(config: Mapping[str, Any]) -> dict[str, Any]:
    """The stock config whose decoder is the one that `config` means."""
    return {**_stock(config), "block_out_channels": list(decoder_widths(config))} if KEY in config else dict(config)


def vae_factor(class_name: str, config: Mapping[str, Any]) -> int:
    """Pixels per latent, along one side."""
    widths = config.get("block_out_channels" if class_name == KL else "encoder_block_out_channels", (0, 0, 0, 0))
    return int(2 ** (len(widths) - 1))


def _owning(component: Component) -> Component:
    side = component.name.removeprefix("vae_")
    convolution = {"encoder": "quant_conv", "decoder": "post_quant_conv"}[side]
    prefixes = [f"{side}."]
    if component.class_name == KL and component.config.get(f"use_{convolution}", True):
        prefixes.append(f"{convolution}.")
    names = [name for name in component.weights.names() if name.startswith(tuple(prefixes))]
    return replace(component, weights=subset(component.weights, names))


def _half(class_name: str, config: Mapping[str, Any], parts: tuple[str, ...]) -> nn.Module:
    whole = (diffusers.AutoencoderKL if class_name == KL else diffusers.AutoencoderTiny).from_config(dict(config))
    half = nn.Module()
    for part in parts:
        module = getattr(whole, part, None)
        if module is not None:
            half.add_module(part, module)
    return half


def _current(name: str) -> str:
    if ".attentions." not in name:
        return name
    head, _, leaf = name.rpartition(".")
    stem, _, kind = head.rpartition(".")
    return f"{stem}.{_OLD[kind]}.{leaf}" if kind in _OLD else name
