"""A text encoder part that is a Qwen3ForCausalLM (Yang et al. 2025, arXiv 2505.09388), read at three of its layers.

First how it is built, then its layers. FLUX.2 reads the states after layers 9, 18 and 27 and never the last ones, so
the layers above are neither made nor run; their weights stay in the folder, which transformers opens whole. A config
that means other layers says so under `diffship` (`{"layers": [1, 2, 3]}`), as the tiny model does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.strict import bounded, bounds, load
from diffship.core.weights import Weights
from diffship.models.parts.component import Component
from diffship.models.parts.program import Builder, Program, Tensors, Tree
from diffship.models.reduced.widths import KEY

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import nn
    from torch.nn import Module
else:
    torch, nn, transformers = lazy("torch"), lazy("torch.nn"), lazy("transformers")
    Module = lazy_base("torch.nn", "Module")

CLASS = "Qwen3ForCausalLM"
OUTPUT = "prompt_embeds"
_TOKENS, _ROTARY = "model.embed_tokens", "model.rotary_emb"
_NOT_OURS = (KEY, "architectures", "_name_or_path", "transformers_version", "model_type", "torch_dtype", "dtype")


@dataclass(frozen=True)
@bounded
class Taps:
    """What the config says under `diffship`. layers: after which three layers the states are read, counted from 1; by
    default those of diffusers' `text_encoder_out_layers`."""

    layers: tuple[int, int, int] = field(default=(9, 18, 27), metadata=bounds(1, 1000))

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Taps:
        """Those of a text encoder's config; raises SourceError if they do not rise."""
        taps = load(cls, config.get(KEY, {}), f"text_encoder config: {KEY}", SourceError)
        if sorted(set(taps.layers)) != list(taps.layers):
            raise SourceError(f"text_encoder config: {KEY}.layers is {list(taps.layers)}; legal are rising numbers")
        return taps


class Qwen3Encoder(Module):
    """(input_ids, attention_mask) -> (prompt_embeds,): the states after the layers of `Taps`, side by side.

    A `whole` one has the layers, too, that are not read, as a folder holds them. It runs its layers itself: the mask is
    that of causal attention without the tokens that `attention_mask` leaves out.
    """

    inner: Any

    def __init__(self, config: Mapping[str, Any], whole: bool = False) -> None:
        super().__init__()
        self.taps = Taps.of(config).layers
        wanted = config["num_hidden_layers"] if whole else self.taps[-1]
        made = transformers.Qwen3Model(qwen3_config({**config, "num_hidden_layers": wanted}))
        if not whole:
            del made.norm  # of the last states, which are not read
        self.inner = nn.Module()
        self.inner.model = made

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> tuple[torch.Tensor]:
        tree = Tree(self.inner)
        (states,), rotary = _embedded(tree, input_ids), _rotary(tree, input_ids)
        mask, taken = _seen(attention_mask), []
        for i in range(self.taps[-1]):
            states = _run(tree[f"model.layers.{i}"], states, mask, rotary)
            if i + 1 in self.taps:
                taken.append(states)
        return (torch.cat(taken, dim=-1),)


def qwen3_encoder(name: str, config: Mapping[str, Any], weights: Weights) -> Component:
    """The encoder called `name`, for prompts that are filled up on the right.

    Raises:
        UnsupportedError: it has too few layers, or attention that does not see all tokens before.
    """
    made, taps = qwen3_config(config), Taps.of(config).layers
    if made.num_hidden_layers <= taps[-1]:
        raise UnsupportedError(
            f"{name}: num_hidden_layers is {made.num_hidden_layers}; layers {', '.join(map(str, taps))} are read, so "
            f"legal is {taps[-1] + 1} or more"
        )
    if set(made.layer_types) != {"full_attention"}:
        raise UnsupportedError(f"{name}: use_sliding_window is on; only attention to all tokens before is run here")
    shape = ("batch_size", "sequence_length")
    inputs = (TensorSpec("input_ids", "int64", shape), TensorSpec("attention_mask", "int64", shape))
    outputs = (TensorSpec(OUTPUT, "float32", (*shape, len(taps) * made.hidden_size)),)
    sizes = {"batch_size": 1, "sequence_length": 512}
    build = partial(Qwen3Encoder, dict(config))
    return Component(
        name, CLASS, dict(config), build, weights, inputs, outputs, sizes, walk=qwen3_layers, text_type="qwen3"
    )


def qwen3_config(config: Mapping[str, Any]) -> transformers.Qwen3Config:
    """The transformers config, attention set to the fused kernel."""
    given = {key: value for key, value in config.items() if key not in _NOT_OURS}
    types = given.get("layer_types")
    if types is not None:
        given["layer_types"] = list(types)[: int(given["num_hidden_layers"])]
    made = transformers.Qwen3Config(**given)
    made.use_cache, made._attn_implementation = False, "sdpa"
    return made


def qwen3_layers(component: Component, inner: Any) -> Program:
    """The layers of the encoder: tokens, the rotary embeddings of all positions, and one per layer up to the last tap,
    which lays the states of all taps side by side."""
    builder = Builder(component.inputs, component.outputs)
    (output,) = component.outputs
    config = inner.model.config
    state = ("batch_size", "sequence_length", int(config.hidden_size))
    hidden = builder.tensor(f"{_TOKENS}.out", *state)
    builder.add(_TOKENS, ("input_ids",), hidden, (_TOKENS,), _embedded)
    rotary = [builder.tensor(f"{_ROTARY}.out{end}", 1, "sequence_length", int(config.head_dim)) for end in ("", ".1")]
    builder.add(_ROTARY, ("input_ids",), rotary, (_ROTARY,), _rotary, embedding=True)
    read = Taps.of(component.config).layers
    taps: list[str] = []
    for i in range(read[-1]):
        path = f"model.layers.{i}"
        last = i + 1 == read[-1]
        written = output.name if last else builder.tensor(f"{path}.out", *state)
        builder.add(
            path, (hidden, "attention_mask", *rotary, *(taps if last else ())), written, (path,), partial(_layer, path)
        )
        hidden = written
        if i + 1 in read:
            taps.append(written)
    return builder.program()


def _embedded(tree: Tree, input_ids: torch.Tensor) -> Tensors:
    return (tree[_TOKENS](input_ids),)


def _rotary(tree: Tree, input_ids: torch.Tensor) -> Tensors:
    """Cosines and sines of all positions, each (1, sequence, head) float32."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    made: Tensors = tree[_ROTARY](tree[_ROTARY].inv_freq, positions)
    return made


def _layer(
    path: str,
    tree: Tree,
    states: torch.Tensor,
    attention_mask: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *taps: torch.Tensor,
) -> Tensors:
    made = _run(tree[path], states, _seen(attention_mask), (cos, sin))
    return (torch.cat([*taps, made], dim=-1) if taps else made,)


def _run(layer: Any, states: torch.Tensor, mask: torch.Tensor, rotary: Iterable[torch.Tensor]) -> torch.Tensor:
    cos, sin = (one.to(states.dtype) for one in rotary)
    made: torch.Tensor = layer(states, attention_mask=mask, position_embeddings=(cos, sin))
    return made


def _seen(attention_mask: torch.Tensor) -> torch.Tensor:
    """Which tokens (last axis) each token sees: itself and those before, without padding; bool (batch, 1, n, n)."""
    places = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    causal = places[None, :] <= places[:, None]
    return torch.logical_and(causal[None, None], (attention_mask != 0)[:, None, None, :])
