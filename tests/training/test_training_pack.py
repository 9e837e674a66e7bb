"""A packed family is a diffusers folder that stock pipelines open."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffship.core.errors import ConfigError
from diffship.training.commands import run
from diffship.training.emoji_stages import encode, new_text_encoder, new_unet, new_vae
from diffship.training.judge_model import Judge, JudgeConfig, load_judge
from diffship.training.loop import Schedule, train
from diffship.training.options import TrainOptions
from diffship.training.pictures import Pictures
from diffship.training.vocabulary import train_vocabulary


class _Untrained:
    def __init__(self, **modules: torch.nn.Module) -> None:
        self.modules = modules

    def loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        raise AssertionError("no step is asked for")


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    runs, folder = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("packed") / "emoji"
    torch.manual_seed(0)
    size = train_vocabulary(["red apple", "green apple"] * 2, 300, runs / "emoji-unet" / "tokenizer")
    none = Schedule(steps=0, batch=1, rate=1e-3)
    train(_Untrained(unet=new_unet(), text_encoder=new_text_encoder(size)), none, runs / "emoji-unet")
    train(_Untrained(judge=Judge(JudgeConfig(vocabulary=size))), none, runs / "judge")
    (runs / "emoji-vae").mkdir()
    save_file({k: v.contiguous() for k, v in new_vae().state_dict().items()}, runs / "emoji-vae" / "vae.safetensors")
    save_file({"mean": torch.randn(2, 4, 16, 16) * 2}, runs / "emoji-unet" / "latents.safetensors")
    report = run("emoji-pack", TrainOptions(data=runs, out=folder))
    assert report["unet_steps"] == report["judge_steps"] == 0
    return folder


@pytest.mark.slow
def test_stock_diffusers_opens_it_and_draws(packed: Path) -> None:
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(packed)
    pipeline.set_progress_bar_config(disable=True)
    picture = pipeline("red apple", num_inference_steps=1, height=64, width=64, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all()
    assert pipeline.vae.config.scaling_factor == pytest.approx(0.5, rel=0.1)
    assert pipeline.tokenizer.model_max_length == 77


def test_the_text_encoder_has_its_classic_names_in_fp16(packed: Path) -> None:
    tensors = load_file(packed / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in tensors)
    assert {value.dtype for value in tensors.values()} == {torch.float16}
    assert json.loads((packed / "text_encoder" / "config.json").read_text(encoding="utf-8"))["dtype"] == "float32"


def test_the_judge_lies_beside_it(packed: Path) -> None:
    judge = load_judge(packed / "judge")
    assert judge.see(torch.zeros(1, 3, 128, 128)).norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.slow
def test_unpacked_weights_go_on_and_pack_to_the_same_files(packed: Path, tmp_path: Path) -> None:
    runs, again = tmp_path / "runs", tmp_path / "again"
    shutil.copytree(packed, tmp_path / "packed")
    file = tmp_path / "packed" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(file), file, {"format": "pt", "steps": "946"})
    assert run("emoji-unpack", TrainOptions(data=tmp_path / "packed", out=runs))["unet_steps"] == 946
    save_file({"mean": torch.randn(2, 4, 16, 16)}, runs / "emoji-unet" / "latents.safetensors")
    state = load_file(runs / "emoji-unet" / "state.safetensors")
    assert {name.split("/")[0] for name in state} == {"live", "average"}
    assert run("emoji-pack", TrainOptions(data=runs, out=again))["unet_steps"] == 946
    for name in ("unet/diffusion_pytorch_model", "text_encoder/model", "judge/model"):
        assert _equal(packed / f"{name}.safetensors", again / f"{name}.safetensors"), name


def _equal(first: Path, second: Path) -> bool:
    one, two = load_file(first), load_file(second)
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.slow
def test_unpacking_refuses_a_wrong_folder_and_existing_runs(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a packed family"):
        run("emoji-unpack", TrainOptions(data=tmp_path, out=tmp_path / "runs"))
    run("emoji-unpack", TrainOptions(data=packed, out=tmp_path / "runs"))
    with pytest.raises(ConfigError, match="has a checkpoint already"):
        run("emoji-unpack", TrainOptions(data=packed, out=tmp_path / "runs"))


def test_latents_of_another_autoencoder_or_of_other_pictures_are_made_anew(tmp_path: Path) -> None:
    vae, rows = new_vae().eval(), [{"concept": "a"}, {"concept": "b"}]
    pictures = Pictures(np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8), rows)
    first, _ = encode(vae, pictures, tmp_path)
    stamp = (tmp_path / "latents.safetensors").stat().st_mtime_ns
    again, _ = encode(vae, pictures, tmp_path)
    assert torch.equal(first.mean, again.mean) and (tmp_path / "latents.safetensors").stat().st_mtime_ns == stamp
    with torch.no_grad():
        vae.quant_conv.weight.mul_(1.5)
    trained, _ = encode(vae, pictures, tmp_path)
    other, _ = encode(vae, Pictures(255 - pictures.pixels, rows), tmp_path)
    assert not torch.equal(first.mean, trained.mean) and not torch.equal(trained.mean, other.mean)
