"""The layers of the two halves of an AutoencoderKL; a tiny auto-encoder is one layer."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.models.autoencoder import TINY
from diffship.models.component import Component
from diffship.models.program import Builder, Program, Sequence2d, Tensors, Tree

if TYPE_CHECKING:
    import torch


def vae_program(component: Component, inner: Any) -> Program:
    """Layers of `vae_encoder` or `vae_decoder`."""
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
