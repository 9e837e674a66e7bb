"""A text encoder part that is a T5EncoderModel (`text_encoder_3` of SD3, `text_encoder_2` of FLUX).

First how it is built, then its layers. No padding is masked, as diffusers runs it in both pipelines.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.weights import Weights, renamed
from diffship.models.parts.component import Component
from diffship.models.parts.program import Builder, Program, Tensors, Tree

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import nn
    from torch.nn import Module
    from transformers.models.t5 import modeling_t5
else:
    nn, transformers = lazy("torch.nn"), lazy("transformers")
    modeling_t5 = lazy("transformers.models.t5.modeling_t5")
    Module = lazy_base("torch.nn", "Module")

CLASS = "T5EncoderModel"
_TOKENS, _TIED = "shared", "encoder.embed_tokens"  # one table under two names; files have the first, or both
_FINAL = "encoder.final_layer_norm"
_NOT_OURS = ("architectures", "_name_or_path", "transformers_version", "model_type", "torch_dtype", "dtype")


class T5Encoder(Module):
    """(input_ids,) -> (last_hidden_state,).

    Runs the layers itself: the table of tokens has one name, and the first block's bias of relative positions is
    handed to the others as a tensor.
    """

    inner: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        stack = modeling_t5.T5Stack(t5_config(config))
        self.inner = nn.Module()
        self.inner.shared = stack.embed_tokens
        del stack.embed_tokens
        self.inner.encoder = stack

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        states, bias = self.inner.shared(input_ids), None
        for block in self.inner.encoder.block:
            states, bias, _ = block(states, position_bias=bias)
        return (self.inner.encoder.final_layer_norm(states),)


def t5_encoder(name: str, config: Mapping[str, Any], weights: Weights) -> Component:
    """The T5 encoder called `name`; a decoder in its weights is passed over, as transformers does."""
    width = t5_config(config).d_model
    inputs = (TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),)
    outputs = (TensorSpec("last_hidden_state", "float32", ("batch_size", "sequence_length", width)),)
    sizes = {"batch_size": 1, "sequence_length": 77}
    weights = renamed(weights, _names(weights.names()))
    build = partial(T5Encoder, dict(config))
    return Component(name, CLASS, dict(config), build, weights, inputs, outputs, sizes, walk=t5_layers, text_type="t5")


def t5_config(config: Mapping[str, Any]) -> transformers.T5Config:
    """The transformers config of an encoder alone, attention set to the fused kernel."""
    made = transformers.T5Config(**{key: value for key, value in config.items() if key not in _NOT_OURS})
    made.is_encoder_decoder, made.is_decoder, made.use_cache = False, False, False
    made._attn_implementation = "sdpa"
    return made


def _names(stored: Iterable[str]) -> dict[str, str]:
    """{name here: name as stored}: the table of tokens once, and nothing of a decoder."""
    found = {name: name for name in stored if name.startswith((f"{_TOKENS}.", "encoder."))}
    tied = found.pop(f"{_TIED}.weight", None)
    return found if tied is None else {f"{_TOKENS}.weight": tied, **found}


def t5_layers(component: Component, inner: Any) -> Program:
    """The layers of a T5 encoder: tokens, one per block, and the final norm.

    The first block also gives the bias of relative positions (`<path>.out.1`), which all others read.
    """
    builder = Builder(component.inputs, component.outputs)
    (output,) = component.outputs
    hidden = builder.tensor(f"{_TOKENS}.out", *output.shape)
    builder.add(_TOKENS, ("input_ids",), hidden, (_TOKENS,), _tokens)
    heads, bias = int(inner.encoder.config.num_heads), ""
    for i in range(len(inner.encoder.block)):
        path = f"encoder.block.{i}"
        written = [builder.tensor(f"{path}.out", *output.shape)]
        reads = (hidden, bias) if bias else (hidden,)
        if not bias:
            bias = builder.tensor(f"{path}.out.1", 1, heads, "sequence_length", "sequence_length")
            written.append(bias)
        builder.add(path, reads, written, (path,), partial(_block, path))
        hidden = written[0]
    builder.add(_FINAL, (hidden,), output.name, (_FINAL,), _final)
    return builder.program()


def _tokens(tree: Tree, input_ids: torch.Tensor) -> Tensors:
    return (tree[_TOKENS](input_ids),)


def _block(path: str, tree: Tree, states: torch.Tensor, bias: torch.Tensor | None = None) -> Tensors:
    states, made, _ = tree[path](states, position_bias=bias)
    return (states, made) if bias is None else (states,)


def _final(tree: Tree, states: torch.Tensor) -> Tensors:
    return (tree[_FINAL](states),)
