"""The layers of a CLIP text encoder."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.models.clip_names import end_id
from diffship.models.component import Component
from diffship.models.program import Builder, Program, Tensors, Tree
from diffship.models.text import embed, pool, run_layer

if TYPE_CHECKING:
    import torch

_EMBEDDINGS, _FINAL = "text_model.embeddings", "text_model.final_layer_norm"


def text_program(component: Component, inner: Any) -> Program:
    """Embeddings, encoder layers, then final norm, pooling and projection as one layer."""
    builder = Builder(component.inputs, component.outputs)
    outputs = [spec.name for spec in component.outputs]
    state = next(spec.shape for spec in component.outputs if spec.name == "last_hidden_state")
    paths = [_EMBEDDINGS, *(f"text_model.encoder.layers.{i}" for i in range(len(inner.text_model.encoder.layers)))]
    hidden = "input_ids"
    for i, path in enumerate(paths):
        written = [builder.tensor(f"{path}.out", *state)]
        if f"hidden_states.{i}" in outputs:
            written.append(f"hidden_states.{i}")
        call = partial(_embed if i == 0 else _layer, path, len(written))
        builder.add(path, (hidden,), written, (path,), call)
        hidden = written[0]
    projected = hasattr(inner, "text_projection")
    modules = (_FINAL, "text_projection") if projected else (_FINAL,)
    last = partial(_finish, projected, end_id(component.config))
    builder.add(_FINAL, (hidden, "input_ids"), outputs[:2], modules, last)
    return builder.program()


def _embed(path: str, copies: int, tree: Tree, input_ids: torch.Tensor) -> Tensors:
    return (embed(tree[path], input_ids),) * copies


def _layer(path: str, copies: int, tree: Tree, states: torch.Tensor) -> Tensors:
    return (run_layer(tree[path], states),) * copies


def _finish(projected: bool, end: int, tree: Tree, states: torch.Tensor, input_ids: torch.Tensor) -> Tensors:
    last = tree[_FINAL](states)
    pooled = pool(last, input_ids, end)
    return (tree["text_projection"](pooled), last) if projected else (last, pooled)
