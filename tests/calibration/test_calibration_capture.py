"""Capture on a tiny model: what is noted, what is kept, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from diffship.calibration import capture as room
from diffship.calibration.capture import Capture, calibrate, layer_widths
from diffship.calibration.prompts import built_in, chosen
from diffship.calibration.stored import Calibration, calibration_digest, read_calibration, write_calibration
from diffship.cli.main import main
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.sampling.generate import start
from diffship.sampling.loop import denoise, denoiser_of

PROMPTS = ("red apple", "black cat", "an old bridge")
LAYERS = ("down_blocks.0.resnets.0.conv1", "up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
ASKED = Capture(PROMPTS, steps=2, guidance=4.0, size=64, batch=2, parts=("unet", "text_encoder"))


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return open_source("arch:tiny-sd")


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("work") / "kept"


@pytest.fixture(scope="module")
def made(tiny: Pipeline, work: Path) -> Calibration:
    return calibrate(tiny, ASKED, Job(work))


@pytest.mark.slow
def test_ranges_are_those_that_other_hooks_see(tiny: Pipeline, made: Calibration) -> None:
    """The same pictures, drawn one at a time by the loop that draws pictures."""
    import torch

    found: dict[str, list[Any]] = {layer: [] for layer in LAYERS}
    with PipelineModel(tiny) as model:
        module = model.use("unet")._module
        for layer in LAYERS:
            taken = found[layer]
            module.get_submodule(f"inner.{layer}").register_forward_pre_hook(
                lambda _, x, taken=taken: taken.append(x[0])
            )
        for i, request in enumerate(ASKED.requests()):
            assert request.seed == i
            denoise([start(model, request)[0]], denoiser_of(model))
    for layer in LAYERS:
        seen = made.parts["unet"].layers[layer]
        n = len(found[layer]) // len(PROMPTS)  # the sampler of this model calls once more than it steps
        calls = [torch.stack(found[layer][step::n]) for step in range(n)]
        assert np.allclose(seen.low, [float(x.min()) for x in calls], atol=1e-4)
        assert np.allclose(seen.high, [float(x.max()) for x in calls], atol=1e-4)
        assert calls[0].shape[1] == 2, "both halves of guidance are in one call"
        assert seen.count.tolist() == [2] * n, "two batches"
        assert seen.counts.sum(axis=1).tolist() == [x.numel() for x in calls]
        everything = torch.cat([x.movedim(2, -1).flatten(0, -2) if x.ndim == 5 else x.flatten(0, -2) for x in calls])
        assert np.allclose(seen.channels, everything.abs().amax(0).numpy(), atol=1e-4)
        distances = torch.cdist(
            torch.from_numpy(seen.rows), everything, compute_mode="donot_use_mm_for_euclid_dist"
        ).amin(1)
        assert len(seen.rows) == n * 2 * 4 and float(distances.max()) < 1e-3, "rows are inputs that were seen"


def test_text_is_seen_once_a_picture(tiny: Pipeline, made: Calibration) -> None:
    layers = made.parts["text_encoder"].layers
    assert set(layers) == set(layer_widths(tiny.components["text_encoder"]))
    assert {one.calls for one in layers.values()} == {1}


@pytest.mark.slow
def test_what_was_measured_is_not_measured_again(
    tiny: Pipeline, made: Calibration, work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "start", lambda *_: pytest.fail("it was drawn again"))
    again = calibrate(tiny, ASKED, Job(work))
    seen, first = (one.parts["unet"].layers[LAYERS[0]] for one in (again, made))
    assert np.array_equal(seen.counts, first.counts) and again.drawn.prompts == PROMPTS


def test_a_file_gives_back_what_was_written(made: Calibration, tmp_path: Path) -> None:
    write_calibration(made, tmp_path / "cal")
    found = read_calibration(tmp_path / "cal")
    assert found.drawn == made.drawn and len(calibration_digest(tmp_path / "cal")) == 64
    for name, part in made.parts.items():
        assert found.of(name, part.digest).keys() == part.layers.keys()
        for layer, one in part.layers.items():
            assert all(
                np.array_equal(value, vars(found.parts[name].layers[layer])[key]) for key, value in vars(one).items()
            )


def test_other_models_and_damage_are_refused(made: Calibration, tmp_path: Path) -> None:
    home = tmp_path / "cal"
    write_calibration(made, home)
    with pytest.raises(ConfigError, match=r"is of another unet \(of arch:tiny-sd\). Run: diffship calibrate"):
        made.of("unet", "0" * 64)
    with pytest.raises(ConfigError, match="has no ranges of vae_decoder; it has unet, text_encoder"):
        made.of("vae_decoder", "0" * 64)
    file = home / "unet.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    with pytest.raises(ConfigError, match=r"damaged: its hash is not that in calibration\.json"):
        read_calibration(home)
    file.write_bytes(whole)
    table = json.loads((home / "calibration.json").read_text())
    table["parts"]["unet"]["edges"].popitem()
    (home / "calibration.json").write_text(json.dumps(table))
    with pytest.raises(ConfigError, match=r"is missing, or not in calibration\.json"):
        read_calibration(home)
    (home / "calibration.json").write_text(json.dumps({**table, "schema": 2}))
    with pytest.raises(ConfigError, match="schema '2' is not 1, which this reads"):
        read_calibration(home)
    with pytest.raises(ConfigError, match="nowhere"):
        read_calibration(tmp_path / "nowhere")


def test_the_built_in_prompts_are_all_different_and_so_are_the_first() -> None:
    known = built_in()
    assert len(set(known)) == len(known) == 297
    assert chosen(None, 3) == known[:3]


def test_prompts_that_cannot_be_used_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"

    def refused(data: bytes, *words: str) -> str:
        file.write_bytes(data)
        code = main(["calibrate", "arch:tiny-sd", "--prompts", str(file), "-o", str(tmp_path / "cal"), *words])
        assert code == 2 and not (tmp_path / "cal").exists()
        return capsys.readouterr().err

    assert "has none; write one a line" in refused(b"")
    assert "is not UTF-8 text" in refused(b"\xff\xfe\x00")
    assert "has 1 prompts; 64 samples need as many. Use --samples 1" in refused(b"red apple\n")
    assert "samples is 0; legal is a whole number from 1 to 4096" in refused(b"red apple\n", "--samples", "0")
    assert "unet" in refused(b"red apple\n", "--samples", "1", "--parts", "unte")
