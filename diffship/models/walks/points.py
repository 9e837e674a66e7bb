"""Points of a part: the modules whose outputs a proof compares, one by one.

A point is called `<module path>.out`, as tensors between layers are. Points are the outputs of every module that has
modules inside (residual blocks, attentions, feed-forwards, transformer blocks, whole encoders) and of every layer that
is a single module (convolutions between blocks, norms).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffship.models.parts.component import Component
from diffship.models.parts.program import Layer, Program

if TYPE_CHECKING:
    from torch import nn

OUT = ".out"


def point_paths(component: Component, inner: nn.Module) -> frozenset[str]:
    """Paths of the modules, relative to `inner` (on any device), whose outputs may be points.

    Whether a module is called at all shows only when the part runs.
    """
    containers = {path for path, module in inner.named_modules() if path and any(True for _ in module.children())}
    if component.walk is None:
        return frozenset(containers)
    layers = component.program(inner).layers
    return frozenset(containers | {layer.name for layer in layers if layer.modules == (layer.name,)})


def layer_points(program: Program, containers: frozenset[str]) -> Mapping[str, Layer]:
    """{tensor: layer} of tensors between layers that are the output of a module which no layer calls as a whole.

    A transformer is run block by block, so its module is never called; its output is what its last layer writes.
    """
    return {
        name: layer
        for layer in program.layers
        for name in layer.writes
        if name.endswith(OUT) and name.removesuffix(OUT) in containers and name.removesuffix(OUT) not in layer.modules
    }
