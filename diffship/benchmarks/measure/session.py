"""Measure cases in rounds, one process each, and remember every one that finished, so that an interrupt loses one."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from diffship.benchmarks.measure.case import IMAGE, PROMPT, Bench, Case, cases_of, engine_of, label, sets
from diffship.benchmarks.measure.clock import told
from diffship.benchmarks.measure.machine import code_digest, environment, threads
from diffship.benchmarks.measure.materials import Materials, Order, read_materials, slug
from diffship.benchmarks.measure.peers.environments import isolated_path, peer_python
from diffship.benchmarks.measure.peers.table import PEERS
from diffship.benchmarks.measure.process import Measured, measure
from diffship.benchmarks.measure.turns import Job as Turn
from diffship.benchmarks.measure.turns import take_turns
from diffship.core.errors import DiffshipError, PeerError, UnsupportedError
from diffship.core.job import Job, available_memory
from diffship.core.registry import RUNNERS
from diffship.core.strict import load

Progress = Callable[[str, int, int], None]
CEILINGS = "ceilings"


@dataclass(frozen=True)
class Outcome:
    """One case in one round: the child's figures, or why there are none."""

    status: str
    seconds: float = 0.0
    peak_bytes: int = 0
    figures: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    place: tuple[int, ...] = ()  # round and set: those of one place took turns


@dataclass(frozen=True)
class Settings:
    """How to measure; `work` keeps materials and the journal, `root` is where peers' environments lie."""

    work: Path
    root: Path
    rounds: int = 3
    timeout: float = 3600
    memory_limit: int | None = None
    resume: bool = False
    install: bool = True


@dataclass(frozen=True)
class Measurement:
    """All rounds of all cases, by case, with what the cases were measured on."""

    outcomes: dict[Case, list[Outcome]]
    materials: dict[Case, Materials]
    ceilings: dict[str, float]


class Journal:
    """One JSON line per finished measurement, by key; a line that an interrupt cut short is not read."""

    def __init__(self, file: Path, resume: bool) -> None:
        self._file = file
        if not resume:
            file.unlink(missing_ok=True)
        self._known = dict(self._read()) if resume else {}

    def get(self, key: str) -> Outcome | None:
        return self._known.get(key)

    def put(self, key: str, outcome: Outcome) -> None:
        self._known[key] = outcome
        self._file.parent.mkdir(parents=True, exist_ok=True)
        with open(self._file, "a", encoding="utf-8") as stream:
            stream.write("\n" + json.dumps({"key": key, **asdict(outcome)}))
            stream.flush()
            os.fsync(stream.fileno())

    def _read(self) -> list[tuple[str, Outcome]]:
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        found = []
        for line in lines:
            try:
                entry = json.loads(line)
                found.append((str(entry.pop("key")), load(Outcome, entry, "journal")))
            except (ValueError, KeyError, AttributeError, DiffshipError):
                continue
        return found


class Session:
    """Measures benches under one set of settings."""

    def __init__(self, settings: Settings, progress: Progress | None = None) -> None:
        self._settings = settings
        self._progress = progress or (lambda label, done, total: None)
        self._journal = Journal(settings.work / "journal.jsonl", settings.resume)
        machine = {key: value for key, value in environment().items() if key != "commit"}
        self._context = {"code": code_digest(), "machine": machine, "limit": settings.memory_limit}
        self._pythons: dict[str, Path | Outcome] = {}
        self._exported: dict[tuple[str, str], Path | Outcome] = {}

    def measure(self, benches: Sequence[Bench]) -> Measurement:
        """Every case of every bench, `rounds` times; within a round, those that are compared take turns."""
        materials: dict[Case, Materials] = {}
        groups: list[list[list[Case]]] = []
        for bench in benches:
            made = {target: self._materials(bench, target) for target in bench.targets}
            parts = {target: tuple(found.parts) for target, found in made.items()}
            engines = {target: _engines(found) for target, found in made.items()}
            new = {case: made[case.target] for case in cases_of(bench, parts, engines) if case not in materials}
            materials |= new
            groups += [self._sets(bench, list(group), new) for _, group in groupby(new, lambda case: case.group)]
        cases = list(materials)
        outcomes: dict[Case, list[Outcome]] = {case: [] for case in cases}
        ceilings: list[dict[str, float]] = []
        done, total = 0, sum(map(len, groups)) * self._settings.rounds
        for turn in range(self._settings.rounds):
            ceilings.append(self._ceilings(turn, "cuda" if any(case.device == "cuda" for case in cases) else "cpu"))
            for place, members in ((place, members) for group in groups for place, members in enumerate(group)):
                self._progress(f"round {turn + 1}: {_together(members)}", done, total)
                for case, outcome in self._measured(members, (turn, place), materials).items():
                    outcomes[case].append(outcome)
                done += 1
        self._progress("measured", done, total)
        best = {key: max(found[key] for found in ceilings if key in found) for found in ceilings for key in found}
        return Measurement(outcomes, materials, best)

    def _materials(self, bench: Bench, target: str) -> Materials:
        """Raises what the preparing process says, before anything is measured."""
        wanted = dict.fromkeys(engine_of(runner)[0] for runner in bench.engines or RUNNERS)
        engines = tuple(name for name in wanted if _usable(name, bench.device))
        folder = "torch" in wanted or bool(bench.against)
        parts = tuple(name for name in bench.parts if name != IMAGE)
        order = Order(
            target=target,
            work=str(self._settings.work),
            size=bench.size,
            guidance=bench.guidance,
            precision=bench.precision,
            batches=bench.batches,
            parts=parts,
            engines=engines,
            folder=folder,
        )
        self._progress(f"prepare {target}", 0, 1)
        text = json.dumps(asdict(order))
        command = [sys.executable, "-m", "diffship.benchmarks.measure.materials", text]
        done = measure(command, self._settings.timeout, told(offline=False))  # a hub id is fetched here, if ever
        try:
            document = done.document()
        except ValueError:
            document = {"error": f"{target} cannot be prepared: {done.reason}"}
        found = read_materials(document)
        self._progress(f"prepare {target}", 1, 1)
        return found

    def _ceilings(self, turn: int, device: str) -> dict[str, float]:
        command = [sys.executable, "-m", "diffship.benchmarks.measure.child", json.dumps({CEILINGS: device})]
        done = measure(command, self._settings.timeout, told())
        return {name: float(str(value)) for name, value in done.document().items()} if done.code == 0 else {}

    def _sets(self, bench: Bench, cases: list[Case], materials: Mapping[Case, Materials]) -> list[list[Case]]:
        together = bench.together
        if os.name != "posix":  # turns are taken by pipes, which `select` knows on POSIX only
            together = 1
        elif not together:
            together = _fitting(materials[cases[0]]) if bench.device == "cpu" else 1
        return sets(cases, together)

    def _measured(
        self, cases: Sequence[Case], place: tuple[int, int], materials: Mapping[Case, Materials]
    ) -> dict[Case, Outcome]:
        """Outcomes of cases that take turns. What failed before is not tried again; what went well is only taken
        over if all of it was measured together."""
        context = {**self._context, "beside": [case.runner for case in cases], "set": place[1]}
        keys = {case: case.key(place[0], context) for case in cases}
        found = {case: known for case in cases if (known := self._journal.get(keys[case])) is not None}
        if len(found) < len(cases):
            jobs = self._jobs(cases, materials, found)
            measured = take_turns(list(jobs.values()), cases[0].calls, self._settings.timeout)
            for case, figures in zip(jobs, measured, strict=True):
                found[case] = _outcome(figures)
                self._journal.put(keys[case], found[case])
        return {case: replace(found[case], place=place) for case in cases}

    def _jobs(
        self, cases: Sequence[Case], materials: Mapping[Case, Materials], found: dict[Case, Outcome]
    ) -> dict[Case, Turn]:
        """The processes to start, none if only those are left that cannot be; `found` learns why."""
        jobs: dict[Case, Turn] = {}
        unknown = [case for case in cases if case not in found]
        for case in cases:
            if case in found and found[case].status != "ok":
                continue
            try:
                command, env = self._command(case, materials[case])
                jobs[case] = Turn(command, {**told(), **env}, self._settings.memory_limit)
            except PeerError as fault:
                found[case] = Outcome("missing", reason=str(fault))  # not kept: it may be there the next time
            except DiffshipError as fault:
                found[case] = Outcome("unsupported", reason=str(fault))
        return jobs if any(case in jobs for case in unknown) else {}

    def _command(self, case: Case, materials: Materials) -> tuple[list[str], dict[str, str]]:
        """The child's command line. Raises PeerError or UnsupportedError if this case cannot be run at all."""
        order: dict[str, Any] = {
            "case": asdict(case),
            "folder": materials.folder,
            "bundle": materials.bundles.get(engine_of(case.runner)[0]),
            "feeds": materials.feeds.get(case.part, {}).get(str(case.batch)),
            "size": materials.size,
            "prompt": PROMPT,
            "threads": threads(),
        }
        if case.part != IMAGE and order["feeds"] is None:
            raise UnsupportedError(f"{label(case.target)} has no part {case.part}")
        if case.runner not in PEERS:
            _require_engine(case, materials)
            return [sys.executable, "-m", "diffship.benchmarks.measure.child", json.dumps(order)], {}
        peer = PEERS[case.runner]
        python = self._python(case.runner)
        if materials.folder is None:  # peers always make one of a source
            raise UnsupportedError(
                f"{case.runner} needs the source's weights; {label(case.target)} is a bundle: bench the source"
            )
        if case.part != IMAGE and not peer.parts:
            raise UnsupportedError(f"{case.runner} has no calls for single parts; it draws whole images")
        if peer.cli:
            order["exported"] = str(self._export(case, materials.folder, python))
        path = {"PYTHONPATH": str(isolated_path(self._settings.work / "peer-path"))}
        return [str(python), "-m", peer.child, json.dumps(order)], path if peer.then else {}

    def _python(self, name: str) -> Path:
        """Found or made once; a failure is kept, so that it is not tried for every case."""
        if name not in self._pythons:
            self._progress(f"environment of {name}", 0, 1)
            try:
                self._pythons[name] = peer_python(name, self._settings.root, self._settings.install)
            except PeerError as fault:
                self._pythons[name] = Outcome("missing", reason=str(fault))
            self._progress(f"environment of {name}", 1, 1)
        return _or_raise(self._pythons[name], PeerError)

    def _export(self, case: Case, folder: str, python: Path) -> Path:
        """What the peer's own exporter makes of the folder, kept in the work folder."""
        key = (case.target, case.runner)
        if key not in self._exported:
            if case.precision != "fp32":
                raise UnsupportedError(f"{case.runner} is exported in fp32 here; {case.precision} was asked for")
            self._exported[key] = self._exported_now(case, folder, python)
        return _or_raise(self._exported[key], UnsupportedError)

    def _exported_now(self, case: Case, folder: str, python: Path) -> Path | Outcome:
        def make(out: Path) -> None:
            words = [word.format(folder=folder, out=out) for word in PEERS[case.runner].cli]
            command = [str(python.parent / "optimum-cli"), *words]
            self._progress(f"{case.runner} exports {case.target}", 0, 1)
            done = measure(command, self._settings.timeout, told(), self._settings.memory_limit)
            self._progress(f"{case.runner} exports {case.target}", 1, 1)
            if done.code:
                raise UnsupportedError(f"its export of {label(case.target)} is {done.status}: {done.reason}")

        try:
            name = f"{case.runner}-{Path(folder).name}"
            return Job(self._settings.work / slug(case.target)).once(name, make)
        except UnsupportedError as fault:
            return Outcome("unsupported", reason=str(fault))


def _engines(materials: Materials) -> tuple[str, ...]:
    """Our installed runners that can run the target."""
    from diffship.runtimes.engines.engine import engine_class

    able = [name for name in RUNNERS if _runs(name, materials) and engine_class(name).probe().available]
    return tuple(able)


def _runs(engine: str, materials: Materials) -> bool:
    return materials.folder is not None if engine == "torch" else engine in materials.bundles


def _usable(engine: str, device: str) -> bool:
    """Whether that engine computes on such a device, and is there at all."""
    from diffship.runtimes.engines.engine import engine_class

    found = engine_class(engine)
    return device in found.__dataclass_fields__["device"].metadata["choices"] and bool(found.probe().available)


def _together(cases: Sequence[Case]) -> str:
    """`emoji / unet: onnxruntime, openvino`."""
    return f"{cases[0].subject}{''.join(f', {case.runner}' for case in cases[1:])}"


def _fitting(materials: Materials) -> int:
    """How many processes with this model surely fit in memory: one takes up to 2.9 times its files (SD1.5)."""
    free = available_memory()
    size = sum(max(part["file_bytes"].values(), default=0) for part in materials.parts.values())
    return 1 if free is None else max(1, min(64, int(free / (3 * size + (1 << 29)))))


def _require_engine(case: Case, materials: Materials) -> None:
    from diffship.runtimes.engines.engine import engine_class, make_engine

    engine, options = engine_of(case.runner)
    probe = engine_class(engine).probe()
    if not probe.available:
        raise PeerError(f"{probe.reason}. Run: {probe.install}")
    make_engine(engine, {"device": case.device} | options)
    if not _runs(engine, materials):
        reason = materials.refused.get(engine, "")
        raise UnsupportedError(reason or f"engine {engine} does not run {label(case.target)} on {case.device}")


def _or_raise(found: Path | Outcome, error: type[DiffshipError]) -> Path:
    if isinstance(found, Outcome):
        raise error(found.reason)
    return found


def _outcome(measured: Measured) -> Outcome:
    try:
        figures = measured.document() if measured.code == 0 else {}
    except ValueError:
        measured = replace(measured, code=1)
        figures = {}
    return Outcome(measured.status, measured.seconds, measured.peak_bytes, figures, measured.reason)
