"""Cuts: at which blocks a U-Net is cut for several devices, and which device holds which stage.

AsyncDiff (arXiv 2406.06911) published cuts for SD 1.5, SD 2.1 and SDXL; anything else is balanced by time or bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.strict import unknown
from diffship.models.parts.component import Component
from diffship.models.parts.program import Program
from diffship.models.parts.unet import CLASS as UNET
from diffship.models.walks.balance import Crossing, balanced
from diffship.models.walks.cost import held_by, layer_costs
from diffship.models.walks.stages import Stage, cut

KINDS = ("published", "speed", "memory")
ON_THE_WIRE = 2  # bytes of a value: float16, as all published figures count


@dataclass(frozen=True)
class Cuts:
    """Cut after each block of `at`. `homes` has the device of each stage that results; the last stage stands on the
    device with the highest number."""

    at: tuple[str, ...]
    homes: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.homes) != len(self.at) + 1 or sorted(set(self.homes)) != list(range(self.homes[-1] + 1)):
            raise ConfigError(f"cuts after {list(self.at)} cannot stand on devices {list(self.homes)}")


WHOLE = Cuts((), (0,))
PUBLISHED: Mapping[str, Mapping[int, Cuts]] = {
    "sd15": {
        2: Cuts(("up_blocks.1.resnets.1",), (0, 1)),
        3: Cuts(("down_blocks.3", "up_blocks.2.resnets.2"), (0, 1, 2)),
        4: Cuts(("down_blocks.1", "up_blocks.1.resnets.1", "up_blocks.2"), (0, 1, 2, 3)),
    },
    "sd21": {
        2: Cuts(("up_blocks.1.resnets.2",), (0, 1)),
        3: Cuts(("down_blocks.3", "up_blocks.2"), (0, 1, 2)),
        4: Cuts(("down_blocks.1", "up_blocks.1", "up_blocks.3.resnets.0"), (0, 1, 2, 3)),
    },
    # the shallow ends stand together, so that their skips are fresh and only the deep trunk is stale
    "sdxl": {
        2: Cuts(("down_blocks.1", "up_blocks.0.attentions.1"), (1, 0, 1)),
        3: Cuts(("down_blocks.1", "up_blocks.0.resnets.0", "up_blocks.0"), (2, 0, 1, 2)),
        4: Cuts(
            ("down_blocks.1.resnets.0", "down_blocks.2", "up_blocks.0.attentions.0", "up_blocks.0"), (3, 0, 1, 2, 3)
        ),
    },
}
_MID = "UNetMidBlock2DCrossAttn"
_CROSS, _PLAIN = "CrossAttnDownBlock2D", "DownBlock2D"
_TABLES = {(_CROSS, _CROSS, _CROSS, _PLAIN): "sd15", (_PLAIN, _CROSS, _CROSS): "sdxl"}


def find_cuts(
    component: Component,
    stages: int,
    kind: str | None = None,
    sizes: Mapping[str, int] | None = None,
    times: Mapping[str, float] | None = None,
    speeds: Sequence[float] | None = None,
) -> Cuts:
    """The cuts of a U-Net for `stages` devices; without a kind, those of `usual_kind`.

    `published`: AsyncDiff's. `speed`: the least time of the slowest stage, counted in multiply-accumulates at `sizes`,
    or by `times` (layer name -> seconds), on devices of relative `speeds`. `memory`: the least bytes in the largest.

    Raises:
        ConfigError: an unknown kind, no published cut for this U-Net or number, or more stages than layers.
        UnsupportedError: not a U-Net.
    """
    if component.class_name != UNET:
        raise UnsupportedError(f"{component.name} is not partitioned; a {UNET} is")
    kind = kind or usual_kind(component.config, stages)
    if kind not in KINDS:
        raise ConfigError(unknown("cut", kind, KINDS))
    if stages < 1:
        raise ConfigError(f"stages is {stages}; legal: 1 or more")
    if stages == 1:
        return WHOLE
    if kind == "published":
        return published(component.config, stages)
    return _balanced(component, stages, kind, sizes or {}, times, speeds)


def usual_kind(config: Mapping[str, Any], stages: int) -> str:
    """`published` if AsyncDiff has a cut for such a U-Net and number of stages, else `speed`."""
    table = table_of(config)
    return "published" if table is not None and stages in (1, *PUBLISHED[table]) else "speed"


def published(config: Mapping[str, Any], stages: int) -> Cuts:
    """AsyncDiff's cut for the U-Net of `config`, which has to have the blocks of SD 1.5, SD 2.1 or SDXL.

    Raises:
        ConfigError: it has others, or the number was not published.
    """
    table = table_of(config)
    if table is None:
        raise ConfigError("no cut was published for a U-Net of these blocks; take --cut speed or --cut memory")
    if stages not in PUBLISHED[table]:
        legal = ", ".join(map(str, PUBLISHED[table]))
        raise ConfigError(f"stages is {stages}; published for {table}: {legal}. Take --cut speed for any other number")
    return PUBLISHED[table][stages]


def table_of(config: Mapping[str, Any]) -> str | None:
    """`sd15`, `sd21` or `sdxl` if a U-Net has that model's blocks, whatever its widths; None for reduced ones."""
    whole = config.get("layers_per_block", 2) == 2 and config.get("mid_block_type", _MID) == _MID
    table = _TABLES.get(tuple(config.get("down_block_types", ()))) if whole else None
    return "sd21" if table == "sd15" and config.get("use_linear_projection") else table


def partition(component: Component, cuts: Cuts) -> list[Stage]:
    """The stages that `cuts` makes of `component`; each computes its own time embedding, so that they may stand at
    different timesteps."""
    return cut(component, cuts.at, embed="recompute")


def held_bytes(stages: Sequence[Stage], homes: Sequence[int]) -> list[int]:
    """Bytes of the stored weights on each device; what two of its stages share, a time embedding, is there once."""
    held: list[dict[str, int]] = [{} for _ in range(max(homes) + 1)]
    for stage, home in zip(stages, homes, strict=True):
        held[home] |= {name: stage.weights.meta(name).nbytes for name in stage.weights.names()}
    return [sum(sizes.values()) for sizes in held]


def keeps_ends(config: Mapping[str, Any]) -> bool:
    """Whether the balanced cut leaves both ends on one device: their skips are large and there is no attention."""
    return tuple(config.get("down_block_types", ()))[:1] == (_PLAIN,)


def _balanced(
    component: Component,
    stages: int,
    kind: str,
    sizes: Mapping[str, int],
    times: Mapping[str, float] | None,
    speeds: Sequence[float] | None,
) -> Cuts:
    plan = component.program()
    names = [layer.name for layer in plan.layers if not layer.embedding]
    weights = _weights(component, plan, kind, sizes, times)
    missing = [name for name in names if name not in weights]
    if missing:
        raise ConfigError(f"times: {len(missing)} layers have none, first {missing[0]}")
    ends = keeps_ends(component.config)
    known = {**component.smallest_sizes(), **sizes}
    before = balanced([weights[name] for name in names], _crossings(plan, names, known), stages, speeds, ends)
    order = tuple(range(stages))
    return Cuts(tuple(names[i - 1] for i in before), (stages - 1, *order) if ends else order)


def _weights(
    component: Component, plan: Program, kind: str, sizes: Mapping[str, int], times: Mapping[str, float] | None
) -> Mapping[str, float]:
    """What is to be spread evenly, by layer."""
    if kind == "memory":
        return {layer.name: sum(meta.nbytes for meta in held_by(component, layer)) for layer in plan.layers}
    if times is not None:
        return times
    return {name: each.macs for name, each in layer_costs(component, sizes).items()}


def _crossings(plan: Program, names: Sequence[str], sizes: Mapping[str, int]) -> list[Crossing]:
    steps = [layer for layer in plan.layers if layer.name in set(names)]
    readers: dict[str, list[int]] = {}
    for i, layer in enumerate(steps):
        for name in layer.reads:
            readers.setdefault(name, []).append(i)
    return [
        Crossing(i, tuple(readers[name]), plan.specs[name].nbytes(sizes, ON_THE_WIRE))
        for i, layer in enumerate(steps)
        for name in layer.writes
        if name in readers
    ]
