"""Everything that a GPU host can prove, in one command and one results file: export, verify, measure.

    python -m diffship.benchmarks.gpu_host --out gpu.json [--sources emoji,arch:sd15] [--work DIR]

Each source becomes an ONNX bundle and, if the library of this GPU is installed, TensorRT engines; each bundle is
verified in its engine, part by part and step by step; then what runs is measured against diffusers and torch.compile.
Every step is a process with a time limit: one that dies is a row that says why, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffship.benchmarks.entry import enter
from diffship.benchmarks.measure.case import IMAGE, label
from diffship.benchmarks.measure.materials import slug
from diffship.benchmarks.measure.record import read_result, write_result
from diffship.benchmarks.measure.row import Row
from diffship.core import child
from diffship.core.errors import DiffshipError
from diffship.core.registry import kind

SUITE = "gpu-host"
SOURCES = ("emoji", "arch:sd15", "arch:sdxl", "arch:koala-700m")
ENGINES = {"onnx": "onnxruntime", "tensorrt": "tensorrt"}  # target -> what runs it on a GPU
AGAINST = ("diffusers", "compile")
GRAPHS = "onnxruntime:graphs=true"
TRAJECTORY = 4
_SAID = 300

Say = Callable[[str], object]


@dataclass(frozen=True)
class Plan:
    """What is proved, and where: `device` is cuda; cpu tries the way itself if there is no GPU."""

    sources: tuple[str, ...]
    work: Path
    targets: tuple[str, ...] = tuple(ENGINES)
    parts: tuple[str, ...] = ()
    device: str = "cuda"
    precision: str = "fp16"
    against: tuple[str, ...] = AGAINST
    rounds: int = 3
    timeout: float = 7200


def prove(plan: Plan, say: Say = lambda text: None) -> list[Row]:
    """Rows of every source: exports and proofs first, then the measurements of engines that were proved."""
    rows: list[Row] = []
    for source in plan.sources:
        proved = []
        for target in plan.targets:
            found = _target_rows(plan, source, target, say)
            rows += found
            if found and all(row.status in ("ok", "skipped") for row in found):
                proved.append(ENGINES[target])
        rows += _bench_rows(plan, source, proved, say)
    return rows


def _target_rows(plan: Plan, source: str, target: str, say: Say) -> list[Row]:
    """The export, and what verify says of every part and step."""
    subject = f"{label(source)} / {ENGINES[target]}"
    conditions = {"model": label(source), "target": target, "engine": ENGINES[target], "precision": plan.precision}
    try:
        flags = _flags(target)
    except DiffshipError as fault:
        return [Row(SUITE, subject, "export", None, "s", "unsupported", reason=str(fault), conditions=conditions)]
    folder = plan.work / slug(source) / target
    say(f"{subject}: export")
    words = ["export", source, "--to", target, "--precision", plan.precision, *flags, "-o", str(folder), "--overwrite"]
    words += ["--cache", str(plan.work / "cache")]
    words += ["--trajectory", str(TRAJECTORY)] if not plan.parts or kind("sd").denoiser in plan.parts else []
    words += ["--parts", ",".join(plan.parts)] if plan.parts else []
    made = _told(words, plan.timeout)
    if "parts" not in made:
        return [Row(SUITE, subject, "export", None, "s", "failed", reason=_reason(made), conditions=conditions)]
    rows = [_export_row(subject, part, conditions) for part in made["parts"]]
    say(f"{subject}: verify")
    found = _told(["verify", str(folder), "--engine", ENGINES[target], "--device", plan.device], plan.timeout)
    if not found.get("parts"):
        reason = str(found.get("damage") or _reason(found))
        return [*rows, Row(SUITE, subject, "verify", None, "dB", "failed", reason=reason, conditions=conditions)]
    return [*rows, *_verify_rows(subject, found, conditions)]


def _flags(target: str) -> list[str]:
    """Of the export: TensorRT's engines are for this GPU. Raises DiffshipError if none can be asked."""
    if target != "tensorrt":
        return []
    from diffship.runtimes.engines.tensorrt.library import flavour_here

    flavour, sm = flavour_here()
    return ["--flavour", flavour, *(["--sm", ",".join(map(str, sm))] if sm else [])]


def _export_row(subject: str, part: Mapping[str, Any], conditions: Mapping[str, Any]) -> Row:
    return Row(
        SUITE, f"{subject} / {part['name']}", "export_seconds", part["export_seconds"], "s",
        conditions={**conditions, "part": part["name"], "bytes": part["bytes"], "proof": part["proof"]},
    )  # fmt: skip


def _verify_rows(subject: str, found: Mapping[str, Any], conditions: Mapping[str, Any]) -> list[Row]:
    """PSNR against fp32 torch of every output and every step; null in JSON is a PSNR without an error."""
    rows = []
    entries = [(part["part"], part) for part in found["parts"]]
    entries += [("trajectory", found["trajectory"])] if found.get("trajectory") else []
    for name, entry in entries:
        shared = {**conditions, "part": name, "tool": f"{found['engine']} {found['version']}"}
        outputs = (entry["report"] or {}).get("outputs") or [{"name": "", "passed": False, "psnr_db": None}]
        for output in outputs:
            status = "ok" if output["passed"] else "skipped" if entry["status"] == "skipped" else "failed"
            reason = output.get("reason") or entry["reason"] or ("equal" if output["psnr_db"] is None else "")
            place = f"{subject} / {name}" + (f", {output['name']}" if output["name"] else "")
            psnr, kind = output["psnr_db"], "quality"
            row = Row(SUITE, place, "psnr_db", psnr, "dB", status, kind=kind, reason=reason[:_SAID], conditions=shared)
            rows.append(row)
    return rows


def _bench_rows(plan: Plan, source: str, engines: Sequence[str], say: Say) -> list[Row]:
    """U-Net, decoder and whole image of what was proved, against peers on the same weights, in turns."""
    say(f"{label(source)}: measure")
    file = plan.work / slug(source) / "bench.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    variants = [GRAPHS] if plan.device == "cuda" and "onnxruntime" in engines else []
    words = ["bench", source, "--engines", ",".join([*engines, *variants, "torch"]), "--precision", plan.precision]
    words += [
        "--parts",
        ",".join(plan.parts or (kind("sd").denoiser, kind("sd").decoder, IMAGE)),
        "--device",
        plan.device,
    ]
    words += ["--against", ",".join(plan.against)] if plan.against else []
    words += ["--rounds", str(plan.rounds), "--work", str(plan.work / "bench"), "-o", str(file), "--no-install"]
    made = _told(words, plan.timeout * 4)
    if not file.is_file():
        conditions = {"model": label(source)}
        return [Row(SUITE, label(source), "bench", None, "s", "failed", reason=_reason(made), conditions=conditions)]
    return [row for row in read_result(file).rows]


def _told(words: Sequence[str], timeout: float) -> dict[str, Any]:
    """What a verb prints with --json; {"reason": ...} if it prints nothing that can be read."""
    command, env = child.command("diffship", *words, "--json"), child.environment()
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, errors="replace", env=env)
    except subprocess.TimeoutExpired:
        return {"reason": f"out of time after {timeout:.0f} s"}
    try:
        found = json.loads(done.stdout)
    except ValueError:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"reason": f"exit {done.returncode}: {lines[-1].strip() if lines else 'no output'}"}
    return found if isinstance(found, dict) else {"reason": "no document"}


def _reason(found: Mapping[str, Any]) -> str:
    error = found.get("error") or {}
    return str(error.get("message") or found.get("reason") or "it does not say why")[:_SAID]


def _names(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE.json")
    parser.add_argument("--work", type=Path, default=Path("out/gpu-host"), help="keeps bundles (out/gpu-host)")
    parser.add_argument("--sources", type=_names, default=SOURCES, metavar="A,B", help=", ".join(SOURCES))
    parser.add_argument("--targets", type=_names, default=tuple(ENGINES), metavar="A,B", help=", ".join(ENGINES))
    parser.add_argument("--parts", type=_names, default=(), metavar="A,B", help="only these")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the way without a GPU")
    parser.add_argument("--precision", choices=("fp16", "fp32"), default="fp16")
    parser.add_argument("--against", type=_names, default=AGAINST, metavar="A,B", help=", ".join(AGAINST))
    parser.add_argument("--rounds", type=int, default=3)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    given = vars(make_parser().parse_args(argv))
    out = given.pop("out")
    plan = Plan(**given)
    rows = prove(plan, lambda text: print(text, file=sys.stderr, flush=True))
    command = (
        f"python -m diffship.benchmarks.gpu_host --sources {','.join(map(label, plan.sources))} --out gpu-host.json"
    )
    settings = {"title": "What this GPU proves", "device": plan.device, "rounds": plan.rounds}
    write_result(out, SUITE, command, rows, settings)
    failed = [row for row in rows if row.status == "failed"]
    for row in rows:
        value = "-" if row.value is None else f"{row.value:.4g} {row.unit}"
        print(f"{row.subject:70} {row.metric:24} {value:>14} {row.status}  {row.reason}")
    return 1 if failed else 0


if __name__ == "__main__":
    enter(main)
