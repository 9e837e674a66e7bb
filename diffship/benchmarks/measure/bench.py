"""Measure a suite from beginning to end: cases and exports, as one Results."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffship.benchmarks.measure import exports
from diffship.benchmarks.measure.case import Bench, label
from diffship.benchmarks.measure.figures import rows_of
from diffship.benchmarks.measure.machine import code_digest, environment
from diffship.benchmarks.measure.materials import slug
from diffship.benchmarks.measure.peers.environments import peer_python, versions
from diffship.benchmarks.measure.peers.table import PEERS
from diffship.benchmarks.measure.record import Results, code_of, runners
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.measure.session import Journal, Outcome, Progress, Session, Settings
from diffship.benchmarks.measure.suite import ExportBench, Suite
from diffship.core.errors import PeerError
from diffship.core.quiet import timing
from diffship.core.strict import plain


def run_suite(suite: Suite, command: str, settings: Settings, progress: Progress | None = None) -> Results:
    """Every bench and export of a suite.

    Raises:
        BusyError: a training runs here, or something else is timed.
        DiffshipError: a target cannot be prepared. What cannot run, is not installed or runs out of memory is a row.
    """
    rows: list[Row] = []
    with timing(suite.name):
        if suite.benches:
            rows += rows_of(Session(settings, progress).measure(suite.benches), suite.name)
        for export in suite.exports:
            rows += _export_rows(export, settings, progress or (lambda label, done, total: None))
    facts = {"rounds": settings.rounds, "memory_limit": settings.memory_limit, **asked(suite)}
    env = environment() | {"peers": _peer_versions(suite.benches, settings.root)}
    return Results(suite.name, command, code_of(suite.name, runners(rows)), env, facts, tuple(rows))


def asked(suite: Suite) -> dict[str, Any]:
    """What a suite asks for, as its results file keeps it: another question makes the answers stale."""
    return {
        "title": suite.title,
        "bench": [{**plain(bench), "targets": [label(name) for name in bench.targets]} for bench in suite.benches],
        "export": [plain(export) for export in suite.exports],
    }


def _export_rows(export: ExportBench, settings: Settings, progress: Progress) -> list[Row]:
    folder = settings.work / slug(export.source)
    exports.save_source(export.source, folder / "source")
    cli, rows = None, []
    for name in export.against:
        try:
            cli = str(peer_python(name, settings.root, settings.install).parent / "optimum-cli")
        except PeerError as fault:
            conditions = {"model": export.source, "runner": exports.PEER, "part": "export"}
            row = Row(exports.SUITE, exports.PEER, "export_seconds", None, "s", "missing", reason=str(fault))
            rows.append(Row(**{**asdict(row), "conditions": conditions}))
    journal = Journal(settings.work / "exports.jsonl", settings.resume)
    for run in exports.runs_of(folder / "source", folder, export.precision, cli):
        progress(f"{run.subject} exports {export.source}", 0, 1)
        rows += _once(journal, run, export, settings.timeout)
        progress(f"{run.subject} exports {export.source}", 1, 1)
    return rows


def _once(journal: Journal, run: exports.ExportRun, export: ExportBench, timeout: float) -> list[Row]:
    machine = {key: value for key, value in environment().items() if key != "commit"}
    text = json.dumps([plain(export), run.subject, code_digest(), machine], sort_keys=True)
    key = hashlib.sha256(text.encode()).hexdigest()
    known = journal.get(key)
    if known is None:
        rows = exports.export_rows(run, export.source, export.precision, timeout)
        known = Outcome("ok", figures={"rows": [row.to_json() for row in rows]})
        journal.put(key, known)
    return [Row.from_json(row) for row in known.figures["rows"]]


def _peer_versions(benches: Sequence[Bench], root: Path) -> dict[str, dict[str, str]]:
    """Installed versions of the peers that have an environment of their own."""
    found = {}
    for name in sorted({name for bench in benches for name in bench.against}):
        peer = PEERS[name]
        try:
            python = peer_python(name, root, install=False)
        except PeerError:
            continue
        if peer.then:
            found[name] = versions(python, (*peer.first, *peer.then))
    return found
