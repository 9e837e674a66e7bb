"""A part run in stretches, one in memory at a time: for parts that do not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from diffship.core.errors import RunnerError
from diffship.core.leftovers import temporary_folder
from diffship.core.manifest import Part
from diffship.runtimes.engines.arrays import as_dtype
from diffship.runtimes.engines.engine import Engine, Opener
from diffship.runtimes.engines.shell import PartRunner
from diffship.runtimes.proof.onnx_split import SplitStage, split

Arrays = dict[str, np.ndarray]


def run_in_stages(
    part: Part, model: Path, engine: Engine, calls: Sequence[Arrays], budget: int, widen: bool = False
) -> tuple[int, list[Arrays]]:
    """(number of stages, outputs of each call by canonical name) with at most one stage loaded.

    widen: compute in float32, whatever the precision of the graph.

    Raises:
        RunnerError: a single stage does not fit `budget` bytes, or the engine refuses it.
    """
    with temporary_folder("stages") as folder:
        size = stage_bytes(engine, "fp32" if widen else part.precision, budget)
        stages = split(model, size // 2 if widen else size, folder, widen=widen)
        with PartRunner(part, _Chain(part, stages, engine)) as runner:
            return len(stages), [runner.run(feeds) for feeds in calls]


def stage_bytes(engine: Engine, precision: str, budget: int) -> int:
    """Bytes of weights that a stage may have, so that running it takes at most `budget` bytes of memory.

    Raises:
        RunnerError: the budget is too small for any stage.
    """
    fixed = engine.gate_bytes(0, precision)
    growth = (engine.gate_bytes(1 << 30, precision) - fixed) / (1 << 30)
    if budget <= fixed:
        raise RunnerError(f"a stage needs at least {fixed} bytes of memory; {budget} are allowed")
    return int((budget - fixed) / growth)


class _Chain:
    """A Session made of stages that are opened, run and closed one after the other."""

    def __init__(self, part: Part, stages: Sequence[SplitStage], engine: Engine) -> None:
        self._stages = stages
        self._engine = engine
        natives = {binding.canonical: (binding.native, binding.dtype) for binding in part.bindings}
        self.inputs: Mapping[str, str] = dict(natives.get(spec.name, (spec.name, spec.dtype)) for spec in part.inputs)
        self.outputs: Mapping[str, str] = dict(natives.get(spec.name, (spec.name, spec.dtype)) for spec in part.outputs)

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        values: Arrays = dict(feeds)
        for index, stage in enumerate(self._stages):
            values.update(run_stage(self._engine, stage, values))
            needed = {name for later in self._stages[index + 1 :] for name in later.inputs} | set(outputs)
            values = {name: array for name, array in values.items() if name in needed}
        return [values[name] for name in outputs]

    def keep(self, array: np.ndarray) -> Any:
        return array

    def close(self) -> None:
        """Nothing stays open between calls."""


def run_stage(engine: Opener, stage: SplitStage, values: Mapping[str, np.ndarray]) -> Arrays:
    """What one stretch makes of `values`, which hold what earlier ones made."""
    path = stage.path  # writes the stretch; its folder holds nothing else
    session = engine.open([path, *(file for file in sorted(path.parent.iterdir()) if file != path)])
    try:
        feeds = {name: as_dtype(name, values[name], dtype) for name, dtype in session.inputs.items()}
        return dict(zip(stage.outputs, session.run(feeds, list(stage.outputs)), strict=True))
    finally:
        session.close()
