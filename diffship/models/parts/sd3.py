"""The `transformer` part: SD3Transformer2DModel of Stable Diffusion 3 and 3.5 (arXiv 2403.03206), an MMDiT.

First how it is built, then its layers. Inputs and outputs are called as optimum calls those of its ONNX graphs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.weights import Weights
from diffship.models.parts.component import Component
from diffship.models.parts.program import Builder, Program, Tensors, Tree

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch.nn import Module
else:
    diffusers, torch, Module = lazy("diffusers"), lazy("torch"), lazy_base("torch.nn", "Module")

CLASS = "SD3Transformer2DModel"
TEXT_TOKENS = 77 + 256  # of both CLIP encoders, and of T5 or the zeros in its place
_NEEDED = ("in_channels", "joint_attention_dim", "pooled_projection_dim", "pos_embed_max_size")
_PATCHES, _EMBEDDING, _TEXT = "pos_embed", "time_text_embed", "context_embedder"


class SD3Transformer(Module):
    """(hidden_states, encoder_hidden_states, pooled_projections, timestep) -> (out_hidden_states,)."""

    inner: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = diffusers.SD3Transformer2DModel.from_config(dict(config))

    def forward(
        self, latents: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor, timestep: torch.Tensor
    ) -> tuple[torch.Tensor]:
        (out,) = self.inner(latents, text, pooled, timestep.reshape([-1]), return_dict=False)
        return (out,)


def sd3_transformer(config: Mapping[str, Any], weights: Weights, latent_size: int = 0) -> Component:
    """The transformer of `config`; `latent_size` is the smallest latent side, one patch if it is 0.

    The table of positions is among its weights (`pos_embed.pos_embed`): pictures of any size up to
    `pos_embed_max_size` patches a side read its middle.

    Raises:
        SourceError: the config is not that of an SD3Transformer2DModel.
    """
    missing = [key for key in _NEEDED if not isinstance(config.get(key), int)]
    if missing:
        raise SourceError(f"transformer: its config has no number for {', '.join(missing)}; is it an {CLASS}?")
    inputs, outputs = _specs(config)
    side = latent_size or int(config.get("patch_size", 2))
    sizes = {"batch_size": 1, "height": side, "width": side, "sequence_length": TEXT_TOKENS}
    build = partial(SD3Transformer, dict(config))
    return Component("transformer", CLASS, dict(config), build, weights, inputs, outputs, sizes, walk=sd3_layers)


def _specs(config: Mapping[str, Any]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    latents = int(config["in_channels"])
    drawn = int(config.get("out_channels") or latents)
    text = ("batch_size", "sequence_length", int(config["joint_attention_dim"]))
    inputs = (
        TensorSpec("hidden_states", "float32", ("batch_size", latents, "height", "width")),
        TensorSpec("encoder_hidden_states", "float32", text),
        TensorSpec("pooled_projections", "float32", ("batch_size", int(config["pooled_projection_dim"]))),
        TensorSpec("timestep", "float32", ("batch_size",), exact=True),
    )
    return inputs, (TensorSpec("out_hidden_states", "float32", ("batch_size", drawn, "height", "width")),)


def sd3_layers(component: Component, inner: Any) -> Program:
    """The layers of an SD3Transformer2DModel: patches, time and pooled text, text, one per joint block, and the last.

    A joint block gives the states of the text (`<path>.out`) and of the picture (`<path>.out.1`); the last one gives
    those of the picture alone. The last layer reads the latents only for their height and width.
    """
    builder = Builder(component.inputs, component.outputs)
    for name, shape in _between(inner).items():
        builder.tensor(name, *shape)
    picture, embedding, text = (f"{path}.out" for path in (_PATCHES, _EMBEDDING, _TEXT))
    builder.add(_PATCHES, ("hidden_states",), picture, (_PATCHES,), _patches)
    times = ("timestep", "pooled_projections")
    builder.add(_EMBEDDING, times, embedding, (_EMBEDDING,), _time_text, embedding=True)
    builder.add(_TEXT, ("encoder_hidden_states",), text, (_TEXT,), _context)
    for i, block in enumerate(inner.transformer_blocks):
        path = f"transformer_blocks.{i}"
        written = [f"{path}.out.1"] if block.context_pre_only else [f"{path}.out", f"{path}.out.1"]
        builder.add(path, (text, picture, embedding), written, (path,), partial(_joint, path))
        text, picture = f"{path}.out", f"{path}.out.1"
    last = partial(_unpatched, int(inner.config.patch_size))
    builder.add("proj_out", (picture, embedding, "hidden_states"), "out_hidden_states", ("norm_out", "proj_out"), last)
    return builder.program()


def _between(inner: Any) -> dict[str, tuple[str | int, ...]]:
    """Shapes of the tensors between layers, by name."""
    patch, width = int(inner.config.patch_size), int(inner.inner_dim)
    picture = ("batch_size", f"height * width / {patch * patch}", width)
    text = ("batch_size", "sequence_length", inner.context_embedder.out_features)
    found = {f"{_PATCHES}.out": picture, f"{_EMBEDDING}.out": ("batch_size", width), f"{_TEXT}.out": text}
    for i, block in enumerate(inner.transformer_blocks):
        if not block.context_pre_only:
            found[f"transformer_blocks.{i}.out"] = text
        found[f"transformer_blocks.{i}.out.1"] = picture
    return found


def _patches(tree: Tree, latents: torch.Tensor) -> Tensors:
    return (tree[_PATCHES](latents).contiguous(),)


def _time_text(tree: Tree, timestep: torch.Tensor, pooled: torch.Tensor) -> Tensors:
    return (tree[_EMBEDDING](timestep.reshape([-1]), pooled),)


def _context(tree: Tree, text: torch.Tensor) -> Tensors:
    return (tree[_TEXT](text),)


def _joint(path: str, tree: Tree, text: torch.Tensor, picture: torch.Tensor, embedding: torch.Tensor) -> Tensors:
    written = tree[path](hidden_states=picture, encoder_hidden_states=text, temb=embedding)
    return tuple(one for one in written if one is not None)


def _unpatched(
    patch: int, tree: Tree, picture: torch.Tensor, embedding: torch.Tensor, latents: torch.Tensor
) -> Tensors:
    states = tree["proj_out"](tree["norm_out"](picture, embedding))
    batch, height, width = latents.shape[0], latents.shape[2] // patch, latents.shape[3] // patch
    states = states.reshape(batch, height, width, patch, patch, states.shape[-1] // (patch * patch))
    states = torch.einsum("nhwpqc->nchpwq", states)
    return (states.reshape(batch, states.shape[1], height * patch, width * patch),)
