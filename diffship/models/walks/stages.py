"""Stages: a part cut at layer boundaries into components with explicit boundary tensors.

Run one after the other they compute what the whole computes. The references of a proof that is bounded in memory are
computed stage by stage; chunks and partitioned execution place stages in different files and on different devices. (A
finished graph has no blocks: `runtimes.proof.onnx_split` cuts it, into stretches.)
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffship.core.brief import brief
from diffship.core.errors import ConfigError, RunnerError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.weights import subset
from diffship.models.parts.component import Component
from diffship.models.parts.program import Layer, Program, Tree
from diffship.models.walks.blocks import end_of

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn import Module
else:
    nn, Module = lazy("torch.nn"), lazy_base("torch.nn", "Module")

Arrays = dict[str, NDArray[np.generic]]
STAGE_BYTES = 512 << 20


@brief
@dataclass(frozen=True)
class Stage(Component):
    """Some neighbouring `layers` of the part `parent`. Its inputs are the tensors that it reads from outside, its
    outputs those that are read after it, and outputs of the whole. A tensor keeps its name from the stage that writes
    it to all that read it. `over(inner)` builds the stage on the modules of `inner`, a whole that is loaded already."""

    parent: str = ""
    layers: tuple[str, ...] = ()
    over: Callable[[nn.Module], nn.Module] | None = field(default=None, repr=False, compare=False)


class StageModule(Module):
    """Holds only the modules of its layers, under their paths in the whole."""

    def __init__(self, inner: nn.Module, steps: Sequence[Layer], reads: Sequence[str], writes: Sequence[str]) -> None:
        super().__init__()
        self.inner = pick(inner, [path for step in steps for path in step.modules])
        self.steps = tuple(steps)
        self.reads = tuple(reads)
        self.writes = tuple(writes)

    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        values = dict(zip(self.reads, tensors, strict=True))
        tree = Tree(self.inner)
        for step in self.steps:
            written = step.apply(tree, *(values[name] for name in step.reads))
            values.update(zip(step.writes, written, strict=True))
        return tuple(values[name] for name in self.writes)


def cut(component: Component, at: Iterable[str], embed: str = "pass") -> list[Stage]:
    """Stages of `component`, cut after each named block (a name of models.walks.blocks, or one that encloses some).

    `embed="recompute"` gives every stage its own copy of the embeddings that it reads (`Layer.embedding`: that of the
    timestep) and the inputs for them, so that stages may stand at different timesteps; with `"pass"` the stage that has
    them hands them on as tensors (`time_embedding.out`).

    Raises:
        ConfigError: an unknown name or `embed`, or two cuts at one place.
    """
    if embed not in ("pass", "recompute"):
        raise ConfigError(f"embed is {embed!r}; legal: pass, recompute")
    whole = component.meta.get_submodule("inner")
    plan = component.program(whole)
    ends = sorted(end_of(name, plan.layers) for name in at)
    ends = [end for end in ends if end < len(plan.layers)]
    if len(set(ends)) != len(ends):
        raise ConfigError(f"two cuts of {component.name} fall on one place: {', '.join(at)}")
    return _stages(component, whole, plan, [0, *ends, len(plan.layers)], embed == "recompute")


def memory_stages(component: Component, max_bytes: int = STAGE_BYTES) -> list[Stage]:
    """The fewest stages, greedily, whose float32 weights stay under `max_bytes`; one layer at least.

    Raises:
        ConfigError: a single layer is larger.
    """
    whole = component.meta.get_submodule("inner")
    plan = component.program(whole)
    bounds, held = [0], 0
    for i, step in enumerate(plan.layers):
        stored = [value for path in step.modules for value in whole.get_submodule(path).state_dict().values()]
        size = 4 * sum(value.numel() for value in stored)
        if size > max_bytes:
            raise ConfigError(
                f"{component.name}: {step.name} alone takes {size} bytes in float32; {max_bytes} are allowed"
            )
        if held + size > max_bytes and i > bounds[-1]:
            bounds.append(i)
            held = 0
        held += size
    return _stages(component, whole, plan, [*bounds, len(plan.layers)], False)


def stages_forward(
    component: Component, feeds: Mapping[str, NDArray[np.generic]], max_bytes: int = STAGE_BYTES
) -> Arrays:
    """The outputs of the whole part in float32, with never more than `max_bytes` of its weights in memory."""
    values: Arrays = dict(feeds)
    stages = memory_stages(component, max_bytes)
    missing = [spec.name for spec in component.inputs if spec.name not in values]
    if missing:
        raise RunnerError(f"feeds of {component.name}: missing {', '.join(missing)}")
    wanted = [spec.name for spec in component.outputs]
    for i, stage in enumerate(stages):
        with stage.load() as runner:
            values.update(runner.run({spec.name: values[spec.name] for spec in stage.inputs}))
        later = {spec.name for after in stages[i + 1 :] for spec in after.inputs}
        values = {name: value for name, value in values.items() if name in later or name in wanted}
    return {name: values[name] for name in wanted}


def pick(root: nn.Module, paths: Iterable[str]) -> nn.Module:
    """A module that holds only the submodules at `paths`, under the same paths; they are shared, not copied."""
    chosen = nn.Module()
    for path in dict.fromkeys(paths):
        *above, leaf = path.split(".")
        owner = chosen
        for name in above:
            if name not in owner._modules:
                owner.add_module(name, nn.Module())
            owner = owner.get_submodule(name)
        owner.add_module(leaf, root.get_submodule(path))
    return chosen


def _stages(
    component: Component, whole: nn.Module, plan: Program, bounds: Sequence[int], recompute: bool
) -> list[Stage]:
    again = [step for step in plan.layers if recompute and step.embedding]
    stages = []
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
        steps = plan.layers[first:last]
        needed = {name for step in steps for name in step.reads}
        steps = (*(step for step in again if step not in steps and needed.intersection(step.writes)), *steps)
        after = [step for step in plan.layers[last:] if step not in again]
        stages.append(_stage(component, whole, plan, steps, after, i, again))
    return stages


def _stage(
    component: Component,
    whole: nn.Module,
    plan: Program,
    steps: tuple[Layer, ...],
    after: Sequence[Layer],
    index: int,
    again: Sequence[Layer],
) -> Stage:
    written = [name for step in steps for name in step.writes]
    reads = list(dict.fromkeys(name for step in steps for name in step.reads if name not in written))
    reads.sort(key=lambda name: plan.inputs.index(name) if name in plan.inputs else -1)
    needed = {name for step in after for name in step.reads} - {name for step in again for name in step.writes}
    needed |= set(plan.outputs)
    writes = [name for name in written if name in needed]
    paths = [path for step in steps for path in step.modules]
    prefixes = tuple(f"{path}." for path in paths)
    return Stage(
        name=f"{component.name}.{index}",
        class_name=component.class_name,
        config=component.config,
        build=partial(_build, component, steps, reads, writes),
        weights=subset(component.weights, [name for name in component.weights.names() if name.startswith(prefixes)]),
        inputs=tuple(plan.specs[name] for name in reads),
        outputs=tuple(plan.specs[name] for name in writes),
        smallest=component.smallest,
        template=partial(_template, whole, steps, reads, writes),
        walk=partial(_walk, Program(tuple(steps), plan.specs, tuple(reads), tuple(writes))),
        parent=component.name,
        layers=tuple(step.name for step in steps),
        over=partial(StageModule, steps=steps, reads=reads, writes=writes),
    )


def _walk(program: Program, component: Component, inner: nn.Module) -> Program:
    """The layers of a stage are some of the whole's, whatever tree they run on."""
    return program


def _build(component: Component, steps: Sequence[Layer], reads: Sequence[str], writes: Sequence[str]) -> nn.Module:
    return StageModule(component.build().get_submodule("inner"), steps, reads, writes)


def _template(whole: nn.Module, steps: Sequence[Layer], reads: Sequence[str], writes: Sequence[str]) -> nn.Module:
    # the copy keeps the shared whole on the meta device when the stage is filled
    return copy.deepcopy(StageModule(whole, steps, reads, writes)).eval()
