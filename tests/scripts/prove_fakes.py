"""What stands in for the processes of a run: answers to every step, without torch and in no time."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hub_cache import COMMIT, write_catalogue
from prove.catalogue import read_catalogue
from prove.state import State
from prove.steps import Box, Prover

from diffship.benchmarks.measure.process import Measured


def bench_rows(**image: Any) -> list[dict[str, Any]]:
    """Rows in the form of `diffship bench --json`; `image` replaces fields of the image's."""

    def rows(part: str, figures: Mapping[str, float], **fields: Any) -> list[dict[str, Any]]:
        plain = {"status": "ok", "reason": "", "conditions": {"part": part, "runner": "fake"}}
        return [{**plain, "metric": metric, "value": value, **fields} for metric, value in figures.items()]

    return [
        {"status": "ok", "reason": "", "conditions": {}, "metric": "matrix_product_flops", "value": 1.0},
        *rows("unet", {"call_seconds_p50": 0.1, "throughput": 10.0}),
        *rows("vae_decoder", {"call_seconds_p50": 0.2}),
        *rows("image", {"image_seconds_p50": 2.0, "load_seconds": 0.5, "peak_host_bytes": 1e9}, **image),
    ]


def bench_output(rows: list[dict[str, Any]]) -> str:
    return json.dumps({"verb": "bench", "results": {"rows": rows}})


class Fake:
    """Stands in for processes: answers every step, raises KeyboardInterrupt or fails where it is told to."""

    def __init__(self, folder: Path, interrupt: str = "", fail: Mapping[str, Measured] | None = None) -> None:
        self.folder, self.interrupt, self.fail = folder, interrupt, fail or {}
        self.done: list[str] = []
        self.commands: list[list[str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, command: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> Measured:
        step = next(word for word in command if word in ("fetch", "resolve", "export", "verify", "bench", "run"))
        step = {"run": "generate"}.get(step, step)
        assert 0 < timeout < 24 * 3600
        self.environments.append(dict(env or {}))
        self.commands.append(list(command))
        if step == self.interrupt:
            raise KeyboardInterrupt
        self.done.append(step)
        if step in self.fail:
            return self.fail[step]
        return Measured(1.0, 1 << 20, 0, json.dumps(self.answer(step, command)))

    def answer(self, step: str, command: Sequence[str]) -> dict[str, Any]:
        if step in ("fetch", "resolve"):
            return {"commit": COMMIT, "folder": str(self.folder), "bytes": 7, "licence": "mit"}
        if step == "export":
            out = Path(json.loads(command[-1])["out"])
            out.mkdir(parents=True, exist_ok=True)
            (out / "diffship.json").write_text("{}", encoding="utf-8")
            return {"parts": {"unet": "proved"}, "bytes": 9, "licence": "mit"}
        if step == "verify":
            outputs = [{"max_abs": 1e-6, "psnr_db": 99.0}, {"max_abs": 3e-6, "psnr_db": None}]
            return {"passed": True, "parts": [{"part": "unet", "status": "passed", "report": {"outputs": outputs}}]}
        if step == "bench":
            return {"verb": "bench", "results": {"rows": bench_rows()}}
        Path(command[command.index("-o") + 1]).write_bytes(b"png")
        return {"ok": True}


def prover(tmp_path: Path, run: Fake, *rows: Mapping[str, Any], **box: Any) -> tuple[Prover, list[str]]:
    """A prover over these rows that says nothing on stdout, and the lines it said."""
    said: list[str] = []
    out = tmp_path / "out"
    catalogue = read_catalogue(write_catalogue(tmp_path / "catalogue.toml", *rows))
    return Prover(catalogue, Box(out=out, run=run, say=said.append, **box), State(out / "state.json")), said
