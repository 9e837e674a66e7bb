"""The `unet` part: UNet2DConditionModel of SD, SDXL, LCM and inpainting, whole or reduced, with canonical tensors.

First how it is built, then its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.weights import Weights
from diffship.models.parts.component import Component
from diffship.models.parts.program import Builder, Program, Sequence2d, Tensors, Tree
from diffship.models.reduced.widths import KEY, narrow_module, widths_of

if TYPE_CHECKING:
    import diffusers
    import torch
    from diffusers.models import attention_processor
    from diffusers.models.transformers import transformer_2d
    from torch.nn import Module
else:
    diffusers, torch, Module = lazy("diffusers"), lazy("torch"), lazy_base("torch.nn", "Module")
    attention_processor = lazy("diffusers.models.attention_processor")
    transformer_2d = lazy("diffusers.models.transformers.transformer_2d")

CLASS = "UNet2DConditionModel"
_DOWN = ("DownBlock2D", "CrossAttnDownBlock2D")
_UP = ("UpBlock2D", "CrossAttnUpBlock2D")
_MID = (None, "UNetMidBlock2DCrossAttn", "UNetMidBlock2D")
_UNSUPPORTED = {
    "class_embed_type": None,
    "encoder_hid_dim_type": None,
    "time_embedding_act_fn": None,
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "center_input_sample": False,
    "dual_cross_attention": False,
    "class_embeddings_concat": False,
    "attention_type": "default",
}
_EMBEDDING = "time_embedding"
EMB = f"{_EMBEDDING}.out"
_TEXT = "encoder_hidden_states"


class UNet(Module):
    """(sample, timestep, encoder_hidden_states[, text_embeds, time_ids][, timestep_cond]) -> (out_sample,)."""

    inner: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = diffusers.UNet2DConditionModel.from_config(_constructor_config(config))
        narrow_module(self.inner, widths_of(config))
        self.conditions = condition_names(config)

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        condition_1: torch.Tensor | None = None,
        condition_2: torch.Tensor | None = None,
        condition_3: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor]:
        given = dict(zip(self.conditions, (condition_1, condition_2, condition_3), strict=False))
        cond = given.pop("timestep_cond", None)
        (out,) = self.inner(
            sample,
            timestep.reshape([-1]),
            encoder_hidden_states,
            timestep_cond=cond,
            added_cond_kwargs=given or None,
            return_dict=False,
        )
        return (out,)


def unet(config: Mapping[str, Any], weights: Weights, latent_size: int = 0) -> Component:
    """The U-Net of `config`; `latent_size` is the smallest latent side, 2**(levels - 1) if it is 0.

    Raises:
        UnsupportedError: the config asks for conditioning or blocks outside the SD families.
        SourceError: the config is not that of a UNet2DConditionModel.
    """
    check_config(config)
    step = 2 ** (len(config["block_out_channels"]) - 1)
    side = latent_size or step
    sizes = {"batch_size": 1, "height": side, "width": side, "sequence_length": 77}
    inputs, outputs = unet_specs(config)
    build = partial(UNet, dict(config))
    return Component("unet", CLASS, dict(config), build, weights, inputs, outputs, sizes, walk=unet_layers)


def condition_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the conditions after the first three inputs, in canonical order."""
    names: tuple[str, ...] = ()
    if config.get("addition_embed_type") == "text_time":
        names += ("text_embeds", "time_ids")
    return (*names, "timestep_cond") if config.get("time_cond_proj_dim") else names


def text_width(config: Mapping[str, Any]) -> int:
    """Width of the text embeddings; some configs list it for each block."""
    width = config.get("cross_attention_dim", 1280)
    return int(width if isinstance(width, int) else width[0])


def text_time_widths(config: Mapping[str, Any]) -> tuple[int, int]:
    """(width of text_embeds, number of time ids) of an SDXL U-Net: 1280 and 6, or 5 for the refiner.

    The config states only their sum, pooled + ids * addition_time_embed_dim: 6 ids are assumed unless the refiner's
    cross-attention width equals what 5 ids leave.
    """
    total = int(config["projection_class_embeddings_input_dim"])
    each = int(config["addition_time_embed_dim"])
    width = config.get("cross_attention_dim")
    ids = 5 if total - 5 * each == width else 6
    if total - ids * each < 1:
        raise SourceError(f"unet: projection_class_embeddings_input_dim {total} leaves nothing for the pooled text")
    return total - ids * each, ids


def check_config(config: Mapping[str, Any]) -> None:
    """Raises UnsupportedError if the U-Net is of no family that is known here."""
    for key, legal in _UNSUPPORTED.items():
        if config.get(key, legal) not in (legal, None):
            raise UnsupportedError(f"unet: {key} = {config[key]!r} is not supported; legal is {legal}")
    if config.get("addition_embed_type") not in (None, "text_time"):
        raise UnsupportedError(
            f"unet: addition_embed_type = {config['addition_embed_type']!r}; legal: text_time or none"
        )
    blocks = [*config.get("down_block_types", _DOWN[:1]), *config.get("up_block_types", _UP[:1])]
    odd = [block for block in blocks if block not in _DOWN + _UP]
    if odd or config.get("mid_block_type", _MID[1]) not in _MID:
        raise UnsupportedError(f"unet: block type {odd[0] if odd else config['mid_block_type']!r} is not supported")
    if not isinstance(config.get("block_out_channels"), (list, tuple)):
        raise SourceError("unet: its config has no block_out_channels; is it a UNet2DConditionModel?")
    widths_of(config)


def _constructor_config(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != KEY}


def unet_specs(config: Mapping[str, Any]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """(inputs, outputs) of a U-Net of this config."""
    width = text_width(config)
    inputs = [
        TensorSpec("sample", "float32", ("batch_size", int(config.get("in_channels", 4)), "height", "width")),
        TensorSpec("timestep", "float32", ("batch_size",), exact=True),
        TensorSpec("encoder_hidden_states", "float32", ("batch_size", "sequence_length", width)),
    ]
    conditions = condition_names(config)
    if "time_ids" in conditions:
        pooled, ids = text_time_widths(config)
        inputs.append(TensorSpec("text_embeds", "float32", ("batch_size", pooled)))
        inputs.append(TensorSpec("time_ids", "float32", ("batch_size", ids), exact=True, whole=True))
    if "timestep_cond" in conditions:
        inputs.append(TensorSpec("timestep_cond", "float32", ("batch_size", int(config["time_cond_proj_dim"]))))
    out = TensorSpec("out_sample", "float32", ("batch_size", int(config.get("out_channels", 4)), "height", "width"))
    return tuple(inputs), (out,)


def unet_layers(component: Component, inner: Any) -> Program:
    """The layers of a UNet2DConditionModel, in the order in which its forward runs them; `inner` is it, on any device.

    Transformers are cut at every block: SDXL's have ten, 1.4 GB of float32 weights in one `attentions` module.
    """
    return UNetWalk(component, inner).program()


class UNetWalk:
    """Collects the layers of a U-Net; subclasses say what parts that are made like one read and write beside it."""

    def __init__(self, component: Component, inner: Any) -> None:
        self.inner = inner
        self.conditions = condition_names(component.config)
        self.builder = Builder(component.inputs, component.outputs)
        self.flow = Sequence2d(self.builder, ("height", "width"), "sample")
        self.skips: list[str] = []
        self.channels = 0

    def program(self) -> Program:
        inner = self.inner
        self.embedding()
        self.conv("conv_in", inner.conv_in.out_channels)
        self.push()
        for i, block in enumerate(inner.down_blocks):
            self.down(f"down_blocks.{i}", block)
        if inner.mid_block is not None:
            self.mid("mid_block", inner.mid_block)
        for i, block in enumerate(inner.up_blocks):
            self.up(f"up_blocks.{i}", block)
        modules = [name for name in ("conv_norm_out", "conv_act", "conv_out") if getattr(inner, name) is not None]
        self.flow.module("conv_out", 0, apply=partial(_finish, modules), modules=modules, out="out_sample")
        return self.builder.program()

    def embedding(self) -> None:
        inner = self.inner
        width = inner.time_embedding.linear_2.out_features
        timed = "time_ids" in self.conditions
        modules = ["time_proj", _EMBEDDING, *(("add_time_proj", "add_embedding") if timed else ())]
        reads = ("timestep", _TEXT, *self.conditions)
        out = self.builder.tensor(EMB, "batch_size", width)
        self.builder.add(_EMBEDDING, reads, out, modules, partial(_embed, self.conditions), True)

    def down(self, path: str, block: Any) -> None:
        for j, resnet in enumerate(block.resnets):
            self.resnet(f"{path}.resnets.{j}", resnet)
            self.attention(f"{path}.attentions.{j}", _item(block, "attentions", j))
            self.push()
        for j, sampler in enumerate(block.downsamplers or ()):
            self.flow.scale -= 1
            self.conv(f"{path}.downsamplers.{j}", sampler.out_channels)
            self.push()

    def mid(self, path: str, block: Any) -> None:
        self.resnet(f"{path}.resnets.0", block.resnets[0])
        for j, resnet in enumerate(block.resnets[1:]):
            self.attention(f"{path}.attentions.{j}", _item(block, "attentions", j))
            self.resnet(f"{path}.resnets.{j + 1}", resnet)

    def up(self, path: str, block: Any) -> None:
        for j, resnet in enumerate(block.resnets):
            self.resnet(f"{path}.resnets.{j}", resnet, self.skips.pop())
            self.attention(f"{path}.attentions.{j}", _item(block, "attentions", j))
        for j, sampler in enumerate(block.upsamplers or ()):
            self.flow.scale += 1
            self.conv(f"{path}.upsamplers.{j}", sampler.out_channels)

    def conv(self, path: str, channels: int) -> None:
        self.channels = channels
        self.flow.module(path, channels)

    def push(self) -> None:
        self.skips.append(self.flow.hidden)

    def resnet(self, path: str, resnet: Any, skip: str | None = None) -> None:
        self.channels = resnet.out_channels
        more, call = ((skip, EMB), joined) if skip else ((EMB,), _plain)
        self.flow.module(path, self.channels, more, partial(call, path))

    def attention(self, path: str, module: Any) -> None:
        if module is None:
            return
        if isinstance(module, attention_processor.Attention):
            self.flow.module(path, self.channels)
            return
        if not isinstance(module, transformer_2d.Transformer2DModel):
            raise UnsupportedError(f"unet: {path} is a {type(module).__name__}; it cannot be cut")
        residual, width = self.flow.hidden, module.inner_dim
        tokens = ("batch_size", self.flow.pixels(), width)
        linear = bool(module.use_linear_projection)
        add, tensor = self.builder.add, self.builder.tensor
        entry = tensor(f"{path}.proj_in.out", *tokens)
        ins = (f"{path}.norm", f"{path}.proj_in")
        add(f"{path}.proj_in", (residual,), entry, ins, partial(_enter, path, linear))
        for k in range(len(module.transformer_blocks)):
            block = f"{path}.transformer_blocks.{k}"
            out = tensor(f"{block}.out", *tokens)
            add(block, (entry, _TEXT), out, (block,), partial(_transform, block))
            entry = out
        out = tensor(f"{path}.out", *self.flow.plane(self.channels))
        add(f"{path}.proj_out", (entry, residual), out, (f"{path}.proj_out",), partial(_leave, path, linear))
        self.flow.hidden = out


def _item(block: Any, name: str, index: int) -> Any:
    items = getattr(block, name, None)
    return items[index] if items is not None and index < len(items) else None


def _embed(conditions: tuple[str, ...], tree: Tree, *tensors: torch.Tensor) -> Tensors:
    timestep, text, *rest = tensors
    given = dict(zip(conditions, rest, strict=True))
    batch, module = text.shape[0], tree[_EMBEDDING]
    # sinusoids in float32, then the type of the network, as UNet2DConditionModel.get_time_embed does
    wave = tree["time_proj"](timestep.reshape([-1]).expand(batch)).to(module.linear_1.weight.dtype)
    emb = module(wave, given.get("timestep_cond"))
    if "time_ids" in given:
        ids = tree["add_time_proj"](given["time_ids"].flatten()).reshape(batch, -1)
        emb = emb + tree["add_embedding"](torch.cat([given["text_embeds"], ids], dim=-1).to(emb.dtype))
    return (emb,)


def _plain(path: str, tree: Tree, hidden: torch.Tensor, emb: torch.Tensor) -> Tensors:
    return (tree[path](hidden, emb),)


def joined(path: str, tree: Tree, hidden: torch.Tensor, skip: torch.Tensor, emb: torch.Tensor) -> Tensors:
    return (tree[path](torch.cat([hidden, skip], dim=1), emb),)


def _enter(path: str, linear: bool, tree: Tree, hidden: torch.Tensor) -> Tensors:
    batch, _, height, width = hidden.shape
    project, states = tree[f"{path}.proj_in"], tree[f"{path}.norm"](hidden)
    if not linear:
        states = project(states)
    states = states.permute(0, 2, 3, 1).reshape(batch, height * width, states.shape[1])
    return (project(states) if linear else states,)


def _transform(path: str, tree: Tree, states: torch.Tensor, text: torch.Tensor) -> Tensors:
    return (tree[path](states, encoder_hidden_states=text),)


def _leave(path: str, linear: bool, tree: Tree, states: torch.Tensor, residual: torch.Tensor) -> Tensors:
    batch, _, height, width = residual.shape
    project = tree[f"{path}.proj_out"]
    if linear:
        states = project(states)
    states = states.reshape(batch, height, width, states.shape[-1]).permute(0, 3, 1, 2).contiguous()
    return ((states if linear else project(states)) + residual,)


def _finish(modules: list[str], tree: Tree, hidden: torch.Tensor) -> Tensors:
    for path in modules:
        hidden = tree[path](hidden)
    return (hidden,)
