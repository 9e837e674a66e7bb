"""Gradients for structural pruning: the batch, the loss, the timesteps, and scores beside autograd."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from numpy.typing import NDArray
from PIL import Image
from structural_cases import outputs, small_model, with_pictures
from torch import nn

from diffship.compression import structural, taylor
from diffship.compression.narrow import interiors
from diffship.compression.structural import PrunePass
from diffship.compression.taylor import Examples, drawn, examples, until_small
from diffship.compression.traced import Interior
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.training.paired import PairedPictures


@pytest.fixture(scope="module")
def small() -> Pipeline:
    return small_model()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def batch(small: Pipeline, pictures: Path) -> Examples:
    return examples(small, PairedPictures.open(pictures, 64), [2, 0], seed=5)


def test_examples_are_the_pictures_in_latent_space(small: Pipeline, pictures: Path, batch: Examples) -> None:
    family = small.family
    assert batch.clean.shape == batch.noise.shape == (2, family.latent_channels, 64 // family.vae_factor, 8)
    image = np.asarray(Image.open(pictures / "2.png"), np.float32).transpose(2, 0, 1)[None] / 127.5 - 1
    made = small.components["vae_encoder"].load().run({"sample": image})["latent_parameters"]
    mean, spread = np.split(np.asarray(made)[0], 2)
    deviations = (batch.clean[0].numpy() / family.scaling_factor - mean) / np.exp(0.5 * np.clip(spread, -30, 20))
    assert np.abs(deviations).max() < 5 and 0.7 < deviations.std() < 1.3  # a draw from the posterior
    text = PipelineModel(small)
    ids = text.tokenizers["tokenizer"](["noise number 2", "noise number 0"]).ids
    expected = [text.use("text_encoder").run({"input_ids": row[None]})["last_hidden_state"][0] for row in ids]
    np.testing.assert_array_equal(batch.conditions[0].numpy(), np.stack(expected))


def test_the_batch_is_drawn_by_the_seed(pictures: Path) -> None:
    data = PairedPictures.open(pictures, 64)
    assert drawn(data, 3, 1) == drawn(data, 3, 1)
    assert len(set(drawn(data, 4, 1))) == 4
    assert len({tuple(drawn(data, 3, seed)) for seed in range(6)}) > 1


@pytest.mark.slow
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_that_of_diffusers(small: Pipeline, batch: Examples, prediction: str) -> None:
    scheduler = DDPMScheduler.from_config({**small.scheduler, "prediction_type": prediction})
    module = small.components["unet"].module()
    asked = replace(batch, prediction=prediction)
    for step in (0, 400, 999):
        times = torch.tensor([step, step])
        with torch.no_grad():
            noisy = scheduler.add_noise(batch.clean, batch.noise, times)
            made = module.get_submodule("inner")(noisy, times, batch.conditions[0]).sample
        velocity = scheduler.get_velocity(batch.clean, batch.noise, times)
        target = {"epsilon": batch.noise, "v_prediction": velocity, "sample": batch.clean}[prediction]
        loss = asked.backward(module.requires_grad_(True), step)
        assert loss == pytest.approx(nn.functional.mse_loss(made, target).item(), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("criterion", ["taylor", "diff-pruning"])
def test_gradient_scores_are_those_of_autograd(
    small: Pipeline, pictures: Path, criterion: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights times summed gradients of two timesteps, by `torch.autograd.grad` over the summed loss."""
    recorded: dict[str, NDArray[np.float64]] = {}
    monkeypatch.setattr(
        PrunePass, "_kept", lambda self, pipeline, found, scores: recorded.update(scores) or _all(found)
    )
    step = PrunePass(
        keep=0.5, criterion=criterion, data=str(pictures), batch=2, stride=500, seed=3, threshold=0.0, layers=("heads",)
    )
    step.run(small, Job())
    data = PairedPictures.open(pictures, 64)
    batch = examples(small, data, drawn(data, 2, 3), 3)
    module = small.components["unet"].module()
    for one in (
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1",
        "up_blocks.1.attentions.1.transformer_blocks.0.attn2",
    ):
        layers = [module.get_submodule(f"inner.{one}.{part}") for part in ("to_q", "to_k", "to_v", "to_out.0")]
        weights = [layer.weight.requires_grad_(True) for layer in layers]
        total = torch.zeros(())
        for at in (0, 500):
            alpha = batch.alphas[at]
            noisy = alpha.sqrt() * batch.clean + (1 - alpha).sqrt() * batch.noise
            made = module(noisy, torch.tensor([float(at)] * 2), *batch.conditions)[0]
            total = total + nn.functional.mse_loss(made, batch.noise)
        products = [(w * g).detach() for w, g in zip(weights, torch.autograd.grad(total, weights), strict=True)]
        products[3] = products[3].T
        parts = [p.sum(1).abs() if criterion == "taylor" else p.abs().sum(1) for p in products]
        heads = interiors(small.components["unet"]).heads[one]
        expected = torch.stack(parts).mean(0).reshape(heads, -1).mean(1)
        np.testing.assert_allclose(recorded[one], expected.numpy(), rtol=1e-3, atol=1e-9)


def _all(found: list[Interior]) -> Mapping[str, NDArray[np.intp]]:
    return {one.name: np.arange(len(one.units)) for one in found}


def test_timesteps_end_where_the_loss_is_small() -> None:
    sequence = [0.5, 1.0, 0.4, 0.06, 0.049, 0.9, 0.01]
    asked: list[int] = []

    def losses() -> Iterator[tuple[int, float]]:
        for step, loss in enumerate(sequence):
            asked.append(step)
            yield step * 10, loss

    taken = until_small(losses(), 0.05)
    assert taken == [(0, 0.5), (10, 1.0), (20, 0.4), (30, 0.06), (40, 0.049)]
    assert asked == [0, 1, 2, 3, 4]  # nothing is computed after the stop
    assert len(until_small(losses(), 0.0)) == len(sequence)
    assert len(until_small(enumerate([0.04, 1.0, 0.5]), 0.05)) == 3  # small beside what comes later does not count


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_are_refused(loss: float) -> None:
    with pytest.raises(ConfigError, match="the loss at timestep 1 is"):
        until_small(enumerate([1.0, loss]), 0.05)


@pytest.mark.slow
def test_scores_are_kept_for_the_next_start(
    small: Pipeline, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"criterion": "diff-pruning", "data": str(pictures), "batch": 2, "stride": 250, "seed": 1}
    step = PrunePass(keep=0.5, layers=("inner",), **options)
    heard: list[tuple[str, int, int]] = []
    first = step.run(small, Job(tmp_path, progress=lambda *said: heard.append(said)))
    entry = first.history[-1]
    assert (entry["criterion"], entry["threshold"], entry["seed"], entry["keep"]) == ("diff-pruning", 0.05, 1, 0.5)
    assert entry["data"] == pictures.name and entry["data_digest"] == PairedPictures.open(pictures, 64).digest
    assert entry["timesteps"] == entry["last_timestep"] // 250 + 1 and all(loss > 0 for loss in entry["losses"])
    heard = [entry for entry in heard if entry[0].startswith("prune")]  # the reader tells what it found, too
    assert heard[0] == ("prune: diff-pruning", 0, 4) and heard[-1] == ("prune: diff-pruning", 4, 4)
    monkeypatch.setattr(taylor.Examples, "backward", lambda *_: pytest.fail("computed again"))
    again = step.run(small, Job(tmp_path))
    assert again.history == first.history
    more = replace(step, keep=None, parameters=0.8, ranking="global").run(small, Job(tmp_path)).history[-1]
    assert more["losses"] == entry["losses"] and more["parameters"] > entry["parameters"]
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        replace(step, seed=2).run(small, Job(tmp_path))
    monkeypatch.setattr(structural, "__version__", "0.0")
    with pytest.raises(pytest.fail.Exception, match="computed again"):
        step.run(small, Job(tmp_path))
    name = "down_blocks.0.resnets.0.conv1.weight"
    first_read, again_read = (one.components["unet"].weights.read(name) for one in (first, again))
    np.testing.assert_array_equal(first_read, again_read)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["arch:tiny-sdxl", "arch:tiny-lcm"])
def test_gradients_of_models_with_more_conditions(source: str, pictures: Path) -> None:
    pipeline = open_source(source)
    step = PrunePass(keep=0.5, criterion="taylor", data=str(pictures), batch=2, stride=500)
    assert step.check(pipeline) == []
    made = step.run(pipeline, Job())
    assert made.history[-1]["timesteps"] == 2
    assert np.isfinite(outputs(made.components["unet"])).all()
