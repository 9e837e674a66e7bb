"""How Apple's Swift package spells the inputs and outputs of each part: name, type and axes.

From `Unet.swift`, `TextEncoder.swift`, `TextEncoderXL.swift`, `Encoder.swift` and `Decoder.swift` of
apple/ml-stable-diffusion: it feeds inputs by these names, asks a text encoder for its outputs by name, and takes the
only output of every other part.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy, lazy_base
from diffship.core.manifest import Binding
from diffship.core.spec import Axis, TensorSpec
from diffship.models.parts.component import Component

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn import Module
else:
    torch, nn = lazy("torch"), lazy("torch.nn")
    Module = lazy_base("torch.nn", "Module")

_STATES = "hidden_states."
_TEXT = "encoder_hidden_states"
_MOMENTS = "latent_parameters"  # what an encoder gives
_OUT = {"out_sample": "noise_pred", _MOMENTS: "latent", "sample": "image"}
CLASSES = ("UNet2DConditionModel", "AutoencoderKL", "AutoencoderTiny", "CLIPTextModel", "CLIPTextModelWithProjection")


def is_text(component: Component) -> bool:
    """Whether a part reads token ids."""
    return component.inputs[0].name == "input_ids"


def native_inputs(component: Component, floats: str) -> tuple[Binding, ...]:
    """The inputs of the package; `floats` is the type of float tensors. Token ids are float32, as Swift feeds them."""
    encodes = component.outputs[0].name == _MOMENTS
    names = {"sample": "x"} if encodes else {"latent_sample": "z"}
    return tuple(_input(spec, names.get(spec.name, spec.name), floats) for spec in component.inputs)


def native_outputs(component: Component) -> tuple[Binding, ...]:
    """The outputs of the package, float32 all of them."""
    names = _text_names(component.outputs) if is_text(component) else _OUT
    return tuple(Binding(spec.name, names[spec.name], "float32", spec.shape) for spec in component.outputs)


def with_given_outputs(component: Component) -> Component:
    """The part with those outputs alone that a package gives: of hidden states, the last two."""
    states = [spec.name for spec in component.outputs if spec.name.startswith(_STATES)]
    kept = [i for i, spec in enumerate(component.outputs) if spec.name not in states[:-2]]
    if len(kept) == len(component.outputs):
        return component
    outputs = tuple(component.outputs[i] for i in kept)
    return replace(component, outputs=outputs, build=lambda: Chosen(component.build(), kept))


class Chosen(Module):
    """A part with some of its outputs, `kept` by position; its weights keep their names."""

    def __init__(self, part: nn.Module, kept: Sequence[int]) -> None:
        super().__init__()
        self.inner = part.get_submodule("inner")
        self._part, self._kept = (part,), tuple(kept)  # in a tuple: not a second submodule

    def forward(self, *feeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outputs = self._part[0](*feeds)
        return tuple(outputs[i] for i in self._kept)


class NativePart(Module):
    """A part that takes and gives tensors as its bindings say. `plain` inputs reach the part as they come."""

    def __init__(self, part: nn.Module, component: Component, inputs: Sequence[Binding], plain: Sequence[str]) -> None:
        super().__init__()
        self.part = part
        self._specs = [(spec, binding.shape) for spec, binding in zip(component.inputs, inputs, strict=True)]
        self._plain = frozenset(plain)

    def forward(self, *feeds: torch.Tensor) -> Any:
        pairs = zip(feeds, self._specs, strict=True)
        return self.part(*(self._canonical(feed, spec, shape) for feed, (spec, shape) in pairs))

    def _canonical(self, feed: torch.Tensor, spec: TensorSpec, shape: tuple[Axis, ...]) -> torch.Tensor:
        if not spec.is_float:
            return feed.to(torch.int32)
        if spec.name in self._plain or shape == spec.shape:
            return feed
        return feed.squeeze(2).transpose(1, 2)  # (batch, width, 1, tokens) -> (batch, tokens, width)


def _input(spec: TensorSpec, native: str, floats: str) -> Binding:
    if not spec.is_float:
        return Binding(spec.name, native, "float32", spec.shape)
    shape = spec.shape
    if spec.name == _TEXT:
        batch, tokens, width = shape
        shape = (batch, width, 1, tokens)
    return Binding(spec.name, native, floats, shape)


def _text_names(outputs: Sequence[TensorSpec]) -> Mapping[str, str]:
    """Swift reads `last_hidden_state` of SD's encoder, `hidden_embeds` (the states before the last layer) and
    `pooled_outputs` of SDXL's."""
    names = {spec.name: spec.name.replace(".", "_") for spec in outputs}
    states = [spec.name for spec in outputs if spec.name.startswith(_STATES)]
    names |= {name: "pooled_outputs" for name in ("pooler_output", "text_embeds") if name in names}
    return names | ({states[-2]: "hidden_embeds"} if len(states) > 1 else {})
