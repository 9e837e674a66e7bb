"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): the `controlnet_NAME` part, and a U-Net that takes what it gives.

A ControlNet is a copy of the first half of a U-Net that also sees a picture (edges, depth, a pose). What it computes is
added to the U-Net's skip connections and to its middle: `additional_residual_0` and so on, the last one being the
middle's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.kind import CONTROL_IMAGE, RESIDUAL
from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.weights import Weights
from diffship.models.parts.component import Component
from diffship.models.parts.program import Program, Tensors, Tree, scaled
from diffship.models.parts.unet import EMB, UNet, UNetWalk, condition_names, unet_specs

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch.nn import Module
else:
    diffusers, torch, Module = lazy("diffusers"), lazy("torch"), lazy_base("torch.nn", "Module")

CLASS = "ControlNetModel"
_EMBEDDING_CHANNELS = (16, 32, 96, 256)  # diffusers' default
_COND = "controlnet_cond_embedding"
_UNSUPPORTED: Mapping[str, Any] = {
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "controlnet_conditioning_channel_order": "rgb",
    "global_pool_conditions": False,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "conditioning_channels": 3,
}


class ControlNet(Module):
    """(sample, timestep, encoder_hidden_states[, text_embeds, time_ids], controlnet_cond) -> residuals."""

    inner: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = diffusers.ControlNetModel.from_config(dict(config))
        self.conditions = condition_names(config)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, *more: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        given = dict(zip(self.conditions, more[:-1], strict=True))
        down, middle = self.inner(
            sample,
            timestep.reshape([-1]),
            text,
            more[-1],
            added_cond_kwargs=given or None,
            return_dict=False,
        )
        return (*down, middle)


class ControlledUNet(Module):
    """A U-Net that takes residuals after its other inputs."""

    inner: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        plain = UNet(config)
        self.inner, self.conditions = plain.inner, plain.conditions

    def forward(self, *feeds: torch.Tensor) -> tuple[torch.Tensor]:
        plain = 3 + len(self.conditions)
        given = dict(zip(self.conditions, feeds[3:plain], strict=True))
        sample, timestep, text = feeds[:3]
        cond = given.pop("timestep_cond", None)
        (out,) = self.inner(
            sample,
            timestep.reshape([-1]),
            text,
            timestep_cond=cond,
            added_cond_kwargs=given or None,
            down_block_additional_residuals=feeds[plain:-1],
            mid_block_additional_residual=feeds[-1],
            return_dict=False,
        )
        return (out,)


def controlled_unet(unet: Component, name: str) -> Component:
    """The same U-Net as another part, called `name`, that takes residuals; it shares its weights with `unet`.

    Raises:
        UnsupportedError: the U-Net has no middle block that a residual could be added to.
    """
    inner = unet.meta.get_submodule("inner")
    if inner.mid_block is None:
        raise UnsupportedError(f"{unet.name}: it has no middle block, and a ControlNet controls one")
    inputs = (*unet.inputs, *residual_specs(inner))
    build = partial(ControlledUNet, dict(unet.config))
    return replace(
        unet, name=name, build=build, inputs=inputs, walk=_controlled_layers, template=None, shares=unet.name
    )


def controlnet(name: str, config: Mapping[str, Any], weights: Weights, unet: Component, factor: int) -> Component:
    """The ControlNet of `config` as the part `name`, for a U-Net whose latents are `factor` pixels wide.

    Raises:
        UnsupportedError: it does what is not built, such as pooling its residuals (`global_pool_conditions`).
        SourceError: its residuals are not those that the U-Net takes.
    """
    for key, legal in _UNSUPPORTED.items():
        if config.get(key, legal) not in (legal, None):
            raise UnsupportedError(f"{name}: {key} = {config[key]!r} is not supported; legal is {legal}")
    build = partial(ControlNet, dict(config))
    inputs, _ = unet_specs(config)
    halvings = len(config.get("conditioning_embedding_out_channels") or _EMBEDDING_CHANNELS) - 1
    if 2**halvings != factor:
        raise SourceError(
            f"{name}: it makes one of {2**halvings} pixels, the model's VAE one of {factor}: another family"
        )
    plane = scaled("height", halvings), scaled("width", halvings)
    picture = TensorSpec(CONTROL_IMAGE, "float32", ("batch_size", 3, *plane))
    part = Component(name, CLASS, dict(config), build, weights, (*inputs, picture), (), unet.smallest)
    given, taken = (residual_specs(one.meta.get_submodule("inner")) for one in (part, unet))
    known = {spec.name: spec.shape for spec in unet.inputs}
    wrong = next((spec for spec in inputs if known.get(spec.name) != spec.shape), None)
    if given != taken or wrong is not None:
        found = f"takes {wrong.name} of {wrong.text()}" if wrong else f"gives {_text(given)}"
        wanted = TensorSpec(wrong.name, "float32", known.get(wrong.name, ())).text() if wrong else _text(taken)
        raise SourceError(f"{name}: it {found}, the model's U-Net {wanted}: it was trained for another family")
    return replace(part, outputs=given, walk=_control_layers)


def residual_specs(inner: Any) -> tuple[TensorSpec, ...]:
    """The residuals of a U-Net or ControlNet (on any device): one for each skip connection, then the middle's."""
    planes = [(inner.conv_in.out_channels, 0)]
    for level, block in enumerate(inner.down_blocks):
        planes += [(resnet.out_channels, -level) for resnet in block.resnets]
        planes += [(sampler.out_channels, -level - 1) for sampler in block.downsamplers or ()]
    planes.append(planes[-1])
    return tuple(
        TensorSpec(
            f"{RESIDUAL}{i}", "float32", ("batch_size", channels, scaled("height", scale), scaled("width", scale))
        )
        for i, (channels, scale) in enumerate(planes)
    )


def _text(specs: tuple[TensorSpec, ...]) -> str:
    return f"{len(specs)} residuals of {', '.join(str(spec.shape[1]) for spec in specs)} channels"


def _controlled_layers(component: Component, inner: Any) -> Program:
    return _ControlledWalk(component, inner).program()


class _ControlledWalk(UNetWalk):
    """Residuals are read where skips are, by the residual blocks on the way up; the middle's by the first of them."""

    def __init__(self, component: Component, inner: Any) -> None:
        super().__init__(component, inner)
        self.middle: tuple[str, ...] = (f"{RESIDUAL}{len(residual_specs(inner)) - 1}",)

    def resnet(self, path: str, resnet: Any, skip: str | None = None) -> None:
        if skip is None:
            super().resnet(path, resnet)
            return
        self.channels = resnet.out_channels
        more = (skip, f"{RESIDUAL}{len(self.skips)}", *self.middle, EMB)  # the skip is popped already
        self.flow.module(path, self.channels, more, partial(_added, path))
        self.middle = ()


def _added(
    path: str, tree: Tree, hidden: torch.Tensor, skip: torch.Tensor, residual: torch.Tensor, *more: torch.Tensor
) -> Tensors:
    *middle, emb = more
    hidden = hidden + middle[0] if middle else hidden
    return (tree[path](torch.cat([hidden, skip + residual], dim=1), emb),)


def _control_layers(component: Component, inner: Any) -> Program:
    return _ControlWalk(component, inner).program()


class _ControlWalk(UNetWalk):
    """The way down and the middle of a U-Net, then one convolution for each residual."""

    def program(self) -> Program:
        inner = self.inner
        self.embedding()
        channels = inner.conv_in.out_channels
        picture = self.builder.tensor(f"{_COND}.out", *self.flow.plane(channels))
        self.builder.add(_COND, (CONTROL_IMAGE,), picture, (_COND,), _seen)
        self.channels = channels
        self.flow.module("conv_in", channels, (picture,), _entered)
        self.push()
        for i, block in enumerate(inner.down_blocks):
            self.down(f"down_blocks.{i}", block)
        self.mid("mid_block", inner.mid_block)
        for i, skip in enumerate(self.skips):
            self._residual(f"controlnet_down_blocks.{i}", skip, i)
        self._residual("controlnet_mid_block", self.flow.hidden, len(self.skips))
        return self.builder.program()

    def _residual(self, path: str, hidden: str, place: int) -> None:
        self.builder.add(path, (hidden,), f"{RESIDUAL}{place}", (path,), partial(_out, path))


def _seen(tree: Tree, picture: torch.Tensor) -> Tensors:
    return (tree[_COND](picture),)


def _entered(tree: Tree, sample: torch.Tensor, picture: torch.Tensor) -> Tensors:
    return (tree["conv_in"](sample) + picture,)


def _out(path: str, tree: Tree, hidden: torch.Tensor) -> Tensors:
    return (tree[path](hidden),)
