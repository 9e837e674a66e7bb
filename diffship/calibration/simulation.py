"""What codes do to a part, in torch: packed weights and rounded inputs of layers, as every engine computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from diffship.calibration.packed import pack
from diffship.core.lazy import lazy
from diffship.core.precision import Affine, Packing, Precision
from diffship.models.parts.filling import INNER

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

_MOVED = 4e-6  # of a range: what float32 engines differ by, and a margin


def unpacked(weight: torch.Tensor, packing: Packing) -> torch.Tensor:
    """`weight` (float32) as an engine has it that read it packed."""
    return torch.from_numpy(pack(weight.numpy(), packing).values()).reshape(weight.shape)


@contextmanager
def coded_inputs(module: nn.Module, precision: Precision, moved: bool = False) -> Iterator[None]:
    """Within it, inputs of the layers of `module` that `precision.ranges` names are rounded to their codes, as ONNX's
    QuantizeLinear and DequantizeLinear do.

    moved: inputs are moved at random by _MOVED of their range first. An engine that sums in another order moves them so
    too, and what lies between two codes then gets the other one; this shows how much that matters.
    """
    found = dict(module.named_modules())
    draw = torch.Generator().manual_seed(0) if moved else None
    hooks = [
        found[INNER + path].register_forward_pre_hook(partial(_coded, codes, draw))
        for path, codes in precision.ranges.items()
        if INNER + path in found
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _coded(
    codes: Affine, draw: torch.Generator | None, module: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    x, most = inputs[0], 2**codes.bits - 1
    if draw is not None:
        x = x + (2 * torch.rand(x.shape, generator=draw) - 1) * (_MOVED * most * codes.scale)
    # scale and zero as float32 and not as Python floats, which torch would divide by in float64
    scale = torch.tensor(codes.scale, dtype=torch.float32)
    rounded = torch.clamp(torch.round(x / scale) + codes.zero, 0, most)
    return ((rounded - codes.zero) * scale, *inputs[1:])
