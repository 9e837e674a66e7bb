"""A plan of the double on disk, with everything around it, and a check that nothing is left behind."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cuda_double import Cuda
from tensorrt_double import Trt, plan_bytes

from diffship.core.strict import load
from diffship.runtimes.engines.tensorrt import TensorRtRunner
from diffship.runtimes.engines.tensorrt.session import TensorRtSession
from diffship.targets.tensorrt.plan import PlanFacts, PlanInput, PlanOutput

VERSION = "1.7.1.116"
both = pytest.mark.parametrize("flavour", ["rtx", "trt"])
SMALL = {"sample": ([1, 4, 8, 8], [2, 4, 16, 16], [4, 4, 32, 32]), "states": ([1, 2, 8], [2, 5, 8], [4, 9, 8])}
LARGE = {"sample": ([1, 4, 32, 32], [2, 4, 64, 64], [4, 4, 64, 64]), "states": ([1, 2, 8], [2, 5, 8], [4, 9, 8])}
WEIGHTS = {"scale": ("float16", (1, 4, 1, 1)), "shift": ("float16", (1, 4, 1, 1))}


def ranges(profiles: tuple[Any, ...], name: str) -> list[Any]:
    if name == "timestep":
        return [[shape[:1] for shape in profile["sample"]] for profile in profiles]
    return [list(profile["states" if name == "encoder_hidden_states" else "sample"]) for profile in profiles]


def told_ranges(profiles: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    """As the metadata says it."""
    kinds = ("min", "opt", "max")
    return tuple({kind: [*shape] for kind, shape in zip(kinds, each, strict=True)} for each in ranges(profiles, name))


class Rig:
    """What a test needs: `open` gives a session over a plan that `plan` wrote."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cuda = Cuda()
        self.rtx = Trt("tensorrt_rtx", VERSION, self.cuda)
        self.trt = Trt("tensorrt", "11.1.0.5", self.cuda)
        self.folder = folder / "unet"
        self.folder.mkdir()
        self.sessions: list[TensorRtSession] = []
        for module in (self.cuda, self.rtx, self.trt):
            monkeypatch.setitem(sys.modules, module.__name__, module)

    def library(self, flavour: str) -> Trt:
        return self.rtx if flavour == "rtx" else self.trt

    def plan(
        self, flavour: str = "trt", dtype: str = "float16", profiles: tuple[Any, ...] = (SMALL, LARGE), **changes: Any
    ) -> list[Path]:
        """Plan and metadata; `changes` of the double's words, or (with `facts`) of the metadata alone."""
        told = changes.pop("facts", {})
        refit = changes.pop("refit", False)
        names = {"sample": dtype, "timestep": "float32", "encoder_hidden_states": dtype}
        weights = {name: {"dtype": code, "shape": list(shape)} for name, (code, shape) in WEIGHTS.items()}
        words = {
            "inputs": {name: {"dtype": code, "profiles": ranges(profiles, name)} for name, code in names.items()},
            "outputs": {"out_sample": {"dtype": dtype, "profiles": ranges(profiles, "sample")}},
            "weights": weights,
        }
        inputs = {name: PlanInput(code, told_ranges(profiles, name)) for name, code in names.items()}
        outputs = {"out_sample": PlanOutput(dtype)}
        stripped = changes.get("stripped", False)
        version = self.library(flavour).__version__
        facts = PlanFacts(flavour, version, "fp16", inputs, outputs, (89, 120), refit, stripped)
        data = {**facts.to_json(), **({"weights": weights} if refit else {}), **told}
        plan, beside = self.folder / "model.plan", self.folder / "model.json"
        plan.write_bytes(plan_bytes(**words | changes))
        beside.write_text(json.dumps(data))
        return [plan, beside]

    def open(self, files: list[Path] | None = None, **options: Any) -> TensorRtSession:
        session = load(TensorRtRunner, options, "engine").open(files or self.plan())
        self.sessions.append(session)
        return session

    def count(self, name: str) -> int:
        return self.cuda.counts.get(name, 0)

    def check_nothing_left(self) -> None:
        for session in self.sessions:
            session.close()
        self.sessions.clear()
        if self.cuda.memory or self.rtx.engines or self.trt.engines:
            gc.collect()  # of cycles only: with torch loaded it takes half a second
        assert self.cuda.violations == [], self.cuda.violations
        kinds = [kind for kind, _ in self.cuda.memory.values()]
        left = kinds, self.cuda.streams, self.cuda.graphs
        assert left == ([], {}, 0), left
        assert not [*self.rtx.engines, *self.trt.engines], "an engine is still there"


def feeds(
    batch: int = 2, size: int = 16, seed: int = 0, states: int = 5, dtype: Any = np.float16
) -> dict[str, np.ndarray]:
    """Small sixteenths, so that half precision is exact."""
    draw = np.random.default_rng(seed)
    return {
        "sample": (draw.integers(-64, 64, (batch, 4, size, size)) / 16).astype(dtype),
        "timestep": (draw.integers(0, 8, batch) * 125).astype(np.float32),
        "encoder_hidden_states": np.full((batch, states, 8), draw.integers(-8, 8) / 8, dtype),
    }


def right(values: dict[str, Any], scale: Any = 2.0, shift: Any = 0.0) -> np.ndarray:
    """What the double computes, written down a second time."""
    states = values["encoder_hidden_states"].astype(np.float64).mean((1, 2))
    rows = values["timestep"].astype(np.float64) / 1000 + states
    return np.asarray(scale * values["sample"].astype(np.float64) + shift + rows[:, None, None, None])


def call(session: TensorRtSession, values: dict[str, Any]) -> np.ndarray:
    (result,) = session.run(values, ["out_sample"])
    return result


def ok(session: TensorRtSession, values: dict[str, Any], **weights: Any) -> None:
    np.testing.assert_array_equal(call(session, values).astype(np.float64), right(values, **weights))
