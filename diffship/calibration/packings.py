"""Which weights of a part are packed as integers, and which stay as they are.

Packed are the weights of linear layers and of two-dimensional convolutions. What stays: layers that read nothing but
inputs of the part (its first convolution, embeddings of timesteps, prompts and patches), its last layer, projections
of the timestep inside blocks, and everything that is no matrix: norms, biases, tables of tokens. These are few bytes,
and errors in them reach every pixel. NVIDIA's ModelOpt leaves the same layers of diffusion models alone
(`examples/diffusers/quantization/utils.py: filter_func`), and the shortcuts of residual blocks, whose weights tolerate
it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from diffship.calibration.packed import fitting, packed_bytes
from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.core.precision import Packing, Precision
from diffship.core.strict import unknown
from diffship.models.parts.component import Component
from diffship.models.parts.filling import INNER, tied

if TYPE_CHECKING:
    from torch import nn
else:
    nn = lazy("torch.nn")

_KEPT = ("conv_in", "conv_out", "time_emb_proj")  # last names of modules, as diffusers has them
Packings = Mapping[str, Packing]


def packings(component: Component, precision: Precision, module: nn.Module | None = None) -> dict[str, Packing]:
    """{name of a weight: how it is packed} of the part in `precision`; empty if that packs nothing.

    module: the whole part on the meta device, if the caller has it.
    """
    if precision.packing is None or precision.chosen is not None:
        return dict(precision.chosen or {})
    whole = component.meta if module is None else module
    inner = whole.get_submodule("inner")
    kept = _kept(component, inner)
    shared = {name for group in tied(whole) if len(group) > 1 for name in group}
    return {
        f"{path}.weight": fitting(precision.packing, tuple(found.weight.shape))
        for path, found in inner.named_modules()
        if isinstance(found, (nn.Linear, nn.Conv2d))
        and not _below(path, kept)
        and path.rpartition(".")[2] not in _KEPT
        and f"{INNER}{path}.weight" not in shared
    }


def without(chosen: Packings, keep: Sequence[str], part: str) -> dict[str, Packing]:
    """`chosen` without the weights of the layers `keep`: paths, or paths of modules around them.

    Raises:
        ConfigError: one of `keep` names no layer of `part` that would be packed.
    """
    for path in keep:
        if not any(_below(name, [path]) for name in chosen):
            names = (name.removesuffix(".weight") for name in chosen)
            raise ConfigError(f"keep: {unknown(f'layer of {part}', path, names)}")
    return {name: packing for name, packing in chosen.items() if not _below(name, list(keep))}


def packed_summary(component: Component, chosen: Packings) -> dict[str, Any]:
    """What a manifest says of packed weights: layers, weights and bytes by bits, and how many weights stayed as they
    were."""
    by_bits: dict[str, dict[str, int]] = {}
    for name, packing in chosen.items():
        shape = component.weights.meta(name).shape
        row = by_bits.setdefault(str(packing.bits), {"layers": 0, "weights": 0, "bytes": 0})
        row["layers"] += 1
        row["weights"] += component.weights.meta(name).count
        row["bytes"] += packed_bytes(packing, shape)
    packed = sum(row["weights"] for row in by_bits.values())
    return {"bits": by_bits, "unpacked_weights": component.parameters - packed}


def weight_bytes(component: Component, precision: Precision, chosen: Packings) -> int:
    """Bytes of all weights of the part as they are stored, without the gaps between them."""
    known = set(component.weights.names())
    packed = {name: packing for name, packing in chosen.items() if name in known}
    shapes = {name: component.weights.meta(name) for name in packed}
    plain = component.parameters - sum(meta.count for meta in shapes.values())
    return plain * precision.weight_bytes + sum(packed_bytes(p, shapes[name].shape) for name, p in packed.items())


def _kept(component: Component, inner: nn.Module) -> list[str]:
    """Paths of the modules of the part's first layers and of its last one; none of a stage, whose layers belong to the
    whole."""
    if component.walk is None:
        return []
    program = component.program(inner)
    first = [layer for layer in program.layers if set(layer.reads) <= set(program.inputs)]
    return [path for layer in (*first, program.layers[-1]) for path in layer.modules]


def _below(path: str, roots: list[str]) -> bool:
    return any(path == root or path.startswith(f"{root}.") for root in roots)
