"""The `vae_encoder` and `vae_decoder` parts of AutoencoderKL, of FLUX.2's and of the tiny auto-encoder (TAESD).

FLUX.2's latents are normalised by the statistics of a batch norm. Both halves hold them and neither runs them, as in
diffusers: the kind of model does (`latent_statistics`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.dtype import to_float32
from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.strict import bounded, bounds, load
from diffship.core.weights import Weights, renamed, subset
from diffship.models.parts.component import Component
from diffship.models.parts.program import Builder, Program, Sequence2d, Tensors, Tree
from diffship.models.reduced.widths import KEY

if TYPE_CHECKING:
    import diffusers
    import numpy as np
    import torch
    from torch import nn
    from torch.nn import Module
else:
    diffusers, np, nn = lazy("diffusers"), lazy("numpy"), lazy("torch.nn")
    Module = lazy_base("torch.nn", "Module")

KL, TINY, FLUX2 = "AutoencoderKL", "AutoencoderTiny", "AutoencoderKLFlux2"
_NORM = "bn"
# names of attention tensors before diffusers 0.18; checkpoints on the hub still have them
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
@bounded
class Narrow:
    """What a KL auto-encoder's config says under `diffship`. decoder: channels of the decoder's levels, counted as
    `block_out_channels` counts the encoder's, if it is narrower than that (the small VAE of Hybrid SD)."""

    decoder: tuple[int, ...] = field(metadata=bounds(1, 65536))


class Encoder(Module):
    """(sample,) -> (latent_parameters,): mean and log variance for KL, the latents themselves for the tiny one."""

    inner: Any

    def __init__(self, class_name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = _half(class_name, _stock(config), ("encoder", "quant_conv", _NORM))

    def forward(self, sample: torch.Tensor) -> tuple[torch.Tensor]:
        encoded = self.inner.encoder(sample)
        return (self.inner.quant_conv(encoded) if hasattr(self.inner, "quant_conv") else encoded,)


class Decoder(Module):
    """(latent_sample,) -> (sample,) in [-1, 1]; the latents are divided by the scaling factor already."""

    inner: Any

    def __init__(self, class_name: str, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = _half(class_name, _of_decoder(config), ("decoder", "post_quant_conv", _NORM))

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        if hasattr(self.inner, "post_quant_conv"):
            latent_sample = self.inner.post_quant_conv(latent_sample)
        return (self.inner.decoder(latent_sample),)


def autoencoder(
    class_name: str, config: Mapping[str, Any], weights: Weights, smallest_px: int = 64
) -> tuple[Component, Component]:
    """(vae_encoder, vae_decoder) over one set of weights.

    Raises:
        UnsupportedError: another class than AutoencoderKL, AutoencoderKLFlux2 or AutoencoderTiny.
        SourceError: what stands under `diffship` in its config is not known here, or does not fit the rest.
    """
    if class_name not in (KL, TINY, FLUX2):
        raise UnsupportedError(f"vae: {class_name} is not supported; legal: {KL}, {FLUX2}, {TINY}")
    check_narrow(class_name, config)
    weights = renamed(weights, {_current(name): name for name in weights.names()})
    factor, latents = vae_factor(class_name, config), int(config.get("latent_channels", 4))
    image = TensorSpec("sample", "float32", ("batch_size", 3, "sample_height", "sample_width"))
    parameters = TensorSpec(
        "latent_parameters",
        "float32",
        (
            "batch_size",
            latents * (1 if class_name == TINY else 2),
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
        walk=autoencoder_layers,
    )  # fmt: skip
    decoder = Component(
        "vae_decoder", class_name, dict(config), partial(Decoder, class_name, dict(config)), weights, (latent,),
        (picture,), {"batch_size": 1, "latent_height": side, "latent_width": side},
        walk=autoencoder_layers,
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
    """Raises SourceError if what stands under `diffship` makes no decoder."""
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


def scaling_factor(class_name: str, config: Mapping[str, Any]) -> float:
    """What latents of the VAE are multiplied by before the denoiser sees them; diffusers' default if it is not said."""
    return float(config.get("scaling_factor") or (0.18215 if class_name == KL else 1.0))


def latent_statistics(config: Mapping[str, Any], weights: Weights) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of FLUX.2's latents, of two by two pixels, by its batch norm.

    Raises:
        SourceError: the weights lack them, or one is not a finite positive number.
    """
    names = [f"{_NORM}.running_{kind}" for kind in ("mean", "var")]
    missing = [name for name in names if name not in weights.names()]
    if missing:
        raise SourceError(f"vae: its weights have no {', '.join(missing)}, the statistics of its latents")
    mean, variance = (to_float32(weights.read(name), weights.meta(name).dtype) for name in names)
    deviation = np.sqrt(variance + np.float32(config.get("batch_norm_eps", 1e-4)))
    if not (np.isfinite(mean).all() and np.isfinite(deviation).all() and deviation.min() > 0):
        raise SourceError(f"vae: {' and '.join(names)} are not statistics of latents: finite, the variance above zero")
    return tuple(map(float, mean)), tuple(map(float, deviation))


def vae_factor(class_name: str, config: Mapping[str, Any]) -> int:
    """Pixels per latent, along one side."""
    widths = config.get("encoder_block_out_channels" if class_name == TINY else "block_out_channels", (0, 0, 0, 0))
    return int(2 ** (len(widths) - 1))


def _owning(component: Component) -> Component:
    side = component.name.removeprefix("vae_")
    convolution = {"encoder": "quant_conv", "decoder": "post_quant_conv"}[side]
    prefixes = [f"{side}."]
    if component.class_name != TINY and component.config.get(f"use_{convolution}", True):
        prefixes.append(f"{convolution}.")
    if component.class_name == FLUX2:
        prefixes.append(f"{_NORM}.")
    names = [name for name in component.weights.names() if name.startswith(tuple(prefixes))]
    return replace(component, weights=subset(component.weights, names))


def _half(class_name: str, config: Mapping[str, Any], parts: tuple[str, ...]) -> nn.Module:
    whole = getattr(diffusers, class_name).from_config(dict(config))
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


def autoencoder_layers(component: Component, inner: Any) -> Program:
    """The layers of `vae_encoder` or `vae_decoder`: those of an AutoencoderKL, and of a tiny auto-encoder one."""
    side = component.name.removeprefix("vae_")
    builder = Builder(component.inputs, component.outputs)
    axes = ("sample_height", "sample_width") if side == "encoder" else ("latent_height", "latent_width")
    flow = Sequence2d(builder, axes, component.inputs[0].name)
    out = component.outputs[0].name
    if component.class_name == TINY:
        flow.module(side, 0, out=out)
    elif side == "encoder":
        _encoder(flow, inner, out)
    else:
        _decoder(flow, inner, out)
    return builder.program()


def _encoder(flow: Sequence2d, inner: Any, out: str) -> None:
    net = inner.encoder
    flow.module("encoder.conv_in", net.conv_in.out_channels)
    for i, block in enumerate(net.down_blocks):
        for j, resnet in enumerate(block.resnets):
            _resnet(flow, f"encoder.down_blocks.{i}.resnets.{j}", resnet)
        for j, sampler in enumerate(block.downsamplers or ()):
            flow.scale -= 1
            flow.module(f"encoder.down_blocks.{i}.downsamplers.{j}", sampler.out_channels)
    _mid(flow, "encoder.mid_block", net.mid_block)
    last = hasattr(inner, "quant_conv")
    _out(flow, "encoder", net.conv_out.out_channels, None if last else out)
    if last:
        flow.module("quant_conv", 0, out=out)


def _decoder(flow: Sequence2d, inner: Any, out: str) -> None:
    net = inner.decoder
    if hasattr(inner, "post_quant_conv"):
        flow.module("post_quant_conv", inner.post_quant_conv.out_channels)
    flow.module("decoder.conv_in", net.conv_in.out_channels)
    _mid(flow, "decoder.mid_block", net.mid_block)
    for i, block in enumerate(net.up_blocks):
        for j, resnet in enumerate(block.resnets):
            _resnet(flow, f"decoder.up_blocks.{i}.resnets.{j}", resnet)
        for j, sampler in enumerate(block.upsamplers or ()):
            flow.scale += 1
            flow.module(f"decoder.up_blocks.{i}.upsamplers.{j}", sampler.out_channels)
    _out(flow, "decoder", 0, out)


def _mid(flow: Sequence2d, path: str, block: Any) -> None:
    _resnet(flow, f"{path}.resnets.0", block.resnets[0])
    for j, (attention, resnet) in enumerate(zip(block.attentions, block.resnets[1:], strict=True)):
        if attention is not None:
            flow.module(f"{path}.attentions.{j}", resnet.in_channels)
        _resnet(flow, f"{path}.resnets.{j + 1}", resnet)


def _resnet(flow: Sequence2d, path: str, resnet: Any) -> None:
    flow.module(path, resnet.out_channels, apply=partial(_no_time, path))


def _no_time(path: str, tree: Tree, hidden: torch.Tensor) -> Tensors:
    return (tree[path](hidden, None),)


def _out(flow: Sequence2d, side: str, channels: int, out: str | None) -> None:
    paths = [f"{side}.{name}" for name in ("conv_norm_out", "conv_act", "conv_out")]
    flow.module(paths[-1], channels, apply=partial(_finish, paths), modules=paths, out=out)


def _finish(paths: list[str], tree: Tree, hidden: torch.Tensor) -> Tensors:
    for path in paths:
        hidden = tree[path](hidden)
    return (hidden,)
