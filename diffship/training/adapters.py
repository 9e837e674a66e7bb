"""LoRA layers in a U-Net that is trained (Hu et al., arXiv 2106.09685), by peft; they can be switched off and on.

Switched off, the U-Net is what it was: teacher and student then share its weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import peft
    import torch
    from peft.tuners import tuners_utils
    from torch import nn
else:
    peft, torch, nn = lazy("peft"), lazy("torch"), lazy("torch.nn")
    tuners_utils = lazy("peft.tuners.tuners_utils")

# the layers of LCM-LoRA (arXiv 2311.05556, as diffusers' training scripts have them)
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)
# those of diffusers' script that trains a LoRA on pictures, and of Hu et al.: the projections of attention
ATTENTION = TARGETS[:4]
DOWN, UP = ".lora_A.default.weight", ".lora_B.default.weight"


def add_lora(network: nn.Module, rank: int, alpha: float, seed: int, targets: Sequence[str] = TARGETS) -> None:
    """Puts LoRA layers into `network`; only they are trained. They change nothing yet: the up matrices are zero.

    targets: how the names of the layers end that get one.

    The down matrices are drawn from `seed`, in the order of the layers, as torch draws those of a linear layer.
    """
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    peft.inject_adapter_in_model(config, network)
    draw = torch.Generator().manual_seed(seed & 0xFFFFFFFFFFFFFFFF)
    for name, value in network.named_parameters():
        value.requires_grad_(name.endswith((DOWN, UP)))
        if name.endswith(DOWN):
            fresh = torch.empty(value.shape)
            nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=draw)
            value.data.copy_(fresh)


@contextmanager
def switched_off(network: nn.Module) -> Iterator[None]:
    """While open, `network` computes as if it had no LoRA layers."""
    layers: list[Any] = [layer for layer in network.modules() if isinstance(layer, tuners_utils.BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
