"""The golden trajectory of a bundle, drawn again on this machine: how far latents drift from step to step."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np

from diffship.core.brief import brief
from diffship.core.bundle import Bundle
from diffship.core.bundle_check import read_small
from diffship.core.compare import Report, compare
from diffship.core.errors import BundleError, DiffshipError, HandoffError
from diffship.core.limits import LIMITS
from diffship.core.manifest import GoldenTrajectory
from diffship.core.weights import SafetensorsWeights
from diffship.runtimes.engines.engine import Engine
from diffship.runtimes.engines.shell import PartRunner, steps_of
from diffship.sampling.generate import checked
from diffship.sampling.loop import latents_by_step, plain
from diffship.sampling.trajectory import Trajectory
from diffship.sampling.wire import unpack

Arrays = dict[str, np.ndarray]


@brief
@dataclass(frozen=True)
class TrajectoryCheck:
    """The golden trajectory drawn here. status: "passed", "failed", or "skipped" if `reason` says why.

    report: one output for each step that was drawn, `step.1` on.
    """

    status: str
    seconds: float = 0.0
    report: Report | None = None
    reason: str = ""

    def to_json(self) -> dict[str, object]:
        report = None if self.report is None else self.report.to_json()
        return {"status": self.status, "seconds": round(self.seconds, 3), "report": report, "reason": self.reason}

    def text(self) -> str:
        if self.report is None:
            return f"trajectory: {self.status}; {self.reason}"
        steps = ", ".join(f"{output.psnr_db:.1f}" for output in self.report.outputs)
        head = f"trajectory: {self.status}, {self.seconds:.1f} s, {self.report.tolerance.text()} at every step"
        lines = [head, f"  PSNR of the latents by step, dB: {steps}", *([f"  {self.reason}"] if self.reason else [])]
        return "\n".join(lines)


def check_trajectory(bundle: Bundle, golden: GoldenTrajectory, engine: Engine, max_bytes: int) -> TrajectoryCheck:
    """Draw the golden trajectory with the bundle's denoiser, and compare the latents after each call.

    Skipped if the denoiser does not fit `max_bytes` of memory whole, or if no engine of a CPU computes its graph.

    Raises:
        BundleError: its files hold anything else.
    """
    begun = time.perf_counter()
    trajectory, expected = read_trajectory(bundle, golden)
    kind = bundle.manifest.family.kind
    part = bundle.part(kind.denoiser)
    files = [bundle.file(name) for name in part.files]
    if files[0].suffix == ".onnx" and not part.format.on_cpu:
        return TrajectoryCheck(
            "skipped", reason=f"no engine here computes {part.precision}; the U-Net itself is proved"
        )
    if engine.gate_bytes(sum(file.stat().st_size for file in files), part.precision) > max_bytes:
        return TrajectoryCheck("skipped", reason=f"{part.name} does not fit memory whole; its stages are proved")
    try:
        with PartRunner(part, engine.open(files), steps_of(bundle, part)) as runner:
            found = latents_by_step(trajectory, checked(plain(runner, kind), part.name))
    except DiffshipError as fault:
        return TrajectoryCheck("failed", time.perf_counter() - begun, reason=str(fault))
    report = compare(expected, found, golden.tolerance)
    missed = next((output for output in report.outputs if not output.passed), None)
    reason = "" if missed is None else f"{missed.name}: {missed.reason}"
    return TrajectoryCheck("failed" if missed else "passed", time.perf_counter() - begun, report, reason)


def read_trajectory(bundle: Bundle, golden: GoldenTrajectory) -> tuple[Trajectory, Arrays]:
    """A trajectory at its start, and the fp32 latents after each of its calls (`step.1` on).

    Raises:
        BundleError: the files hold anything else.
    """
    try:
        trajectory = unpack(read_small(bundle.file(golden.start), LIMITS.trajectory_bytes, bundle.hard_links))
        trajectory.require_fit(bundle.manifest.family)
    except HandoffError as fault:
        raise BundleError(f"{golden.start}: {fault}") from None
    weights = SafetensorsWeights(bundle.file(golden.latents))
    names = [f"step.{step}" for step in range(1, trajectory.calls + 1)]
    if trajectory.step or trajectory.positive is None or sorted(weights.names()) != sorted(names):
        raise BundleError(f"{golden.start} and {golden.latents} are not a start and the latents after each step")
    return trajectory, {name: np.asarray(weights.read(name)) for name in names}
