"""One mutant, or one sound export, sent through the proof: `export` for modules, `verify` for edited bundles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from diffship.benchmarks.studies.mutation.files import edited_bundle
from diffship.benchmarks.studies.mutation.modules import spoils_weights, spoilt
from diffship.benchmarks.studies.mutation.mutant import Mutant, Outcome
from diffship.core.bundle import Bundle
from diffship.core.errors import DiffshipError, ParityError, UnsupportedError
from diffship.core.job import Job
from diffship.core.leftovers import temporary_folder
from diffship.core.manifest import Part
from diffship.export import export
from diffship.models.pipeline import Pipeline
from diffship.runtimes.proof.verify import PartCheck, Refused, verify

CAUGHT, SURVIVED, NOT_OPENED, NOT_MADE = "caught", "survived", "not opened", "not made"
ALARM, CLEAN = "alarm", "clean"
_REASON = 200
# words of a check that could not compare figures, although the engine took the file
_TOLD = {"the graph has no tensor": "points", "NaN": "whole", "infinite": "whole"}


def try_module(pipeline: Pipeline, mutant: Mutant, precision: str, work: Path, job: Job) -> Outcome:
    """Export the spoilt part; torch's references come from `pipeline`.

    Of spoilt weights the graph is the sound part's, which `job` keeps; any other fault needs a graph of its own.
    """
    parts = {mutant.part: spoilt(pipeline.components[mutant.part], mutant)}
    wrong = replace(pipeline, components=parts)
    kept = job if spoils_weights(mutant) else None
    with temporary_folder("mutant", work) as folder:
        return _timed(lambda: _exported(wrong, pipeline, mutant.part, precision, folder / "bundle", kept))


def try_graph(bundle: Bundle, mutant: Mutant, work: Path) -> Outcome:
    """Edit a copy of the bundle and verify it."""
    with temporary_folder("mutant", work) as folder:
        return _timed(lambda: _verified(bundle, mutant, folder / "bundle"))


def try_sound(pipeline: Pipeline, precision: str, work: Path) -> Outcome:
    """Export a sound pipeline; "alarm" if that is refused as another network."""
    with temporary_folder("mutant", work) as folder:
        return _timed(lambda: _clean(pipeline, precision, folder / "bundle"))


def judged(check: PartCheck) -> Outcome:
    """What a check says of a mutant."""
    margins = [(output.margin_db, output.name) for block in check.blocks for output in block.report.outputs]
    margins += [] if check.report is None else [(output.margin_db, output.name) for output in check.report.outputs]
    margin, closest = min((pair for pair in margins if math.isfinite(pair[0])), default=(None, ""))
    whole = None if check.report is None else not check.report.passed
    failed = next((block.kind for block in check.blocks if not block.passed), "")
    if check.report is None and not failed:
        by = next((by for words, by in _TOLD.items() if words in check.reason), "")
        return Outcome(CAUGHT if by else NOT_OPENED, by, why=check.reason[:_REASON])
    by = failed or ("whole" if whole else "")
    return Outcome(CAUGHT if by else SURVIVED, by, None if margin is None else round(margin, 2), closest, whole)


def _exported(wrong: Pipeline, sound: Pipeline, part: str, precision: str, out: Path, job: Job | None) -> Outcome:
    try:
        bundle = export(wrong, "onnx", out, parts=[part], against=sound, precision=precision, job=job)
    except Refused as fault:
        return judged(fault.check)
    except ParityError as fault:
        return Outcome(CAUGHT, "whole", why=str(fault)[:_REASON])
    except DiffshipError as fault:  # no graph of it can be written, which is no merit of the proof
        return Outcome(NOT_MADE, why=str(fault)[:_REASON])
    margins = _margins(bundle.part(part))
    margin, closest = min(margins, default=(None, ""))
    return Outcome(SURVIVED, margin_db=margin, closest=closest, whole=False)


def _margins(part: Part) -> list[tuple[float, str]]:
    blocks = part.proof.get("blocks", [])
    return [(b["margin_db"], b["closest"]["name"]) for b in blocks if b["margin_db"] is not None]


def _verified(bundle: Bundle, mutant: Mutant, folder: Path) -> Outcome:
    try:
        changed = edited_bundle(bundle, mutant, folder)
    except UnsupportedError as fault:
        return Outcome(NOT_MADE, why=str(fault)[:_REASON])
    report = verify(changed, "onnxruntime", parts=[mutant.part], threads=1)
    if report.damage:
        raise AssertionError(f"an edited bundle must be whole: {report.damage}")
    return judged(report.checks[0])


def _clean(pipeline: Pipeline, precision: str, out: Path) -> Outcome:
    try:
        bundle = export(pipeline, "onnx", out, precision=precision)
    except Refused as fault:
        return replace(judged(fault.check), status=ALARM, why=str(fault)[:_REASON])
    except UnsupportedError as fault:  # its values do not fit the format, say
        return Outcome(NOT_MADE, why=str(fault)[:_REASON])
    except DiffshipError as fault:
        return Outcome(ALARM, why=str(fault)[:_REASON])
    margin, closest = min((pair for part in bundle.manifest.parts for pair in _margins(part)), default=(None, ""))
    return Outcome(CLEAN, margin_db=margin, closest=closest)


def _timed(run: Callable[[], Outcome]) -> Outcome:
    started = time.perf_counter()
    return replace(run(), seconds=round(time.perf_counter() - started, 2))
