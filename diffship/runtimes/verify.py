"""verify: hash a bundle's files, then compute its golden vectors again on this machine, part by part."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from diffship.core.bundle import Bundle
from diffship.core.compare import Report, compare
from diffship.core.errors import BundleError, ConfigError, DiffshipError
from diffship.core.job import Progress, available_memory
from diffship.core.manifest import Golden, GoldenTrajectory, Part
from diffship.core.strict import unknown
from diffship.core.weights import SafetensorsWeights
from diffship.runtimes.engine import Engine, choose_engine, make_engine
from diffship.runtimes.shell import PartRunner, steps_of
from diffship.runtimes.stages import run_in_stages
from diffship.runtimes.suspects import Look
from diffship.runtimes.verify_trajectory import TrajectoryCheck, check_trajectory

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class PartCheck:
    """What verify found out about one part.

    status: "passed", "failed", or "unproven" where there is nothing to compare with. stages: how many pieces the part
    was run in (1 = whole). suspects: with `look`, the first stretch of the graph that computes something else, and the
    node in it.
    """

    part: str
    status: str
    precision: str
    seconds: float = 0.0
    stages: int = 0
    report: Report | None = None
    reason: str = ""
    suspects: tuple[str, ...] = ()

    def to_json(self) -> dict[str, object]:
        table: dict[str, object] = {name: getattr(self, name) for name in ("part", "status", "precision", "stages")}
        table["seconds"] = round(self.seconds, 3)
        table["report"] = None if self.report is None else self.report.to_json()
        return {**table, "reason": self.reason, "suspects": list(self.suspects)}

    def text(self) -> str:
        head = f"{self.part} ({self.precision}): {self.status}"
        if self.report is None:
            return f"{head}; {self.reason}"
        where = "" if self.stages <= 1 else f" in {self.stages} stages"
        lines = [f"{head}{where}, {self.seconds:.1f} s, {self.report.tolerance.text()}"]
        lines += [f"  {line}" for line in self.report.text().splitlines()]
        lines += [f"  {self.reason}"] if self.reason else []
        return "\n".join([*lines, *(f"  first suspect: {name}" for name in self.suspects)])


@dataclass(frozen=True)
class VerifyReport:
    """All of verify; `passed` only where the files are intact and every part is proved here."""

    bundle: str
    engine: str
    version: str
    files: int
    bytes: int
    checks: tuple[PartCheck, ...] = field(default=())
    damage: str = ""
    trajectory: TrajectoryCheck | None = None

    @property
    def passed(self) -> bool:
        drawn = self.trajectory is None or self.trajectory.status != "failed"
        proved = bool(self.checks) and all(check.status == "passed" for check in self.checks)
        return not self.damage and proved and drawn

    def named(self, status: str) -> tuple[str, ...]:
        """Parts of that status, and the trajectory where it is."""
        drawn = ("trajectory",) if self.trajectory is not None and self.trajectory.status == status else ()
        return (*(check.part for check in self.checks if check.status == status), *drawn)

    def to_json(self) -> dict[str, object]:
        return {
            "passed": self.passed,
            "bundle": self.bundle,
            "engine": self.engine,
            "version": self.version,
            "files": self.files,
            "bytes": self.bytes,
            "damage": self.damage,
            "parts": [check.to_json() for check in self.checks],
            "trajectory": None if self.trajectory is None else self.trajectory.to_json(),
        }

    def text(self) -> str:
        if self.damage:
            return f"{self.bundle}: DAMAGED. {self.damage}"
        lines = [f"{self.files} files, {self.bytes / 1e6:.1f} MB: hashes match"]
        lines += [check.text() for check in self.checks]
        lines += [] if self.trajectory is None else [self.trajectory.text()]
        failed, unproven = self.named("failed"), self.named("unproven")
        verdict = (
            f"FAILED: {', '.join(failed)}" if failed else f"UNPROVEN: {', '.join(unproven)}" if unproven else "passed"
        )
        return "\n".join([*lines, f"{self.engine} {self.version}: {verdict}"])


def verify(
    bundle: Bundle | str | os.PathLike[str],
    engine: str | None = None,
    *,
    parts: Iterable[str] | None = None,
    max_bytes: int | None = None,
    look: Look | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> VerifyReport:
    """Hashes first, then the golden vectors of each part with the manifest's tolerances, then the golden trajectory.

    max_bytes: memory that a part may take (default: three quarters of what is free); larger parts run stage by stage.
    look: finds the node at fault of a part that fails (`suspects.look_into`; `reduce.through_graphs` for plans).
    Options are the fields of the engine's class. A damaged bundle is in the report; one that cannot even be opened
    raises BundleError, an engine that is missing UnsupportedError.
    """
    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(Path(bundle))
    manifest = opened.manifest
    name = choose_engine(manifest.target, engine)
    chosen = make_engine(name, options)
    names = [part.name for part in manifest.parts]
    for asked in parts or ():
        if asked not in names:
            raise ConfigError(unknown("part", asked, names))
    chosen_parts = manifest.parts if parts is None else tuple(opened.part(part) for part in parts)
    if not chosen_parts:
        raise ConfigError(f"no part is chosen; this bundle has {', '.join(names)}")
    total = sum(record.size for record in manifest.files.values())
    head = (str(opened.path), name, chosen.probe().version, len(manifest.files), total)
    try:
        opened.verify()
    except BundleError as fault:
        return VerifyReport(*head, damage=str(fault))
    checks = []
    for index, part in enumerate(chosen_parts):
        if progress is not None:
            progress(f"verify {part.name}", index, len(chosen_parts))
        checks.append(check_part(opened, part, chosen, max_bytes, look))
    drawn = None
    if manifest.trajectory is not None and any(check.part == "unet" for check in checks):
        drawn = _drawn(opened, manifest.trajectory, chosen, checks, _budget() if max_bytes is None else max_bytes)
    return VerifyReport(*head, tuple(checks), trajectory=drawn)


def check_part(
    bundle: Bundle, part: Part, engine: Engine, max_bytes: int | None = None, look: Look | None = None
) -> PartCheck:
    """Run one part on its golden inputs and compare; an engine that fails is a failed check, with its words."""
    if part.golden is None:
        reason = "no golden vectors in the bundle: it was exported with --no-verify"
        return PartCheck(part.name, "unproven", part.precision, reason=reason)
    started = time.perf_counter()
    feeds, expected = read_golden(bundle, part.golden)
    budget = _budget() if max_bytes is None else max_bytes
    files = [bundle.file(name) for name in part.files]
    try:
        stages, outputs = _compute(bundle, part, engine, files, feeds, budget)
    except DiffshipError as fault:
        return PartCheck(part.name, "failed", part.precision, time.perf_counter() - started, reason=str(fault))
    report = compare(expected, outputs, part.golden.tolerance)
    seconds = time.perf_counter() - started
    check = PartCheck(part.name, "passed" if report.passed else "failed", part.precision, seconds, stages, report)
    return check if report.passed or look is None else _looked(check, lambda: look(bundle, part, engine, feeds))


def _looked(check: PartCheck, look: Callable[[], tuple[str, ...]]) -> PartCheck:
    try:
        return replace(check, suspects=look())
    except DiffshipError as fault:
        return replace(check, reason=str(fault))


def _drawn(
    bundle: Bundle, golden: GoldenTrajectory, engine: Engine, checks: Sequence[PartCheck], budget: int
) -> TrajectoryCheck:
    """Where the U-Net itself is wrong, its trajectory says nothing new."""
    if next(check for check in checks if check.part == "unet").status != "passed":
        return TrajectoryCheck("skipped", reason="the U-Net is not proved")
    return check_trajectory(bundle, golden, engine, budget)


def _compute(
    bundle: Bundle, part: Part, engine: Engine, files: list[Path], feeds: Arrays, budget: int
) -> tuple[int, Arrays]:
    size = sum(file.stat().st_size for file in files)
    if engine.gate_bytes(size, part.precision) > budget:
        return run_in_stages(part, files[0], engine, feeds, budget)
    with PartRunner(part, engine.open(files), steps_of(bundle, part)) as runner:
        return 1, runner.run(feeds)


def read_golden(bundle: Bundle, golden: Golden) -> tuple[Arrays, Arrays]:
    """Inputs and fp32 reference outputs by canonical name.

    Raises:
        BundleError: the file holds anything else.
    """
    weights = SafetensorsWeights(bundle.file(golden.file))
    sides: dict[str, Arrays] = {"in": {}, "out": {}}
    for name in weights.names():
        side, _, tensor = name.partition(".")
        if side not in sides or not tensor:
            raise BundleError(f"{golden.file}: {name[:80]!a} is neither in.NAME nor out.NAME")
        sides[side][tensor] = np.asarray(weights.read(name))
    if not sides["in"] or not sides["out"]:
        raise BundleError(f"{golden.file} holds no inputs or no outputs")
    return sides["in"], sides["out"]


def _budget() -> int:
    """Bytes that a part may take; where the system does not tell (macOS, Windows), every part is taken whole."""
    free = available_memory()
    return sys.maxsize if free is None else free * 3 // 4
