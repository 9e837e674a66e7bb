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

from diffship.core.brief import brief
from diffship.core.bundle import Bundle
from diffship.core.compare import Report, compare
from diffship.core.errors import BundleError, ConfigError, DiffshipError, ParityError
from diffship.core.job import Progress, available_memory
from diffship.core.manifest import Golden, GoldenTrajectory, Part
from diffship.core.spec import first_sample
from diffship.core.strict import unknown
from diffship.core.weights import SafetensorsWeights
from diffship.runtimes.engines.engine import Engine, choose_engine, make_engine
from diffship.runtimes.engines.shell import PartRunner, steps_of
from diffship.runtimes.proof.blocks import BlockCheck, check_blocks
from diffship.runtimes.proof.quality import FULL, quality
from diffship.runtimes.proof.stages import run_in_stages
from diffship.runtimes.proof.suspects import Look
from diffship.runtimes.proof.verify_trajectory import TrajectoryCheck, check_trajectory

Arrays = dict[str, np.ndarray]


@brief
@dataclass(frozen=True)
class PartCheck:
    """What verify found out about one part.

    status: "passed", "failed", or "unproven" if there is nothing to compare with. stages: how many pieces the part
    was run in (1 = whole). report: outputs of the whole part, `NAME` or, of several calls, `NAME, call K` and
    `NAME, one sample`. blocks: what was found inside it. note: why the proof is weaker than it could be. suspects: with
    `look`, the first stretch of the graph that computes something else, and the node in it. quality: of packed weights,
    how far the outputs are from those of the true weights; it never fails.
    """

    part: str
    status: str
    precision: str
    seconds: float = 0.0
    stages: int = 0
    report: Report | None = None
    blocks: tuple[BlockCheck, ...] = ()
    reason: str = ""
    note: str = ""
    suspects: tuple[str, ...] = ()
    quality: Report | None = None

    def require(self, what: str) -> None:
        """Raises Refused, with the figures of what is worst, unless all of it passed."""
        try:
            self._require(what)
        except ParityError as fault:
            raise Refused(str(fault), self) from None

    def _require(self, what: str) -> None:
        for block in self.blocks:
            if not block.passed:
                raise ParityError(f"{what} does not compute the same: {block.text().removeprefix('FAIL ')}")
        if self.report is None:
            raise ParityError(f"{what} could not be proved: {self.reason}")
        self.report.require(what)

    def to_json(self) -> dict[str, object]:
        table: dict[str, object] = {name: getattr(self, name) for name in ("part", "status", "precision", "stages")}
        table["seconds"] = round(self.seconds, 3)
        table["report"] = None if self.report is None else self.report.to_json()
        table["blocks"] = [block.to_json() for block in self.blocks]
        table["quality"] = None if self.quality is None else self.quality.to_json()
        return {**table, "reason": self.reason, "note": self.note, "suspects": list(self.suspects)}

    def text(self) -> str:
        head = f"{self.part} ({self.precision}): {self.status}"
        if self.report is None and not self.blocks:
            return f"{head}; {self.reason}"
        where = "" if self.stages <= 1 else f" in {self.stages} stages"
        lines = [f"{head}{where}, {self.seconds:.1f} s"]
        lines += [f"  {block.text()}" for block in self.blocks]
        if self.report is not None:
            lines += [f"  whole: {self.report.tolerance.text()}"]
            lines += [f"  {line}" for line in self.report.text().splitlines()]
        if self.quality is not None:
            worst = self.quality.worst
            lines += [f"  quality: {worst.psnr_db:.1f} dB to fp32 with the true weights ({worst.name})"]
        lines += [f"  {line}" for line in (self.reason, self.note) if line]
        return "\n".join([*lines, *(f"  first suspect: {name}" for name in self.suspects)])


class Refused(ParityError):
    """A part did not pass; `check` has all that was found."""

    def __init__(self, text: str, check: PartCheck) -> None:
        super().__init__(text)
        self.check = check


@brief
@dataclass(frozen=True)
class VerifyReport:
    """All of verify; `passed` only if the files are intact and every part is proved here."""

    bundle: str
    engine: str
    version: str
    files: int
    bytes: int
    checks: tuple[PartCheck, ...] = field(default=())
    damage: str = ""
    trajectory: TrajectoryCheck | None = None
    notes: tuple[str, ...] = ()  # of what was passed over beside the bundle's files

    @property
    def passed(self) -> bool:
        drawn = self.trajectory is None or self.trajectory.status != "failed"
        proved = bool(self.checks) and all(check.status == "passed" for check in self.checks)
        return not self.damage and proved and drawn

    def named(self, status: str) -> tuple[str, ...]:
        """Parts of that status, and the trajectory if it is."""
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
            "notes": list(self.notes),
            "parts": [check.to_json() for check in self.checks],
            "trajectory": None if self.trajectory is None else self.trajectory.to_json(),
        }

    def text(self) -> str:
        if self.damage:
            return f"{self.bundle}: DAMAGED. {self.damage}"
        lines = [f"{self.files} files, {self.bytes / 1e6:.1f} MB: hashes match", *self.notes]
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
    """Check a bundle on this machine: hashes first, then each part's golden vectors with the manifest's tolerances,
    then the golden trajectory.

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
    wanted = names if parts is None else list(parts)
    for asked in wanted:
        if asked not in names:
            raise ConfigError(unknown("part", asked, names))
    chosen_parts = tuple(opened.part(part) for part in wanted)
    if not chosen_parts:
        raise ConfigError(f"no part is chosen; this bundle has {', '.join(names)}")
    total = sum(record.size for record in manifest.files.values())
    head = (str(opened.path), name, chosen.probe().version, len(manifest.files), total)
    try:
        notes = opened.verify()
    except BundleError as fault:
        return VerifyReport(*head, damage=str(fault))
    checks = []
    for index, part in enumerate(chosen_parts):
        if progress is not None:
            progress(f"verify {part.name}", index, len(chosen_parts))
        checks.append(check_part(opened, part, chosen, max_bytes, look))
    drawn = None
    denoiser = manifest.family.kind.denoiser
    if manifest.trajectory is not None and any(check.part == denoiser for check in checks):
        drawn = _drawn(opened, manifest.trajectory, chosen, checks, _budget() if max_bytes is None else max_bytes)
    return VerifyReport(*head, tuple(checks), trajectory=drawn, notes=notes)


def check_part(
    bundle: Bundle, part: Part, engine: Engine, max_bytes: int | None = None, look: Look | None = None
) -> PartCheck:
    """Prove one part: its blocks if the engine takes a graph that can be cut, then the whole on its golden inputs.

    An engine that fails is a failed check, with its words.
    """
    if part.golden is None:
        reason = "no golden vectors in the bundle: it was exported with --no-verify"
        return PartCheck(part.name, "unproven", part.precision, reason=reason)
    started = time.perf_counter()
    calls = read_golden(bundle, part.golden)
    budget = _budget() if max_bytes is None else max_bytes
    blocks: tuple[BlockCheck, ...] = ()
    try:
        if part.golden.blocks is not None:
            blocks = check_blocks(bundle, part, engine, budget)
        if part.golden.blocks is not None:
            calls += _alone(part, *calls[0])
        stages, outputs = _compute(bundle, part, engine, [feeds for feeds, _ in calls], budget)
    except DiffshipError as fault:
        spent = time.perf_counter() - started
        return PartCheck(part.name, "failed", part.precision, spent, blocks=blocks, reason=str(fault))
    report = _whole(part.golden, [expected for _, expected in calls], outputs)
    passed = report.passed and all(block.passed for block in blocks)
    seconds = time.perf_counter() - started
    status = "passed" if passed else "failed"
    check = PartCheck(part.name, status, part.precision, seconds, stages, report, blocks, note=weakness(bundle, part))
    check = replace(check, quality=quality(bundle, part.golden, outputs))
    feeds = calls[0][0]
    return check if passed or look is None else _looked(check, lambda: look(bundle, part, engine, feeds))


def _alone(part: Part, feeds: Arrays, expected: Arrays) -> list[tuple[Arrays, Arrays]]:
    """A further call with the first sample of a call alone, which fails if a graph has a fixed number of samples."""
    alone = first_sample(part.inputs, feeds)
    return [] if alone is None else [(alone, {name: array[:1] for name, array in expected.items()})]


def _whole(golden: Golden, expected: Sequence[Arrays], outputs: Sequence[Arrays]) -> Report:
    """The outputs of all calls in one report; the call beyond those of the bundle is of one sample."""
    if len(expected) == 1:
        return compare(expected[0], outputs[0], golden.outputs or golden.tolerance)

    def label(name: str, call: int) -> str:
        return f"{name}, call {call + 1}" if call < golden.calls else f"{name}, one sample"

    sides = [{label(n, k): a for k, one in enumerate(side) for n, a in one.items()} for side in (expected, outputs)]
    limits = {label(n, k): limit for k in range(len(expected)) for n, limit in golden.outputs.items()}
    return compare(sides[0], sides[1], limits)


def weakness(bundle: Bundle, part: Part) -> str:
    """`""`, or what makes the proof of a part weaker than that of a graph which is cut."""
    if part.golden is None or part.golden.blocks is not None:
        return ""
    if not part.golden.outputs:
        return (
            "weaker proof: made by an older diffship, of whole parts with assumed tolerances. "
            "Export again to prove it block by block"
        )
    cut = bundle.manifest.target == "onnx"
    why = "the bundle has no references inside it" if cut else "this engine cannot be cut"
    return f"proved as a whole: {why}, so a fault that its output hides is not seen"


def _looked(check: PartCheck, look: Callable[[], tuple[str, ...]]) -> PartCheck:
    try:
        return replace(check, suspects=look())
    except DiffshipError as fault:
        return replace(check, reason=str(fault))


def _drawn(
    bundle: Bundle, golden: GoldenTrajectory, engine: Engine, checks: Sequence[PartCheck], budget: int
) -> TrajectoryCheck:
    """The golden trajectory drawn here. It is skipped if the denoiser itself failed, as it would tell nothing new."""
    part = bundle.manifest.family.kind.denoiser
    if next(check for check in checks if check.part == part).status != "passed":
        return TrajectoryCheck("skipped", reason=f"{part} is not proved")
    return check_trajectory(bundle, golden, engine, budget)


def _compute(
    bundle: Bundle, part: Part, engine: Engine, calls: Sequence[Arrays], budget: int
) -> tuple[int, list[Arrays]]:
    files = [bundle.file(name) for name in part.files]
    widen = files[0].suffix == ".onnx" and not part.format.on_cpu
    size = sum(file.stat().st_size for file in files)
    if widen or engine.gate_bytes(size, part.precision) > budget:
        return run_in_stages(part, files[0], engine, calls, budget, widen)
    with PartRunner(part, engine.open(files), steps_of(bundle, part)) as runner:
        return 1, [runner.run(feeds) for feeds in calls]


def read_golden(bundle: Bundle, golden: Golden) -> list[tuple[Arrays, Arrays]]:
    """(inputs, reference outputs) of each golden call, by canonical name; what `quality` reads is left out.

    Raises:
        BundleError: the file holds anything else.
    """
    weights = SafetensorsWeights(bundle.file(golden.file))
    calls: list[dict[str, Arrays]] = [{"in": {}, "out": {}} for _ in range(golden.calls)]
    for name in weights.names():
        index, side, tensor = _place(name, golden)
        if side == FULL and golden.outputs:
            continue
        if index >= len(calls) or side not in calls[0] or not tensor:
            raise BundleError(f"{golden.file}: {name[:80]!a} is neither in.NAME nor out.NAME of a call")
        calls[index][side][tensor] = np.asarray(weights.read(name))
    if not all(call["in"] and call["out"] for call in calls):
        raise BundleError(f"{golden.file} holds no inputs or no outputs")
    return [(call["in"], call["out"]) for call in calls]


def _place(name: str, golden: Golden) -> tuple[int, str, str]:
    """(call, side, tensor) of `K.in.NAME`, or of `in.NAME` in bundles of schema 1."""
    index, _, rest = name.partition(".") if golden.outputs else ("0", "", name)
    side, _, tensor = rest.partition(".")
    return (int(index) if index.isascii() and index.isdigit() and len(index) < 4 else sys.maxsize), side, tensor


def _budget() -> int:
    """Bytes that a part may take; if the system does not tell (macOS, Windows), every part is taken whole."""
    free = available_memory()
    return sys.maxsize if free is None else free * 3 // 4
