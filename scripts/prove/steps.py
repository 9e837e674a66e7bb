"""fetch, export, verify, bench, generate: the steps of one checkpoint, each in a process of its own, each done once."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from diffship.benchmarks.measure.machine import code_digest
from diffship.benchmarks.measure.process import TIMEOUT_CODE, Measured, measure
from diffship.runtimes.engines.engine import engines_for
from prove.capabilities import missing
from prove.catalogue import Catalogue, Checkpoint
from prove.state import Outcome, State, digest

CHILD = Path(__file__).with_name("child.py")
ORDER = ("fetch", "export", "verify", "bench", "generate")
# what is taken over from `diffship bench`: part -> its metric -> ours
TIMED = {
    "unet": {"call_seconds_p50": "unet_seconds"},
    "vae_decoder": {"call_seconds_p50": "vae_decoder_seconds"},
    "image": {
        "image_seconds_p50": "image_seconds",
        "load_seconds": "load_seconds",
        "peak_host_bytes": "image_peak_bytes",
    },
}
STEP_SECONDS = 6 * 3600.0
Run = Callable[[Sequence[str], float, Mapping[str, str]], Measured]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Box:
    """How this machine proves: where things lie, which target, engine, device and precision, how often to repeat."""

    out: Path
    target: str = "onnx"
    precision: str = "fp32"
    engine: str | None = None
    device: str | None = None
    hub_cache: Path | None = None
    offline: bool = False
    repeat: int = 3
    step_seconds: float = STEP_SECONDS
    steps: int | None = None  # overrides of the catalogue's steps and size, for a trial run
    size: int | None = None
    run: Run = field(default=measure, compare=False)
    say: Say = field(default=partial(print, flush=True), compare=False)

    def environment(self, fetching: bool) -> dict[str, str]:
        """What the step's process gets: the cache, and no network once everything is fetched."""
        found = {"HF_HUB_DISABLE_TELEMETRY": "1"}
        if self.hub_cache is not None:
            found["HF_HUB_CACHE"] = str(self.hub_cache.resolve())
        if self.offline or not fetching:
            found["HF_HUB_OFFLINE"] = "1"
        return found


@dataclass(frozen=True)
class Prover:
    """One run over a catalogue."""

    catalogue: Catalogue
    box: Box
    state: State

    def prove(self, entry: Checkpoint) -> str:
        """`ok`, `failed`, `OOM`, `blocked` or `not yet`; everything else is in the state."""
        reason = self.standing(entry)
        if reason is not None:
            self.box.say(f"{entry.name}: {reason[0]}: {reason[1]}")
            return reason[0]
        for step in ORDER:
            outcome = self._step(entry, step)
            if outcome.result != "ok":
                return outcome.result
        return "ok"

    def standing(self, entry: Checkpoint) -> tuple[str, str] | None:
        """(`not yet` or `blocked`, why) where nothing is to be started; None otherwise."""
        lacking = missing([*entry.needs, self.box.target])
        if lacking:
            return "not yet", ", ".join(dict.fromkeys(lacking))
        return ("blocked", entry.blocked) if entry.blocked else None

    def fetch(self, entry: Checkpoint) -> Outcome:
        """The checkpoint in the local cache; its facts hold commit and folder."""
        inputs = {"repo": entry.repo, "revision": entry.revision, "parts": list(entry.parts)}
        asked = {"repo": entry.repo, "revision": entry.pinned, "parts": list(entry.parts)}
        known = self._kept(entry, "fetch", digest(inputs))
        if known and Path(str(known.facts["folder"])).is_dir():
            return known
        outcome = self._run(entry, "fetch", digest(inputs), _child("fetch", asked), fetching=True)
        if outcome.result == "ok" and entry.pinned is None:
            self.box.say(f"{entry.name}: unverified revision: the hub's main is {outcome.facts['commit']} today")
        return outcome

    def _step(self, entry: Checkpoint, step: str) -> Outcome:
        if step == "fetch":
            return self.fetch(entry)
        if step == "export":
            return self._export(entry)
        before = self.state.get(entry.name, ORDER[ORDER.index(step) - 1])
        bundle = self._folder(entry) / "bundle"
        command = {"verify": self._verify, "bench": self._bench, "generate": self._generate}[step](entry, bundle)
        mark = digest({"before": before.digest if before else "", "command": command})
        known = self._kept(entry, step, mark)
        if known and (step != "generate" or (self._folder(entry) / "picture.png").is_file()):
            return known
        return self._run(entry, step, mark, command)

    def _export(self, entry: Checkpoint) -> Outcome:
        own = self.state.get(entry.name, "fetch")
        base = self.fetch(self.catalogue.checkpoints[entry.base]) if entry.base else None
        if base is not None and base.result != "ok":
            return self._put(entry, "export", Outcome("failed", reason=f"its base {entry.base} is not there"))
        asked = {
            "source": entry.repo,
            "revision": own.facts["commit"] if own else "",
            "base": base.facts["folder"] if base else "",
            "to": self.box.target,
            "precision": self.box.precision,
            "out": str(self._folder(entry) / "bundle"),
            "job": str(self._folder(entry) / "job"),
        }
        if entry.lora and own:
            lora = str(Path(str(own.facts["folder"])) / entry.lora)
            asked |= {"lora": lora, "sampler": entry.sampler, "steps": entry.steps}
        inputs = {key: value for key, value in asked.items() if key not in ("out", "job")}
        mark = digest({**inputs, "code": code_digest()})
        known = self._kept(entry, "export", mark)
        if known and (self._folder(entry) / "bundle" / "diffship.json").is_file():
            return known
        self._folder(entry).mkdir(parents=True, exist_ok=True)
        return self._run(entry, "export", mark, _child("export", asked))

    def _verify(self, entry: Checkpoint, bundle: Path) -> list[str]:
        return [sys.executable, "-m", "diffship", "verify", str(bundle), *self._engine(), "--json", "--quiet"]

    def _bench(self, entry: Checkpoint, bundle: Path) -> list[str]:
        picture, box = self._picture(entry), self.box
        engine = box.engine or engines_for(box.target)[0]
        command = [sys.executable, "-m", "diffship", "bench", str(bundle), "--engines", engine]
        for flag in ("size", "steps"):
            command += [f"--{flag}", str(picture[flag])]
        command += ["--guidance", str(entry.guidance), "--sampler", entry.sampler, "--precision", box.precision]
        command += ["--device", box.device] if box.device else []
        command += ["--parts", ",".join(TIMED), "--images", str(box.repeat), "--calls", str(box.repeat)]
        command += ["--timeout", str(int(box.step_seconds))]
        return [*command, "--rounds", "1", "--work", str(self._folder(entry) / "bench"), "--quiet", "--json"]

    def _generate(self, entry: Checkpoint, bundle: Path) -> list[str]:
        picture = self._picture(entry)
        command = [sys.executable, "-m", "diffship", "run", str(bundle), str(picture["prompt"]), *self._engine()]
        for flag in ("seed", "size", "steps"):
            command += [f"--{flag}", str(picture[flag])]
        out = str(self._folder(entry) / "picture.png")
        return [*command, "--guidance", str(entry.guidance), "-o", out, "--overwrite", "--json", "--quiet"]

    def _picture(self, entry: Checkpoint) -> dict[str, Any]:
        size, steps = self.box.size or entry.size, self.box.steps or entry.steps
        return {"prompt": self.catalogue.prompt, "seed": self.catalogue.seed, "size": size, "steps": steps}

    def _engine(self) -> list[str]:
        named = {"--engine": self.box.engine, "--device": self.box.device}
        return [word for flag, value in named.items() if value is not None for word in (flag, value)]

    def _folder(self, entry: Checkpoint) -> Path:
        return self.box.out / entry.name

    def _kept(self, entry: Checkpoint, step: str, mark: str) -> Outcome | None:
        known = self.state.kept(entry.name, step, mark)
        if known:
            self.box.say(f"{entry.name}: {step}: done before, kept")
        return known

    def _run(self, entry: Checkpoint, step: str, mark: str, command: Sequence[str], fetching: bool = False) -> Outcome:
        self.box.say(f"{entry.name}: {step} ...")
        measured = self.box.run(command, self.box.step_seconds, self.box.environment(fetching))
        outcome = judge(step, mark, measured, self.box.step_seconds)
        shown = f"{outcome.seconds:.1f} s" if outcome.result == "ok" else f"{outcome.result}: {outcome.reason}"
        self.box.say(f"{entry.name}: {step}: {shown}")
        return self._put(entry, step, outcome)

    def _put(self, entry: Checkpoint, step: str, outcome: Outcome) -> Outcome:
        self.state.put(entry.name, step, outcome)
        return outcome


def judge(step: str, mark: str, measured: Measured, limit: float) -> Outcome:
    """What a finished process means: ok with its facts, blocked by pickles, out of memory, or failed with one line."""
    facts = last_document(measured.output)
    result, reason = _verdict(measured, facts, limit)
    if step == "bench" and facts and "results" in facts:  # exit code 1 where a row failed: the row says why
        facts, result, reason = bench_facts(facts["results"])
    return Outcome(result, mark, measured.seconds, measured.peak_bytes, reason, facts or {})


def _verdict(measured: Measured, facts: Mapping[str, Any] | None, limit: float) -> tuple[str, str]:
    if measured.code == TIMEOUT_CODE:
        return "failed", f"stopped after {limit:.0f} s"
    if measured.status == "OOM":
        return "OOM", f"out of memory: {_reason(measured, facts)}"
    if measured.code != 0:
        return "failed", _reason(measured, facts)
    if facts is None:
        return "failed", "it reported no figures"
    if facts.get("blocked"):
        where = ", ".join("the top" if name == "." else name for name in facts["blocked"])
        return "blocked", f"only pickles in {where}; pickles are never read"
    return "ok", ""


def bench_facts(results: Mapping[str, Any]) -> tuple[dict[str, Any], str, str]:
    """(figures by our names, `ok`, `failed` or `OOM`, why) of the rows that `diffship bench --json` prints."""
    facts: dict[str, Any] = {}
    for row in results.get("rows", ()):
        names = TIMED.get(row["conditions"].get("part"), {})
        if names and row["status"] != "ok":
            said = f"{row['conditions']['part']}: {row['status']}: {row['reason']}"
            return facts, "OOM" if row["status"] == "OOM" else "failed", _without_paths(said)
        if row["metric"] in names:
            facts[names[row["metric"]]] = row["value"]
            facts["engine"] = row["conditions"].get("runner")
    absent = [name for names in TIMED.values() for name in names.values() if name not in facts]
    return (facts, "failed", f"no figure for {', '.join(absent)}") if absent else (facts, "ok", "")


def last_document(output: str) -> dict[str, Any] | None:
    """The last JSON table that begins a line of `output`, however many lines it takes."""
    decoder, found, at = json.JSONDecoder(), None, 0
    while at < len(output):
        if output.startswith("{", at):
            try:
                value, end = decoder.raw_decode(output, at)
            except ValueError:
                value, end = None, at
            if isinstance(value, dict):
                found, at = value, end
        following = output.find("\n", at)
        at = len(output) if following < 0 else following + 1
    return found


def _reason(measured: Measured, facts: Mapping[str, Any] | None) -> str:
    if facts and isinstance(facts.get("error"), dict):
        return _without_paths(str(facts["error"].get("message", "")))
    if facts and facts.get("passed") is False:
        failed = [f"{part['part']} {part['status']}" for part in facts.get("parts", ()) if part["status"] != "passed"]
        return _without_paths(f"not verified: {', '.join(failed) or facts.get('damage') or 'no part was checked'}")
    lines = [line for line in measured.output.strip().splitlines() if line.strip()]
    return _without_paths(lines[-1].strip())[:300] if lines else "no output"


def _without_paths(line: str) -> str:
    # a reason goes into the result file, which says nothing of this machine's folders
    return re.sub(r"(?<![\w.:/])/(?:[^\s'\"/:]+/)+([^\s'\"/:]*)", r".../\1", line)


def _child(step: str, asked: Mapping[str, object]) -> list[str]:
    return [sys.executable, str(CHILD), step, json.dumps(asked)]


def resolve(box: Box, entry: Checkpoint) -> Outcome:
    """The commit that `entry`'s revision stands for now; nothing is downloaded and nothing recorded."""
    asked: dict[str, object] = {"repo": entry.repo, "revision": entry.pinned, "parts": []}
    return judge("resolve", "", box.run(_child("resolve", asked), box.step_seconds, box.environment(True)), 60)
