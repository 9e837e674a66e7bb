"""Names of what is inside a part, in execution order: the only naming that cuts, costs, scores and taps use."""

from __future__ import annotations

import re

from diffship.core.errors import ConfigError
from diffship.core.strict import unknown
from diffship.models.parts.component import Component
from diffship.models.parts.program import Layer

_INSIDE = re.compile(r"(.*\.attentions\.\d+)\.(proj_in|transformer_blocks\.\d+|proj_out)\Z")


def blocks(component: Component) -> tuple[str, ...]:
    """`time_embedding`, `conv_in`, `down_blocks.0.resnets.0`, `down_blocks.0.attentions.0`, ... `conv_out`."""
    return tuple(dict.fromkeys(block_of(layer.name) for layer in component.program().layers))


def layers(component: Component) -> tuple[str, ...]:
    """Names of all layers: as `blocks`, with each transformer as `proj_in`, `transformer_blocks.K` and `proj_out`; the
    finest cuts."""
    return tuple(layer.name for layer in component.program().layers)


def block_of(layer: str) -> str:
    """The block that a layer belongs to: its attention module, or itself."""
    match = _INSIDE.match(layer)
    return match[1] if match else layer


def end_of(name: str, steps: tuple[Layer, ...]) -> int:
    """Index after the last layer of `name`: a layer, a block, or anything that encloses them (`down_blocks.1`).

    Raises:
        ConfigError: nothing of that name is there.
    """
    found = [i for i, step in enumerate(steps) if step.name == name or step.name.startswith(f"{name}.")]
    if not found:
        legal = dict.fromkeys(block_of(step.name) for step in steps)
        raise ConfigError(unknown("block", name, legal))
    return found[-1] + 1
