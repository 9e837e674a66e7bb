"""What a pass would make, from configs alone: later passes are checked, and costs told, before the first one runs.

A pass that can tell has the method `outline(pipeline) -> Outline` beside `check` and `run`; passes after one that
cannot are checked when their turn comes. A pass that is made for denoisers of some classes has these in `networks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from diffship.core.brief import brief
from diffship.core.errors import UnsupportedError
from diffship.core.problem import refuse
from diffship.models.parts.component import Component
from diffship.models.parts.unet import CLASS as UNET
from diffship.models.pipeline import Pipeline

U_NETS = (UNET,)


@dataclass(frozen=True)
class Calls:
    """`count` calls of `part` for one sample of the default size each; a backward pass is as long as two calls."""

    part: Component
    count: float


@brief
@dataclass(frozen=True)
class Outline:
    """pipeline: with the shapes that the pass leaves; the values of its weights may be others. calls: what the pass
    computes. note: what its shapes hang on if they are not known before it runs; they are then a target."""

    pipeline: Pipeline
    calls: tuple[Calls, ...] = ()
    note: str = ""


def settled(found: Sequence[Outline]) -> int:
    """How many passes were checked on the very shapes that they will meet: the first one, and each one before which all
    outlines are exact."""
    exact = 0
    for outline in found:
        if outline.note:
            break
        exact += 1
    return exact + 1


def require_network(step: Any, pipeline: Pipeline) -> None:
    """Raises UnsupportedError unless the denoiser is of a class that the pass `step` is made for."""
    legal, found = getattr(step, "networks", ()), pipeline.denoiser.class_name
    if legal and found not in legal:
        raise UnsupportedError(f"pass {step.kind}: {pipeline.denoiser.name} is a {found}; legal: {', '.join(legal)}")


def outlines(pipeline: Pipeline, passes: Sequence[Any], check: bool = True) -> list[Outline]:
    """One for each of `passes`, up to the first that cannot tell; with `check`, every one that is reached is checked.

    Raises:
        UnsupportedError: a pass does not fit what the passes before it make.
        ConfigError: likewise, if the outline itself finds out.
    """
    found: list[Outline] = []
    for step in passes:
        require_network(step, pipeline)
        if check:
            refuse(step.check(pipeline))
        if not hasattr(step, "outline"):
            break
        found.append(step.outline(pipeline))
        pipeline = found[-1].pipeline
    return found
