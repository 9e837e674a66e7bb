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
from pathlib import Path
from typing import Any

import numpy as np
import prove_real
import pytest
from hub_cache import COMMIT, PARTS, put, row, write_catalogue
from prove.catalogue import pin, read_catalogue
from prove.steps import ORDER
from safetensors.numpy import load_file, save_file

from diffship.benchmarks.measure.record import read_result
from diffship.benchmarks.measure.row import Row
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.models.saving import save

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "prove_real.py"
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    from diffship.models.sources.opening import open_source

    folder = save(open_source("arch:tiny-sd"), tmp_path_factory.mktemp("saved") / "tiny-sd")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def cache(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`stand-in/tiny-sd` whole, `/vae` a tiny VAE alone, `/pickles` with a pickled U-Net, `/damaged` a short one."""
    from diffship.models.sources.opening import open_source

    folder = tmp_path_factory.mktemp("hub")
    put(folder, "stand-in/tiny-sd", saved)
    tiny_vae = save(open_source("arch:tiny-sd+taesd"), tmp_path_factory.mktemp("vae") / "model") / "vae"
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
    put(folder, "stand-in/lora", _lora(tmp_path_factory.mktemp("lora"), saved))
    return folder


def _lora(folder: Path, model: Path) -> Path:
    """A repository as those of LCM-LoRA are: one file of that name, no config; it changes one attention layer."""
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    outside, inside = load_file(model / "unet" / "diffusion_pytorch_model.safetensors")[f"{layer}.weight"].shape
    rng = np.random.default_rng(0)
    sides = {"lora_down": (2, inside), "lora_up": (outside, 2)}
    name = f"lora_unet_{layer.replace('.', '_')}"
    tensors = {f"{name}.{side}.weight": rng.standard_normal(s).astype(np.float32) for side, s in sides.items()}
    save_file({**tensors, f"{name}.alpha": np.array(2, np.float32)}, folder / LORA)
    (folder / "README.md").write_text("---\nlicense: openrail++\n---\n", encoding="utf-8")
    return folder


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
    assert "not yet: reading released VAEs whose decoder is narrower" in text
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
        ({"parts": [LORA]}, "name the base"),
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


def test_the_mac_job_says_not_yet_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffship.core.registry import EXPORTERS

    if "coreml" in EXPORTERS:
        pytest.skip("the Core ML exporter exists")
    assert prove_real.main(["--only", "bk-sdm-tiny", "--to", "coreml", "--out", str(tmp_path / "out")]) == 0
    assert "bk-sdm-tiny: not yet: Core ML export" in capsys.readouterr().out
    assert rows_by_metric(tmp_path, "bk-sdm-tiny")["proved"].status == "unsupported"


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
        row("lora", repo="stand-in/lora", parts=[LORA], base="tiny", sampler="lcm", guidance=1.0, steps=2),
        row("pickled", repo="stand-in/pickles"),
        row("later", needs=["onnx", "video"]),
    )
    words = real(tmp_path, cache, "--only", "tiny,vae,lora,pickled,later", catalogue=catalogue)
    assert prove_real.main(words) == 0
    text = capfd.readouterr().out
    assert "pickled: fetch: blocked: only pickles in unet" in text and "later: not yet: video models" in text
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
    assert rows_by_metric(tmp_path, "lora")["proved"].value == 1
    manifest = Bundle.open(tmp_path / "out" / "lora" / "bundle").manifest
    assert manifest.sampler["_class_name"] == "LCMScheduler" and manifest.family.steps_default == 2
    pictures = [(tmp_path / "out" / name / "picture.png").read_bytes() for name in ("tiny", "vae", "lora")]
    assert all(picture.startswith(b"\x89PNG") for picture in pictures) and len(set(pictures)) == 3

    begun = time.monotonic()
    assert prove_real.main(words) == 0
    assert capfd.readouterr().out.count("done before, kept") == 3 * len(ORDER) + 2, "the base of two is kept too"
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
