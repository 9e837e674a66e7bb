"""The layers of a U-Net, in the order in which UNet2DConditionModel.forward runs them.

Transformers are cut at every block: SDXL's have ten, 1.4 GB of float32 weights in one `attentions` module.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.models.component import Component
from diffship.models.program import Builder, Program, Sequence2d, Tensors, Tree
from diffship.models.unet import condition_names

if TYPE_CHECKING:
    import torch
    from diffusers.models import attention_processor
    from diffusers.models.transformers import transformer_2d
else:
    torch = lazy("torch")
    attention_processor = lazy("diffusers.models.attention_processor")
    transformer_2d = lazy("diffusers.models.transformers.transformer_2d")

EMBEDDING = "time_embedding"
_EMB = f"{EMBEDDING}.out"
_TEXT = "encoder_hidden_states"


def unet_program(component: Component, inner: Any) -> Program:
    """Layers of a UNet2DConditionModel; `inner` is it, on any device."""
    return _Walk(component, inner).program()


class _Walk:
    def __init__(self, component: Component, inner: Any) -> None:
        self.inner = inner
        self.conditions = condition_names(component.config)
        self.builder = Builder(component.inputs, component.outputs)
        self.flow = Sequence2d(self.builder, ("height", "width"), "sample")
        self.skips: list[str] = []
        self.channels = 0

    def program(self) -> Program:
        inner = self.inner
        self._embedding()
        self._conv("conv_in", inner.conv_in.out_channels)
        self._push()
        for i, block in enumerate(inner.down_blocks):
            self._down(f"down_blocks.{i}", block)
        if inner.mid_block is not None:
            self._mid("mid_block", inner.mid_block)
        for i, block in enumerate(inner.up_blocks):
            self._up(f"up_blocks.{i}", block)
        modules = [name for name in ("conv_norm_out", "conv_act", "conv_out") if getattr(inner, name) is not None]
        self.flow.module("conv_out", 0, apply=partial(_finish, modules), modules=modules, out="out_sample")
        return self.builder.program()

    def _embedding(self) -> None:
        inner = self.inner
        width = inner.time_embedding.linear_2.out_features
        timed = "time_ids" in self.conditions
        modules = ["time_proj", EMBEDDING, *(("add_time_proj", "add_embedding") if timed else ())]
        reads = ("timestep", _TEXT, *self.conditions)
        out = self.builder.tensor(_EMB, "batch_size", width)
        self.builder.add(EMBEDDING, reads, out, modules, partial(_embed, self.conditions))

    def _down(self, path: str, block: Any) -> None:
        for j, resnet in enumerate(block.resnets):
            self._resnet(f"{path}.resnets.{j}", resnet)
            self._attention(f"{path}.attentions.{j}", _item(block, "attentions", j))
            self._push()
        for j, sampler in enumerate(block.downsamplers or ()):
            self.flow.scale -= 1
            self._conv(f"{path}.downsamplers.{j}", sampler.out_channels)
            self._push()

    def _mid(self, path: str, block: Any) -> None:
        self._resnet(f"{path}.resnets.0", block.resnets[0])
        for j, resnet in enumerate(block.resnets[1:]):
            self._attention(f"{path}.attentions.{j}", _item(block, "attentions", j))
            self._resnet(f"{path}.resnets.{j + 1}", resnet)

    def _up(self, path: str, block: Any) -> None:
        for j, resnet in enumerate(block.resnets):
            self._resnet(f"{path}.resnets.{j}", resnet, self.skips.pop())
            self._attention(f"{path}.attentions.{j}", _item(block, "attentions", j))
        for j, sampler in enumerate(block.upsamplers or ()):
            self.flow.scale += 1
            self._conv(f"{path}.upsamplers.{j}", sampler.out_channels)

    def _conv(self, path: str, channels: int) -> None:
        self.channels = channels
        self.flow.module(path, channels)

    def _push(self) -> None:
        self.skips.append(self.flow.hidden)

    def _resnet(self, path: str, resnet: Any, skip: str | None = None) -> None:
        self.channels = resnet.out_channels
        more, call = ((skip, _EMB), _joined) if skip else ((_EMB,), _plain)
        self.flow.module(path, self.channels, more, partial(call, path))

    def _attention(self, path: str, module: Any) -> None:
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
    batch, module = text.shape[0], tree[EMBEDDING]
    # sinusoids in float32, then the type of the network, as UNet2DConditionModel.get_time_embed does
    wave = tree["time_proj"](timestep.reshape([-1]).expand(batch)).to(module.linear_1.weight.dtype)
    emb = module(wave, given.get("timestep_cond"))
    if "time_ids" in given:
        ids = tree["add_time_proj"](given["time_ids"].flatten()).reshape(batch, -1)
        emb = emb + tree["add_embedding"](torch.cat([given["text_embeds"], ids], dim=-1).to(emb.dtype))
    return (emb,)


def _plain(path: str, tree: Tree, hidden: torch.Tensor, emb: torch.Tensor) -> Tensors:
    return (tree[path](hidden, emb),)


def _joined(path: str, tree: Tree, hidden: torch.Tensor, skip: torch.Tensor, emb: torch.Tensor) -> Tensors:
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
