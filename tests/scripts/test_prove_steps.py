"""The steps of prove_real: each once, in order, again after an interruption, and nothing proved that did not run."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from hub_cache import COMMIT, row
from prove.child import pickle_only
from prove.report import rows_of
from prove.state import State
from prove.steps import ORDER, Box, Prover, last_document
from prove_fakes import Fake, bench_output, bench_rows, prover

from diffship.benchmarks.measure.process import Measured
from diffship.cli.main import parse
from diffship.core.errors import ConfigError


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


@pytest.mark.parametrize("box", [{}, {"engine": "onnxruntime", "device": "cuda", "precision": "fp16"}])
def test_commands_are_those_of_the_command_line(tmp_path: Path, box: dict[str, str]) -> None:
    fake = Fake(tmp_path)
    job, _ = prover(tmp_path, fake, row("tiny", sampler="lcm"), **box)
    assert job.prove(job.catalogue.checkpoints["tiny"]) == "ok"
    verbs = [command[3:] for command in fake.commands if command[1:3] == ["-m", "diffship"]]
    assert [words[0] for words in verbs] == ["verify", "bench", "run"]
    for words in verbs:
        options = parse(words)
        assert words[-1] == "--json" or options.json is True, words
        assert options.device == box.get("device")
    assert parse(verbs[1]).sampler == "lcm" and parse(verbs[2]).steps == 2


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
    rows = [row("lora", needs=["onnx", "video"]), row("never", blocked="only pickles were published")]
    job, said = prover(tmp_path, fake, *rows)
    for name, word in (("lora", "not yet"), ("never", "blocked")):
        entry = job.catalogue.checkpoints[name]
        assert job.prove(entry) == word
        (only,) = rows_of(job, entry)
        assert only.metric == "proved" and only.value is None and only.status == "unsupported"
        assert only.reason.startswith(word)
    assert fake.done == [] and said == ["lora: not yet: video models", "never: blocked: only pickles were published"]


def test_a_target_without_an_exporter_is_not_yet(tmp_path: Path) -> None:
    from diffship.core.registry import EXPORTERS

    if "coreml" in EXPORTERS:
        pytest.skip("the Core ML exporter exists")
    fake = Fake(tmp_path)
    job, said = prover(tmp_path, fake, row("tiny"), target="coreml")
    assert job.prove(job.catalogue.checkpoints["tiny"]) == "not yet"
    assert said == ["tiny: not yet: Core ML export"] and fake.done == []


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


@pytest.mark.parametrize(
    ("target", "engine", "expected"),
    [("onnx", None, "onnxruntime"), ("tensorrt", None, "tensorrt"), ("onnx", "openvino", "openvino")],
)
def test_an_engine_that_reads_the_target_is_timed(
    tmp_path: Path, target: str, engine: str | None, expected: str
) -> None:
    job, _ = prover(tmp_path, Fake(tmp_path), row("tiny"), target=target, engine=engine)
    command = job._bench(job.catalogue.checkpoints["tiny"], tmp_path)
    assert command[command.index("--engines") + 1] == expected
