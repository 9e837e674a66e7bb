"""scripts/prove_real.py against a local folder in the layout of the hub's cache, with tiny models and no network."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import prove_real
import pytest
from hub_cache import COMMIT, PARTS, put, row, write_catalogue
from prove.catalogue import pin, read_catalogue
from prove.child import pickle_only
from prove.report import rows_of
from prove.state import State
from prove.steps import ORDER, Box, Prover, last_document

from diffship.benchmarks.process import Measured
from diffship.benchmarks.record import read_result
from diffship.core.errors import ConfigError
from diffship.core.row import Row

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "prove_real.py"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from diffship.models.sources import open_source

    folder = open_source("arch:tiny-sd").save(tmp_path_factory.mktemp("saved") / "tiny-sd")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`stand-in/tiny-sd` whole, `/vae` a tiny VAE alone, `/pickles` with a pickled U-Net, `/damaged` a short one."""
    from diffship.models.sources import open_source

    folder = tmp_path_factory.mktemp("hub")
    put(folder, "stand-in/tiny-sd", saved)
    tiny_vae = open_source("arch:tiny-sd+taesd").save(tmp_path_factory.mktemp("vae") / "model") / "vae"
    put(folder, "stand-in/vae", tiny_vae)
    for name in ("pickles", "damaged"):
        other = tmp_path_factory.mktemp(name) / "model"
        shutil.copytree(saved, other)
        weights = other / "unet" / "diffusion_pytorch_model.safetensors"
        if name == "pickles":
            weights.unlink()
            (other / "unet" / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"a": 1}))
        else:
            weights.write_bytes(weights.read_bytes()[:-100])
        put(folder, f"stand-in/{name}", other)
    return folder


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
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, command: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> Measured:
        step = next(word for word in command if word in ("fetch", "resolve", "export", "verify", "bench", "run"))
        step = {"run": "generate"}.get(step, step)
        assert 0 < timeout < 24 * 3600
        self.environments.append(dict(env or {}))
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


def real(tmp_path: Path, cache: Path, *words: str, catalogue: Path | None = None) -> list[str]:
    """Words of a run against the stand-in."""
    catalogue = catalogue or write_catalogue(tmp_path / "catalogue.toml", row("tiny"))
    common = ["--offline", "--hub-cache", str(cache), "--out", str(tmp_path / "out"), "--repeat", "1"]
    return [*common, "--catalogue", str(catalogue), *words]


def rows_by_metric(tmp_path: Path, subject: str) -> dict[str, Row]:
    results = read_result(tmp_path / "out" / "prove-real.json")
    assert results.suite == "prove-real" and results.command.startswith("python scripts/prove_real.py ")
    return {entry.metric: entry for entry in results.rows if entry.subject == subject}


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_the_plan_lists_bytes_minutes_licences_and_revisions(capsys: pytest.CaptureFixture[str]) -> None:
    assert prove_real.main(["--plan"]) == 0
    text = capsys.readouterr().out
    for name, entry in read_catalogue().checkpoints.items():
        assert f"  {name}: {entry.licence}" in text
        assert f"  {name}: {entry.repo} {entry.revision}" in text
    assert "not yet: LoRA fusion" in text
    assert "4.3 GB" in text and "minutes" in text


def test_the_plan_needs_no_network_and_writes_nothing(tmp_path: Path) -> None:
    program = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise OSError('no network in this test')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        f"sys.path.insert(0, {str(ROOT / 'scripts')!r})\n"
        "import prove_real\n"
        "code = prove_real.main(['--plan', '--only', 'taesd'])\n"
        "print([m for m in ('torch', 'huggingface_hub') if m in sys.modules]); sys.exit(code)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    assert "  sd15: creativeml-openrail-m" in done.stdout, "the licence of a base is part of the plan"
    assert list(tmp_path.iterdir()) == []


def test_the_catalogue_names_every_checkpoint_of_the_issue() -> None:
    repos = {entry.repo for entry in read_catalogue().checkpoints.values()}
    assert repos >= {
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "stabilityai/stable-diffusion-xl-base-1.0", "segmind/SSD-1B",
        "segmind/Segmind-Vega", "etri-vilab/koala-lightning-700m", "etri-vilab/koala-lightning-1b",
        "nota-ai/bk-sdm-tiny", "SimianLuo/LCM_Dreamshaper_v7", "latent-consistency/lcm-lora-sdv1-5",
        "latent-consistency/lcm-lora-sdxl", "madebyollin/taesd", "cqyan/hybrid-sd-224m", "cqyan/hybrid-sd-tinyvae",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revision": "main"}, "no commit of 40"),
        ({"evidence": ""}, "where it was seen"),
        ({"base": "nobody"}, "unknown base 'nobody'"),
        ({"bytes": -1}, "legal is from"),
        ({"licens": "mit"}, "did you mean 'licence'"),
        ({"name": "Tiny SD"}, "small letters"),
    ],
)
def test_wrong_catalogues_are_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_catalogue(write_catalogue(tmp_path / "c.toml", {**row("tiny"), **change}))


def test_a_wrong_name_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert prove_real.main(["--plan", "--only", "sd16"]) == 2
    captured = capsys.readouterr()
    assert captured.err == "prove_real: unknown checkpoint 'sd16'; did you mean 'sd15'?\n" and captured.out == ""


def test_pinning_keeps_the_rest_of_the_file(tmp_path: Path) -> None:
    file = write_catalogue(tmp_path / "c.toml", row("a"), row("b", revision="unverified", evidence="nobody"))
    file.write_text("# a comment stays\n" + file.read_text(encoding="utf-8"), encoding="utf-8")
    assert pin(file, {"a": COMMIT[::-1], "b": COMMIT[::-1], "c": COMMIT}) == ["b"]
    rows = read_catalogue(file).checkpoints
    assert rows["a"].revision == COMMIT, "a revision that is pinned already stays"
    assert rows["b"].revision == COMMIT[::-1] and "--pin" in rows["b"].evidence
    assert file.read_text(encoding="utf-8").startswith("# a comment stays\n")
    with pytest.raises(ConfigError, match="no commit of 40"):
        pin(file, {"a": "main"})


# --- steps, with processes faked --------------------------------------------------------------------------------------


def test_every_step_runs_once_and_only_fetch_may_use_the_network(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    job, _ = prover(tmp_path, fake, row("tiny"))
    entry = job.catalogue.checkpoints["tiny"]
    assert job.prove(entry) == "ok" and fake.done == list(ORDER)
    assert ["HF_HUB_OFFLINE" in env for env in fake.environments] == [False, True, True, True, True]
    assert job.prove(entry) == "ok" and fake.done == list(ORDER), "nothing is done twice"
    rows = {found.metric: found for found in rows_of(job, entry)}
    assert rows["unet_max_abs"].value == 3e-6 and rows["unet_psnr_db"].value == 99
    assert rows["image_seconds"].value == 2 and rows["image_seconds"].conditions["commit"] == COMMIT
    assert rows["vae_decoder_seconds"].value == 0.2 and rows["image_peak_bytes"].kind == "memory"
    assert rows["proved"].value == 1 and {found.status for found in rows.values()} == {"ok"}


@pytest.mark.parametrize("step", ORDER)
def test_an_interrupted_step_is_the_next_to_run(tmp_path: Path, step: str) -> None:
    job, _ = prover(tmp_path, Fake(tmp_path, interrupt=step), row("tiny"))
    with pytest.raises(KeyboardInterrupt):
        job.prove(job.catalogue.checkpoints["tiny"])
    fake = Fake(tmp_path)
    again, said = prover(tmp_path, fake, row("tiny"))
    assert again.prove(again.catalogue.checkpoints["tiny"]) == "ok"
    assert fake.done == list(ORDER[ORDER.index(step) :])
    assert sum("kept" in line for line in said) == ORDER.index(step)


@pytest.mark.parametrize(
    ("change", "box", "again"),
    [
        ({"revision": COMMIT[::-1]}, {}, ORDER),
        ({}, {"precision": "fp16"}, ORDER[1:]),
        ({}, {"engine": "openvino"}, ORDER[2:]),
        ({"steps": 3}, {}, ORDER[3:]),
        ({}, {"repeat": 5}, ORDER[3:]),
        ({"licence": "mit"}, {}, ()),
    ],
)
def test_other_inputs_repeat_what_depends_on_them(
    tmp_path: Path, change: dict[str, Any], box: dict[str, Any], again: Sequence[str]
) -> None:
    job, _ = prover(tmp_path, Fake(tmp_path), row("tiny"))
    job.prove(job.catalogue.checkpoints["tiny"])
    fake = Fake(tmp_path)
    fake.answer = lambda step, command: {**Fake.answer(fake, step, command), **_commit(change, step)}  # type: ignore[method-assign]
    other, _ = prover(tmp_path, fake, {**row("tiny"), **change}, **box)
    assert other.prove(other.catalogue.checkpoints["tiny"]) == "ok"
    assert fake.done == list(again)


def _commit(change: Mapping[str, Any], step: str) -> dict[str, Any]:
    return {"commit": change["revision"]} if step == "fetch" and "revision" in change else {}


@pytest.mark.parametrize(
    ("step", "measured", "reason"),
    [
        ("fetch", Measured(1, 0, 2, "noise\nfetch: 'a/b' is no path here"), "fetch: 'a/b' is no path here"),
        ("export", Measured(1, 0, -9, "export unet: 0/1"), "out of memory: export unet: 0/1"),
        ("export", Measured(1, 0, 124, ""), "stopped after"),
        ("export", Measured(1, 0, 0, "no table"), "reported no figures"),
        (
            "verify",
            Measured(1, 0, 1, '{\n "passed": false, "parts": [{"part": "unet", "status": "failed"}]\n}\n'),
            "not verified: unet failed",
        ),
        (
            "bench",
            Measured(
                1, 0, 1, json.dumps({"results": {"rows": bench_rows(status="OOM", reason="killed in /home/x/y")}})
            ),
            "image: OOM: killed in .../y",
        ),
        (
            "bench",
            Measured(1, 0, 0, bench_output(bench_rows()[:2])),
            "no figure for vae_decoder_seconds",
        ),
        ("generate", Measured(1, 0, 3, '{"ok": false, "error": {"message": "no engine"}}'), "no engine"),
    ],
)
def test_a_failing_step_is_failed_and_nothing_after_it_runs(
    tmp_path: Path, step: str, measured: Measured, reason: str
) -> None:
    fake = Fake(tmp_path, fail={step: measured})
    job, said = prover(tmp_path, fake, row("tiny"))
    entry = job.catalogue.checkpoints["tiny"]
    word = "OOM" if "memory" in reason or "OOM" in reason else "failed"
    assert job.prove(entry) == word
    assert fake.done == list(ORDER[: ORDER.index(step) + 1])
    assert reason in said[-1]
    rows = {found.metric: found for found in rows_of(job, entry)}
    assert rows["proved"].value is None and rows["proved"].status == word
    assert rows[f"{step}_seconds"].status == word and reason in rows["proved"].reason


def test_a_failed_step_is_tried_again(tmp_path: Path) -> None:
    job, _ = prover(tmp_path, Fake(tmp_path, fail={"verify": Measured(1, 0, 1, "bad")}), row("tiny"))
    assert job.prove(job.catalogue.checkpoints["tiny"]) == "failed"
    fake = Fake(tmp_path)
    again, _ = prover(tmp_path, fake, row("tiny"))
    assert again.prove(again.catalogue.checkpoints["tiny"]) == "ok" and fake.done == list(ORDER[2:])


def test_a_base_is_fetched_once_and_its_folder_goes_to_the_export(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    commands: list[Sequence[str]] = []

    def run(command: Sequence[str], timeout: float, env: Mapping[str, str] | None = None) -> Measured:
        commands.append(command)
        return fake(command, timeout, env)

    job, _ = prover(tmp_path, fake, row("tiny"), row("vae", base="tiny", repo="stand-in/vae"))
    job = Prover(job.catalogue, Box(out=tmp_path / "out", run=run, say=lambda line: None), job.state)
    assert job.prove(job.catalogue.checkpoints["vae"]) == "ok"
    assert fake.done == ["fetch", "fetch", *ORDER[1:]]
    exported = json.loads(commands[2][-1])
    assert exported["source"] == "stand-in/vae" and exported["base"] == str(tmp_path)


def test_what_cannot_be_yet_starts_nothing_and_is_not_proved(tmp_path: Path) -> None:
    fake = Fake(tmp_path)
    rows = [row("lora", needs=["onnx", "lora"]), row("never", blocked="only pickles were published")]
    job, said = prover(tmp_path, fake, *rows)
    for name, word in (("lora", "not yet"), ("never", "blocked")):
        entry = job.catalogue.checkpoints[name]
        assert job.prove(entry) == word
        (only,) = rows_of(job, entry)
        assert only.metric == "proved" and only.value is None and only.status == "unsupported"
        assert only.reason.startswith(word)
    assert fake.done == [] and said == ["lora: not yet: LoRA fusion", "never: blocked: only pickles were published"]


def test_a_target_without_an_exporter_is_not_yet(tmp_path: Path) -> None:
    from diffship.core.registry import EXPORTERS

    if "coreml" in EXPORTERS:
        pytest.skip("the Core ML exporter exists")
    fake = Fake(tmp_path)
    job, said = prover(tmp_path, fake, row("tiny"), target="coreml")
    assert job.prove(job.catalogue.checkpoints["tiny"]) == "not yet"
    assert said == ["tiny: not yet: Core ML export"] and fake.done == []


def test_the_mac_job_says_not_yet_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffship.core.registry import EXPORTERS

    if "coreml" in EXPORTERS:
        pytest.skip("the Core ML exporter exists")
    assert prove_real.main(["--only", "bk-sdm-tiny", "--to", "coreml", "--out", str(tmp_path / "out")]) == 0
    assert "bk-sdm-tiny: not yet: Core ML export" in capsys.readouterr().out
    assert rows_by_metric(tmp_path, "bk-sdm-tiny")["proved"].status == "unsupported"


def test_an_unverified_revision_is_resolved_said_and_recorded(tmp_path: Path) -> None:
    unverified = row("tiny", revision="unverified", evidence="")
    job, said = prover(tmp_path, Fake(tmp_path), unverified)
    entry = job.catalogue.checkpoints["tiny"]
    assert job.prove(entry) == "ok"
    assert f"tiny: unverified revision: the hub's main is {COMMIT} today" in said
    conditions = rows_of(job, entry)[-1].conditions
    assert conditions["commit"] == COMMIT and conditions["revision_in_catalogue"] == "unverified"


def test_an_unknown_capability_is_refused(tmp_path: Path) -> None:
    job, _ = prover(tmp_path, Fake(tmp_path), row("tiny", needs=["lorra"]))
    with pytest.raises(ConfigError, match="did you mean 'lora'"):
        job.prove(job.catalogue.checkpoints["tiny"])


def test_nothing_half_done_counts_as_proved(tmp_path: Path) -> None:
    job, _ = prover(tmp_path, Fake(tmp_path, interrupt="bench"), row("tiny"))
    entry = job.catalogue.checkpoints["tiny"]
    with pytest.raises(KeyboardInterrupt):
        job.prove(entry)
    rows = {found.metric: found for found in rows_of(job, entry)}
    assert rows["export_seconds"].status == "ok" and "image_seconds" not in rows
    assert rows["proved"].value is None and rows["proved"].status == "skipped"


@pytest.mark.parametrize("text", ["[", "[]", '{"schema": 99, "steps": {}}', '{"schema": 1, "steps": {"a": {"b": {}}}}'])
def test_a_damaged_state_file_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "state.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"state\.json"):
        State(file)


def test_pickles_are_seen_in_a_listing() -> None:
    whole = ["model_index.json", "unet/diffusion_pytorch_model.bin", "vae/diffusion_pytorch_model.safetensors"]
    assert pickle_only(whole) == ["unet"]
    assert pickle_only([*whole, "unet/diffusion_pytorch_model.safetensors"]) == []
    assert pickle_only(["model_index.json", "sd.ckpt", "unet/diffusion_pytorch_model.safetensors"]) == []
    assert pickle_only(["config.json", "vae.pt"]) == ["."]
    assert pickle_only(["config.json", "pytorch_lora_weights.safetensors"]) == []


def test_the_last_document_of_an_output() -> None:
    assert last_document('{"a": 1}\nnoise {"b": 2}\n{\n "c": {\n  "d": 3\n }\n}\n') == {"c": {"d": 3}}
    assert last_document('{"a": 1}\n{broken\n') == {"a": 1}
    assert last_document("nothing\n") is None


# --- for real, against the stand-in -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_stand_in_is_proved_for_real(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    catalogue = write_catalogue(
        tmp_path / "catalogue.toml",
        row("tiny"),
        row("tiny-main", revision="unverified", evidence=""),
        row("vae", repo="stand-in/vae", parts=["."], base="tiny"),
        row("pickled", repo="stand-in/pickles"),
        row("later", needs=["onnx", "lora"]),
    )
    words = real(tmp_path, cache, "--only", "tiny,vae,pickled,later", catalogue=catalogue)
    assert prove_real.main(words) == 0
    text = capfd.readouterr().out
    assert "pickled: fetch: blocked: only pickles in unet" in text and "later: not yet: LoRA fusion" in text
    rows = rows_by_metric(tmp_path, "tiny")
    assert rows["proved"].value == 1 and rows["proved"].conditions["commit"] == COMMIT
    assert rows["proved"].conditions["licence"] == "apache-2.0"
    assert (
        rows["image_seconds"].value > 0
        and rows["export_peak_bytes"].value > 50_000_000
        and rows["unet_seconds"].value > 0
    )
    assert rows["unet_psnr_db"].value > 60 and 0 < rows["unet_max_abs"].value < 1e-3
    assert rows_by_metric(tmp_path, "pickled")["proved"].status == "unsupported"
    assert rows_by_metric(tmp_path, "later")["proved"].value is None
    measured = [{"conditions": found.conditions, "reason": found.reason} for found in rows.values()]
    assert str(tmp_path) not in json.dumps(measured), "rows name no path"
    assert rows["vae_decoder_seconds"].value > 0
    assert rows_by_metric(tmp_path, "vae")["proved"].value == 1
    pictures = [tmp_path / "out" / name / "picture.png" for name in ("tiny", "vae")]
    assert all(picture.read_bytes().startswith(b"\x89PNG") for picture in pictures)
    assert pictures[0].read_bytes() != pictures[1].read_bytes()

    begun = time.monotonic()
    assert prove_real.main(words) == 0
    assert capfd.readouterr().out.count("done before, kept") == 2 * len(ORDER) + 1, "the base of one is kept too"
    assert time.monotonic() - begun < 60, "only the blocked row is looked at again"

    assert prove_real.main([*words[:-2], "--pin"]) == 0
    assert read_catalogue(catalogue).checkpoints["tiny-main"].revision == COMMIT
    assert "pinned: tiny-main" in capfd.readouterr().out


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_damaged_weights_fail_with_exit_code_1(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    rows = [row("damaged", repo="stand-in/damaged"), row("absent", repo="stand-in/nothing")]
    catalogue = write_catalogue(tmp_path / "catalogue.toml", *rows, row("other", parts=[*PARTS, "text_encoder_2"]))
    assert prove_real.main(real(tmp_path, cache, catalogue=catalogue)) == 1
    text = capfd.readouterr().out
    assert "damaged: export: failed: export: " in text and "diffusion_pytorch_model.safetensors" in text
    assert "absent: fetch: failed: " in text and "not in the local hub cache" in text
    assert "other: fetch: failed: " in text and "has no text_encoder_2" in text
    for name in ("damaged", "absent", "other"):
        assert rows_by_metric(tmp_path, name)["proved"].status == "failed"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_terminated_and_started_again_it_goes_on(tmp_path: Path, cache: Path) -> None:
    command = [sys.executable, str(SCRIPT), *real(tmp_path, cache)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("tiny: export ..."):
                time.sleep(1)
                process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 130
    state = json.loads((tmp_path / "out" / "state.json").read_text(encoding="utf-8"))
    assert list(state["steps"]["tiny"]) == ["fetch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tiny: fetch: done before, kept" in done.stdout and "tiny: export: done before" not in done.stdout
    assert rows_by_metric(tmp_path, "tiny")["proved"].value == 1
