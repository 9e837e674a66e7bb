"""The `transformer` part: Flux2Transformer2DModel of FLUX.2 (Black Forest Labs 2025).

First how it is built, then its layers. Latents are rows of tokens. Where a token stands is told by the cosines and
sines of its rotary embedding (Su et al. 2021, "RoFormer"), which are inputs: `kinds/flux2.py` computes them in numpy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.spec import TensorSpec
from diffship.core.weights import Weights
from diffship.models.parts.component import Component
from diffship.models.parts.program import Apply, Builder, Program, Tensors, Tree

if TYPE_CHECKING:
    import diffusers
    import torch
    from torch.nn import Module
else:
    diffusers, torch, Module = lazy("diffusers"), lazy("torch"), lazy_base("torch.nn", "Module")

CLASS = "Flux2Transformer2DModel"
TEXT_TOKENS = 512  # diffusers' `max_sequence_length`
ROPE = ("image_rope_cos", "image_rope_sin", "text_rope_cos", "text_rope_sin")
_NEEDED = ("in_channels", "joint_attention_dim", "num_attention_heads", "attention_head_dim")
_PICTURE, _TEXT, _TIME = "x_embedder", "context_embedder", "time_guidance_embed"
# what shifts and scales the states of every block of one sort, made of the embedding of the timestep
_OF_PICTURE, _OF_TEXT = "double_stream_modulation_img", "double_stream_modulation_txt"
_OF_BOTH = "single_stream_modulation"
_THETA = 2000


class Flux2Transformer(Module):
    """(hidden_states, encoder_hidden_states, timestep, and the four of `ROPE`) -> (out_hidden_states,).

    It runs the layers itself, so that the rotary embeddings are inputs, and the timestep stays in float32 up to its
    sinusoids whatever the type of the weights.
    """

    inner: Any

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.inner = diffusers.Flux2Transformer2DModel.from_config(dict(config))

    def forward(
        self, latents: torch.Tensor, text: torch.Tensor, timestep: torch.Tensor, *rope: torch.Tensor
    ) -> tuple[torch.Tensor]:
        tree = Tree(self.inner)
        (picture,), (words,), (time,) = (
            _module(_PICTURE, tree, latents),
            _module(_TEXT, tree, text),
            _time(tree, timestep),
        )
        (of_picture,), (of_text,), (of_both,) = (
            _module(path, tree, time) for path in (_OF_PICTURE, _OF_TEXT, _OF_BOTH)
        )
        for i in range(len(self.inner.transformer_blocks)):
            words, picture = _double(f"transformer_blocks.{i}", tree, words, picture, of_picture, of_text, *rope)
        for i in range(len(self.inner.single_transformer_blocks)):
            words, picture = _single(f"single_transformer_blocks.{i}", tree, words, picture, of_both, *rope)
        (out,) = _last(tree, picture, time)
        return (out,)


def flux2_transformer(name: str, config: Mapping[str, Any], weights: Weights, least_tokens: int = 1) -> Component:
    """The transformer called `name`; `least_tokens` are those of the smallest picture.

    Raises:
        SourceError: the config is not that of a Flux2Transformer2DModel.
        UnsupportedError: it takes guidance as an input (FLUX.2-dev), or its rotary embeddings are others than those of
            the published models.
    """
    missing = [key for key in _NEEDED if not isinstance(config.get(key), int)]
    if missing:
        raise SourceError(f"{name}: its config has no number for {', '.join(missing)}; is it an {CLASS}?")
    _check(config)
    inputs, outputs = _specs(config)
    sizes = {"batch_size": 1, "image_tokens": least_tokens, "sequence_length": TEXT_TOKENS}
    build = partial(Flux2Transformer, dict(config))
    return Component(name, CLASS, dict(config), build, weights, inputs, outputs, sizes, walk=flux2_layers)


def _check(config: Mapping[str, Any]) -> None:
    if config.get("guidance_embeds", True):
        raise UnsupportedError(
            "transformer/config.json: guidance_embeds is on, as in FLUX.2-dev; models that take guidance as an input "
            "are not drawn here (Flux2KleinPipeline hands none to them either). Legal is false"
        )
    head = int(config["attention_head_dim"])
    axes, theta = list(config.get("axes_dims_rope", (32, 32, 32, 32))), config.get("rope_theta", _THETA)
    if head % 8 or axes != [head // 4] * 4 or theta != _THETA:
        raise UnsupportedError(
            f"transformer/config.json: axes_dims_rope is {str(axes)[:60]} and rope_theta {str(theta)[:20]}, heads are "
            f"{head} wide; only four equal even axes and {_THETA} are drawn with"
        )


def _specs(config: Mapping[str, Any]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    latents, head = int(config["in_channels"]), int(config["attention_head_dim"])
    drawn = int(config.get("out_channels") or latents)
    axes = {"image": "image_tokens", "text": "sequence_length"}
    inputs = (
        TensorSpec("hidden_states", "float32", ("batch_size", "image_tokens", latents)),
        TensorSpec(
            "encoder_hidden_states", "float32", ("batch_size", "sequence_length", int(config["joint_attention_dim"]))
        ),
        TensorSpec("timestep", "float32", ("batch_size",), exact=True),
        *(TensorSpec(name, "float32", (axes[name.partition("_")[0]], head), exact=True) for name in ROPE),
    )
    return inputs, (TensorSpec("out_hidden_states", "float32", ("batch_size", "image_tokens", drawn)),)


def flux2_layers(component: Component, inner: Any) -> Program:
    """The layers of a Flux2Transformer2DModel: latents, text, timestep, three modulations, one per block, and the last.

    Every block gives the states of the text (`<path>.out`) and of the picture (`<path>.out.1`); a block of one stream
    joins them only inside.
    """
    builder = Builder(component.inputs, component.outputs)
    width = int(inner.inner_dim)
    picture = builder.tensor(f"{_PICTURE}.out", "batch_size", "image_tokens", width)
    text = builder.tensor(f"{_TEXT}.out", "batch_size", "sequence_length", width)
    time = builder.tensor(f"{_TIME}.out", "batch_size", width)
    builder.add(_PICTURE, ("hidden_states",), picture, (_PICTURE,), partial(_module, _PICTURE))
    builder.add(_TEXT, ("encoder_hidden_states",), text, (_TEXT,), partial(_module, _TEXT))
    builder.add(_TIME, ("timestep",), time, (_TIME,), _time, embedding=True)
    for path, sets in ((_OF_PICTURE, 6), (_OF_TEXT, 6), (_OF_BOTH, 3)):
        made = builder.tensor(f"{path}.out", "batch_size", sets * width)
        builder.add(path, (time,), made, (path,), partial(_module, path))
    doubles = [f"transformer_blocks.{i}" for i in range(len(inner.transformer_blocks))]
    singles = [f"single_transformer_blocks.{i}" for i in range(len(inner.single_transformer_blocks))]
    for path in (*doubles, *singles):
        made_of, apply = ((_OF_BOTH,), _single) if path in singles else ((_OF_PICTURE, _OF_TEXT), _double)
        reads = (text, picture, *(f"{one}.out" for one in made_of), *ROPE)
        text = builder.tensor(f"{path}.out", "batch_size", "sequence_length", width)
        picture = builder.tensor(f"{path}.out.1", "batch_size", "image_tokens", width)
        builder.add(path, reads, (text, picture), (path,), _at(path, apply))
    builder.add("proj_out", (picture, time), "out_hidden_states", ("norm_out", "proj_out"), _last)
    return builder.program()


def _at(path: str, apply: Callable[..., Tensors]) -> Apply:
    return partial(apply, path)


def _module(path: str, tree: Tree, tensor: torch.Tensor) -> Tensors:
    return (tree[path](tensor),)


def _time(tree: Tree, timestep: torch.Tensor) -> Tensors:
    embedding = tree[_TIME]
    waves = embedding.time_proj(timestep.reshape([-1]))
    return (embedding.timestep_embedder(waves.to(embedding.timestep_embedder.linear_1.weight.dtype)),)


def _double(
    path: str,
    tree: Tree,
    text: torch.Tensor,
    picture: torch.Tensor,
    of_picture: torch.Tensor,
    of_text: torch.Tensor,
    *rope: torch.Tensor,
) -> Tensors:
    written: Tensors = tree[path](picture, text, of_picture, of_text, image_rotary_emb=_joined(*rope))
    return written


def _single(
    path: str, tree: Tree, text: torch.Tensor, picture: torch.Tensor, of_both: torch.Tensor, *rope: torch.Tensor
) -> Tensors:
    # joined and split in each block, so that every tensor between blocks is of tokens of one sort
    written: Tensors = tree[path](picture, text, of_both, image_rotary_emb=_joined(*rope), split_hidden_states=True)
    return written


def _joined(
    image_cos: torch.Tensor, image_sin: torch.Tensor, text_cos: torch.Tensor, text_sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([text_cos, image_cos]), torch.cat([text_sin, image_sin])


def _last(tree: Tree, picture: torch.Tensor, time: torch.Tensor) -> Tensors:
    return (tree["proj_out"](tree["norm_out"](picture, time)),)
