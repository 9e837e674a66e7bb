"""Parts of other families, tiny and random: the libraries' own modules as components, with the weights of a file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from diffship.core.spec import TensorSpec
from diffship.core.weights import MemoryWeights
from diffship.models.parts.component import Component

T5 = transformers.T5Config(
    vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, feed_forward_proj="gated-gelu"
)  # fmt: skip
SD3: dict[str, Any] = {
    "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
    "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 16, "caption_projection_dim": 16,
    "pooled_projection_dim": 12, "pos_embed_max_size": 96, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
}  # fmt: skip
ROTARY = transformers.LlamaConfig(hidden_size=32, num_attention_heads=2, max_position_embeddings=64)


class T5Part(nn.Module):
    """(input_ids,) -> (last_hidden_state,)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = transformers.T5EncoderModel(T5)

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.inner(input_ids).last_hidden_state,)


class Sd3Part(nn.Module):
    """(sample, timestep, encoder_hidden_states, pooled_projections) -> (out_sample,)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = diffusers.SD3Transformer2DModel(**SD3)

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, pooled: torch.Tensor
    ) -> tuple[torch.Tensor]:
        out: tuple[torch.Tensor] = self.inner(sample, text, pooled, timestep, return_dict=False)
        return out


class _Rotated(nn.Module):
    """Queries turned by their positions (Su et al. 2021, "RoFormer"); the frequencies are a computed buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.rotary = LlamaRotaryEmbedding(ROTARY)
        self.project = nn.Linear(16, 16)


class RotaryPart(nn.Module):
    """(states,) -> (turned,)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = _Rotated()

    def forward(self, states: torch.Tensor) -> tuple[torch.Tensor]:
        query = self.inner.project(states)
        positions = torch.arange(states.shape[1], device=states.device)[None]
        cos, sin = self.inner.rotary(query, positions)
        first, second = query.chunk(2, dim=-1)
        return (query * cos + torch.cat([-second, first], dim=-1) * sin,)


@dataclass(frozen=True)
class Foreign:
    """A component, and the module that its weights came from."""

    component: Component
    original: nn.Module


_TOKENS = TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"))
_STATES = ("batch_size", "sequence_length", 16)
_PLANE = ("batch_size", 4, "height", "width")
_SD3_INPUTS = (
    TensorSpec("sample", "float32", _PLANE),
    TensorSpec("timestep", "float32", ("batch_size",), exact=True),
    TensorSpec("encoder_hidden_states", "float32", _STATES),
    TensorSpec("pooled_projections", "float32", ("batch_size", 12)),
)
_FORMS: dict[str, tuple[Callable[[], Any], tuple[TensorSpec, ...], TensorSpec, dict[str, int], dict[str, Any]]] = {
    "t5": (
        T5Part, (_TOKENS,), TensorSpec("last_hidden_state", "float32", _STATES),
        {"sequence_length": 8}, T5.to_dict(),
    ),
    "sd3": (
        Sd3Part, _SD3_INPUTS, TensorSpec("out_sample", "float32", _PLANE),
        {"height": 2, "width": 2, "sequence_length": 8}, SD3,
    ),
    "rotary": (
        RotaryPart, (TensorSpec("states", "float32", _STATES),), TensorSpec("turned", "float32", _STATES),
        {"sequence_length": 8}, {},
    ),
}  # fmt: skip


def foreign(name: str) -> Foreign:
    """`t5`, `sd3` or `rotary`, with seeded weights under the names that `save_pretrained` gives them."""
    build, inputs, output, sizes, config = _FORMS[name]
    torch.manual_seed(5)
    original = build().eval()
    with torch.no_grad():
        for tensor in original.parameters():
            tensor.copy_(torch.randn_like(tensor) * 0.2)
    tied = set(getattr(original.inner, "_tied_weights_keys", None) or ())
    state = {key: tensor.numpy() for key, tensor in original.inner.state_dict().items() if key not in tied}
    sizes = {"batch_size": 1, **sizes}
    label, weights = type(original).__name__, MemoryWeights(state)
    return Foreign(Component(name, label, config, build, weights, inputs, (output,), sizes), original)
