"""Where in a part faults of modules can be made: (module path, variant) of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from diffship.benchmarks.studies.mutation.faults import FORMS
from diffship.core.lazy import lazy
from diffship.models.parts.filling import INNER

if TYPE_CHECKING:
    from torch import nn
else:
    nn = lazy("torch.nn")

Place = tuple[str, str]


def _named(part: nn.Module, *classes: str) -> Iterator[tuple[str, Any]]:
    return ((path, module) for path, module in part.named_modules() if type(module).__name__ in classes)


def each_of(*classes: str, variant: str = "") -> Callable[[nn.Module], Iterator[Place]]:
    return lambda part: ((path, variant) for path, _ in _named(part, *classes))


def attentions(ending: str) -> Callable[[nn.Module], Iterator[Place]]:
    return lambda part: ((path, "") for path, _ in _named(part, "Attention") if path.endswith(ending))


def self_attentions(part: nn.Module) -> Iterator[Place]:
    """Those that add their own input hand it on alone; others, whose block adds it, give nothing."""
    for path, module in _named(part, "Attention", "CLIPAttention"):
        if not path.endswith("attn2"):
            yield path, "input" if getattr(module, "residual_connection", False) else ""


def whole_layers(part: nn.Module) -> Iterator[Place]:
    """Layers whose input could take the place of their output."""
    alike: dict[str, Callable[[Any], bool]] = {
        "ResnetBlock2D": lambda module: module.in_channels == module.out_channels,
        "AutoencoderTinyBlock": lambda module: isinstance(module.skip, nn.Identity),
        "CLIPEncoderLayer": lambda module: True,
        "BasicTransformerBlock": lambda module: True,
    }
    return ((path, "input") for path, module in _named(part, *alike) if alike[type(module).__name__](module))


def feed_forwards(part: nn.Module) -> Iterator[Place]:
    return ((path, "") for path, _ in _named(part, "FeedForward", "CLIPMLP"))


def queries(part: nn.Module) -> Iterator[Place]:
    for path, module in _named(part, "Attention", "CLIPAttention"):
        heads, name = (module.heads, "to_q") if hasattr(module, "heads") else (module.num_heads, "q_proj")
        width = getattr(module, name).out_features // heads
        if width > 1:
            yield f"{path}.{name}", f"{width**-0.5:.6f}"


def groups(part: nn.Module) -> Iterator[Place]:
    for path, module in _named(part, "GroupNorm"):
        each = module.num_channels // module.num_groups
        other = module.num_groups * 2 if each % 2 == 0 and each > 2 else module.num_groups // 2
        if other and module.num_channels % other == 0:
            yield path, str(other)


def _up_blocks(part: nn.Module) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """(path, its skips in the order in which they are given: channels and level of each) of a U-Net's way up."""
    inner: Any = part.get_submodule(INNER.removesuffix("."))
    if not hasattr(inner, "up_blocks") or not hasattr(inner, "down_blocks"):
        return
    level, skips = 0, [(inner.conv_in.out_channels, 0)]
    for block in inner.down_blocks:
        skips += [(resnet.out_channels, level) for resnet in block.resnets]
        for sampler in block.downsamplers or ():
            level += 1
            skips.append((sampler.out_channels, level))
    for index, block in enumerate(inner.up_blocks):
        count = len(block.resnets)
        yield f"{INNER}up_blocks.{index}", skips[-count:]
        del skips[-count:]


def skips(part: nn.Module) -> Iterator[Place]:
    for path, given in _up_blocks(part):
        for index, (channels, _) in enumerate(reversed(given)):
            yield f"{path}.resnets.{index}", str(channels)


def skip_pairs(part: nn.Module) -> Iterator[Place]:
    for path, given in _up_blocks(part):
        pairs = [(i, j) for i in range(len(given)) for j in range(i + 1, len(given)) if given[i] == given[j]]
        yield from ((path, f"{i},{j}") for i, j in pairs)


def images(part: nn.Module) -> Iterator[Place]:
    """Layers that give images and are points of the proof or feed one."""
    ends = ("conv_in", "conv_out", "conv1", "conv2", "proj_in", "proj_out", "conv")
    return ((path, "") for path, _ in _named(part, "Conv2d") if path.rpartition(".")[2] in ends)


def gelus(part: nn.Module) -> Iterator[Place]:
    for path, module in _named(part, "GEGLU", "CLIPMLP"):
        own = "erf" if type(module).__name__ == "GEGLU" else _form(module.activation_fn)
        yield from ((path, form) for form in FORMS if form != own)


def _form(activation: nn.Module) -> str:
    return "quick" if "Quick" in type(activation).__name__ else "erf"


def conditions(part: Any) -> Iterator[Place]:
    """The inputs of a U-Net after the sample and its time; the first is the text."""
    if type(part).__name__ != "UNet":
        return
    yield "", "2"
    yield from (("", str(3 + index)) for index, _ in enumerate(part.conditions))
