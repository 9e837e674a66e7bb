"""The `text_encoder` parts: CLIPTextModel and CLIPTextModelWithProjection, with canonical tensors and classic names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.limits import check_range
from diffship.core.spec import TensorSpec
from diffship.core.weights import Weights, renamed
from diffship.models.parts.clip_names import LEGACY_END, classic_map, end_id
from diffship.models.parts.component import Component
from diffship.models.parts.program import Builder, Program, Tensors, Tree

if TYPE_CHECKING:
    import torch
    import transformers
    from torch import nn
    from torch.nn import Module
else:
    torch, nn, transformers = lazy("torch"), lazy("torch.nn"), lazy("transformers")
    Module = lazy_base("torch.nn", "Module")

PLAIN, PROJECTED = "CLIPTextModel", "CLIPTextModelWithProjection"
LAST, CLIP_TYPE = "last_hidden_state", "clip_text_model"
_EMBEDDINGS, _FINAL = "text_model.embeddings", "text_model.final_layer_norm"


class TextEncoder(Module):
    """(input_ids,) -> ([text_embeds,] last_hidden_state[, pooler_output][, hidden_states.0 .. hidden_states.N]
    [, last_hidden_state.1 .. last_hidden_state.K]).

    `last_hidden_state.k` is the last hidden state without the last k of N layers (`skips` is K): the final norm of
    hidden state N - k, which diffusers takes with clip_skip k.

    Runs the layers itself: positions are computed (no index buffer to load), the causal mask stays a flag of the
    attention (a graph needs no mask tensor), and hidden states are those before the final norm, as CLIP gives them.
    """

    inner: Any

    def __init__(self, config: Mapping[str, Any], projected: bool, hidden_states: bool, skips: int = 0) -> None:
        super().__init__()
        clip_config = clip_text_config(config)
        self.inner = nn.Module()
        network = transformers.CLIPTextModel(clip_config)
        self.inner.text_model = getattr(network, "text_model", network)
        del self.inner.text_model.embeddings.position_ids
        if projected:
            self.inner.text_projection = nn.Linear(clip_config.hidden_size, clip_config.projection_dim, bias=False)
        self.projected = projected
        self.hidden_states = hidden_states
        self.skips = skips
        self.end_id = end_id(config)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = self.inner.text_model
        states = [embed(model.embeddings, input_ids)]
        for layer in model.encoder.layers:
            states.append(run_layer(layer, states[-1]))
        last = model.final_layer_norm(states[-1])
        pooled = pool(last, input_ids, self.end_id)
        head = (self.inner.text_projection(pooled), last) if self.projected else (last, pooled)
        skipped = [normed(model.final_layer_norm, states[-1 - k]) for k in range(1, self.skips + 1)]
        return (*head, *(states if self.hidden_states else ()), *skipped)


def embed(embeddings: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Token plus position embeddings, (batch, sequence, width)."""
    positions = torch.arange(input_ids.shape[1], device=input_ids.device)
    tokens: torch.Tensor = embeddings.token_embedding(input_ids)
    places: torch.Tensor = embeddings.position_embedding(positions)
    return tokens + places


def run_layer(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """One encoder layer with causal attention."""
    out: torch.Tensor | tuple[torch.Tensor, ...] = layer(states, attention_mask=None, is_causal=True)
    return out[0] if isinstance(out, tuple) else out


def normed(norm: Any, states: torch.Tensor) -> torch.Tensor:
    """What a layer norm makes of `states`, without calling the module: its output is a point of the proof, once."""
    return nn.functional.layer_norm(states, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def pool(last: torch.Tensor, input_ids: torch.Tensor, end: int) -> torch.Tensor:
    """The state at the end token: at the greatest id if `end` is the old 2, else at the first id equal to it."""
    ids = input_ids.to(torch.int32)
    marks = ids if end == LEGACY_END else (ids == end).to(torch.int32)
    return last[torch.arange(last.shape[0], device=last.device), marks.argmax(dim=-1)]


def text_encoder(
    name: str, class_name: str, config: Mapping[str, Any], weights: Weights, hidden_states: bool
) -> Component:
    """A CLIP text encoder; `weights` may go by classic or by transformers 5 names.

    Raises:
        UnsupportedError: `class_name` is not one of the two CLIP text classes.
    """
    if class_name not in (PLAIN, PROJECTED):
        raise UnsupportedError(f"{name}: {class_name} is not supported; legal: {PLAIN}, {PROJECTED}")
    projected = class_name == PROJECTED
    build = partial(TextEncoder, dict(config), projected, hidden_states)
    inputs = (TensorSpec("input_ids", "int64", ("batch_size", "sequence_length")),)
    outputs = _outputs(config, projected, hidden_states)
    sizes = {"batch_size": 1, "sequence_length": 77}
    weights = renamed(weights, classic_map(weights.names()))
    return Component(
        name,
        class_name,
        dict(config),
        build,
        weights,
        inputs,
        outputs,
        sizes,
        walk=clip_layers,
        text_type=CLIP_TYPE,
    )


def skipping(component: Component, layers: int) -> Component:
    """A CLIP text encoder with the outputs `last_hidden_state.1` to `last_hidden_state.LAYERS` (clip-skip) beside its
    own. One that gives all hidden states (SDXL, SD3) needs none, and is given back as it is.

    Raises:
        ConfigError: it has fewer layers, or is no CLIP text encoder.
    """
    if component.text_type != CLIP_TYPE:
        raise ConfigError(f"{component.name} ({component.class_name}) is no CLIP text encoder: it has no clip-skip")
    most = layer_count(component.config)
    check_range("clip_skip", layers, 1, most)
    if any(spec.name.startswith("hidden_states.") for spec in component.outputs):
        return component
    last = next(spec for spec in component.outputs if spec.name == LAST)
    more = tuple(replace(last, name=f"{LAST}.{k}") for k in range(1, layers + 1))
    projected = component.class_name == PROJECTED
    build = partial(TextEncoder, dict(component.config), projected, False, layers)
    return replace(component, build=build, outputs=(*component.outputs, *more))


def layer_count(config: Mapping[str, Any]) -> int:
    """How many layers a CLIP text encoder of this config has."""
    return int(config.get("num_hidden_layers", transformers.CLIPTextConfig().num_hidden_layers))


def clip_text_config(config: Mapping[str, Any]) -> transformers.CLIPTextConfig:
    """The transformers config, attention set to the fused kernel."""
    skip = ("architectures", "_name_or_path", "transformers_version", "model_type", "torch_dtype", "dtype")
    clip_config = transformers.CLIPTextConfig(**{key: value for key, value in config.items() if key not in skip})
    clip_config._attn_implementation = "sdpa"
    return clip_config


def _outputs(config: Mapping[str, Any], projected: bool, hidden_states: bool) -> tuple[TensorSpec, ...]:
    defaults = transformers.CLIPTextConfig()
    width = int(config.get("hidden_size", defaults.hidden_size))
    state = ("batch_size", "sequence_length", width)
    last = TensorSpec("last_hidden_state", "float32", state)
    if projected:
        projection = int(config.get("projection_dim", defaults.projection_dim))
        specs = [TensorSpec("text_embeds", "float32", ("batch_size", projection)), last]
    else:
        specs = [last, TensorSpec("pooler_output", "float32", ("batch_size", width))]
    if hidden_states:
        specs += [TensorSpec(f"hidden_states.{i}", "float32", state) for i in range(layer_count(config) + 1)]
    return tuple(specs)


def clip_layers(component: Component, inner: Any) -> Program:
    """The layers of a CLIP text encoder: embeddings, encoder layers, then final norm, pooling and projection as one."""
    builder = Builder(component.inputs, component.outputs)
    outputs = [spec.name for spec in component.outputs]
    skips = [name for name in outputs if name.startswith(f"{LAST}.")]
    state = next(spec.shape for spec in component.outputs if spec.name == LAST)
    paths = [_EMBEDDINGS, *(f"text_model.encoder.layers.{i}" for i in range(len(inner.text_model.encoder.layers)))]
    hidden, seen = "input_ids", list[str]()
    for i, path in enumerate(paths):
        written = [builder.tensor(f"{path}.out", *state)]
        if f"hidden_states.{i}" in outputs:
            written.append(f"hidden_states.{i}")
        call = partial(_embed if i == 0 else _layer, path, len(written))
        builder.add(path, (hidden,), written, (path,), call)
        hidden = written[0]
        seen.append(hidden)
    projected = hasattr(inner, "text_projection")
    modules = (_FINAL, "text_projection") if projected else (_FINAL,)
    last = partial(_finish, projected, end_id(component.config))
    earlier = seen[-2 : -2 - len(skips) : -1]  # without the last layer, the last two, ...
    builder.add(_FINAL, (hidden, "input_ids", *earlier), [*outputs[:2], *skips], modules, last)
    return builder.program()


def _embed(path: str, copies: int, tree: Tree, input_ids: torch.Tensor) -> Tensors:
    return (embed(tree[path], input_ids),) * copies


def _layer(path: str, copies: int, tree: Tree, states: torch.Tensor) -> Tensors:
    return (run_layer(tree[path], states),) * copies


def _finish(
    projected: bool, end: int, tree: Tree, states: torch.Tensor, input_ids: torch.Tensor, *earlier: torch.Tensor
) -> Tensors:
    last = tree[_FINAL](states)
    pooled = pool(last, input_ids, end)
    head = (tree["text_projection"](pooled), last) if projected else (last, pooled)
    return (*head, *(normed(tree[_FINAL], one) for one in earlier))
