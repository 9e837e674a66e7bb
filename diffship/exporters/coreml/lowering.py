"""Networks in the forms that the Neural Engine runs: 4-D tensors with channels first, no large transposes.

A transformer keeps its tokens as (batch, channels, 1, tokens); its linear layers become 1x1 convolutions, and norms
reduce over the channels. Attention has three forms, called as Apple's converter calls them:

- original: all heads in one product, (batch, heads, queries, keys).
- split-einsum: a product for each head, `bchq,bkhc->bkhq` and back. The Neural Engine prefers it.
- split-einsum-v2: each head in chunks of 512 queries; where there are no more than that it is split-einsum.

The layout is described in Apple's "Deploying Transformers on the Apple Neural Engine" (2022); all three forms compute
Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy, lazy_base

if TYPE_CHECKING:
    import torch
    from diffusers.models import attention
    from diffusers.models.transformers import transformer_2d
    from torch import nn
    from torch.nn import Module, functional
    from torch.overrides import TorchFunctionMode
else:
    torch, nn, functional = lazy("torch"), lazy("torch.nn"), lazy("torch.nn.functional")
    attention = lazy("diffusers.models.attention")
    transformer_2d = lazy("diffusers.models.transformers.transformer_2d")
    Module = lazy_base("torch.nn", "Module")
    TorchFunctionMode = lazy_base("torch.overrides", "TorchFunctionMode")

FORMS = ("original", "split-einsum", "split-einsum-v2")
_CHUNK = 512  # queries of one product in split-einsum-v2


def channels_first(root: nn.Module, form: str) -> bool:
    """Replace every Transformer2DModel below `root` by one with channels first; returns whether there was any.

    Raises:
        UnsupportedError: a transformer block has an option that this layout lacks.
    """
    found = [
        (parent, name, child)
        for parent in root.modules()
        for name, child in parent.named_children()
        if isinstance(child, transformer_2d.Transformer2DModel)
    ]
    for parent, name, child in found:
        setattr(parent, name, ChannelsFirst(child, form))
    return bool(found)


@contextmanager
def norms_in_four_axes() -> Iterator[None]:
    """Within it, group normalization is computed on (batch, groups, channels, pixels)."""
    with _Norms():
        yield


class _Norms(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is functional.group_norm:
            return group_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def group_norm(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """torch.nn.functional.group_norm (Wu and He 2018, arXiv 1803.08494) of (batch, channels, ...)."""
    grouped = _normal(x.reshape(x.shape[0], num_groups, x.shape[1] // num_groups, -1), (2, 3), eps)
    return _scaled(grouped.reshape(x.shape), weight, bias)


def layer_norm(norm: nn.LayerNorm, x: torch.Tensor) -> torch.Tensor:
    """Layer normalization over the channels of (batch, channels, 1, tokens)."""
    return _scaled(_normal(x, (1,), norm.eps), norm.weight, norm.bias)


def _normal(x: torch.Tensor, axes: tuple[int, ...], eps: float) -> torch.Tensor:
    centred = x - x.mean(axes, keepdim=True)
    return centred * torch.rsqrt((centred * centred).mean(axes, keepdim=True) + eps)


def _scaled(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None) -> torch.Tensor:
    shape = (1, -1, *[1] * (x.dim() - 2))
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def linear(layer: nn.Linear | nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A linear layer, or a 1x1 convolution, over the channels of (batch, channels, 1, tokens)."""
    weight = layer.weight if layer.weight.dim() == 4 else layer.weight[:, :, None, None]
    return functional.conv2d(x, weight, layer.bias)


class ChannelsFirst(Module):
    """A Transformer2DModel over (batch, channels, height, width); text is (batch, width, 1, tokens).

    The tensors of the transformer keep their modules, and so their names below this one.
    """

    def __init__(self, transformer: Any, form: str) -> None:
        super().__init__()
        _check(transformer)
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.transformer_blocks = transformer.transformer_blocks
        self._form = form

    def forward(
        self, hidden_states: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any
    ) -> tuple[torch.Tensor]:
        batch, _channels, height, width = hidden_states.shape
        x = self.norm(hidden_states)
        x = linear(self.proj_in, x.reshape(batch, x.shape[1], 1, height * width))
        for block in self.transformer_blocks:
            x = self._block(block, x, encoder_hidden_states)
        x = linear(self.proj_out, x)
        return (x.reshape(hidden_states.shape) + hidden_states,)

    def _block(self, block: Any, x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        normed = layer_norm(block.norm1, x)
        x = x + self._attend(block.attn1, normed, normed)
        x = x + self._attend(block.attn2, layer_norm(block.norm2, x), text)
        gated, out = block.ff.net[0], block.ff.net[2]
        value, gate = linear(gated.proj, layer_norm(block.norm3, x)).chunk(2, dim=1)
        return x + linear(out, value * functional.gelu(gate))

    def _attend(self, layer: Any, x: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
        query, key, value = linear(layer.to_q, x), linear(layer.to_k, source), linear(layer.to_v, source)
        query = query * layer.scale
        if self._form == FORMS[0]:
            return linear(layer.to_out[0], all_heads(query, key, value, layer.heads))
        chunk = _CHUNK if self._form == FORMS[2] else 0
        return linear(layer.to_out[0], each_head(query, key, value, layer.heads, chunk))


def all_heads(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of (batch, channels, 1, tokens) tensors, all heads in one product; queries are scaled already."""
    batch, channels, _, queries = query.shape
    q, k, v = (x.reshape(batch, heads, channels // heads, x.shape[3]) for x in (query, key, value))
    weights = torch.matmul(q.transpose(2, 3), k).softmax(dim=3)
    return torch.matmul(v, weights.transpose(2, 3)).reshape(batch, channels, 1, queries)


def each_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int, chunk: int) -> torch.Tensor:
    """The same head by head; `chunk`: queries at once, 0 for all of them."""
    size, queries = query.shape[1] // heads, query.shape[3]
    sides = ((query, 1), (key.transpose(1, 3), 3), (value, 1))
    parts = zip(*(torch.split(side, size, axis) for side, axis in sides), strict=True)
    step = chunk if chunk and queries > chunk else queries
    done = [[_one_head(piece, k, v) for piece in torch.split(q, step, 3)] for q, k, v in parts]
    return torch.cat([pieces[0] if len(pieces) == 1 else torch.cat(pieces, 3) for pieces in done], 1)


def _one_head(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """query, value: (batch, channels, 1, tokens); key: (batch, tokens, 1, channels)."""
    weights = torch.einsum("bkhc,bchq->bkhq", key, query).softmax(dim=1)
    return torch.einsum("bkhq,bchk->bchq", weights, value)


def _check(transformer: Any) -> None:
    """Raises UnsupportedError for a block that computes something else than a plain one."""
    for block in transformer.transformer_blocks:
        plain = block.norm_type == "layer_norm" and block.attn2 is not None and block.pos_embed is None
        gated = isinstance(block.ff.net[0], attention.GEGLU) and not block.only_cross_attention
        if not (plain and gated and transformer.is_input_continuous and _is_plain(block.attn1, block.attn2)):
            raise UnsupportedError(
                "a transformer block of this U-Net has another form than those of Stable Diffusion and SDXL, and "
                "no Core ML form here; export it --to onnx"
            )


def _is_plain(*layers: Any) -> bool:
    return all(
        layer.norm_q is None
        and layer.group_norm is None
        and layer.norm_cross is None
        and not layer.residual_connection
        and layer.rescale_output_factor == 1.0
        for layer in layers
    )
