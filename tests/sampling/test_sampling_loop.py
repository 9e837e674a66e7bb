"""The loop: batches of mixed steps and samplers, bit-equal to singles; guidance; torch arrays."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from sampling_toy import ToyModel, toy_for, unet

from diffship.core.errors import Cancelled, ConfigError
from diffship.core.family import Family
from diffship.core.registry import kind
from diffship.sampling.generate import Request, start
from diffship.sampling.guidance import guidance_embedding, guide
from diffship.sampling.kernel import apply_matrix
from diffship.sampling.loop import advance, denoise, denoiser_of, plain
from diffship.sampling.samplers import SAMPLERS
from diffship.sampling.trajectory import Trajectory, as_numpy


def one(name: str, steps: int, seed: int, guidance: float = 5.0, model: ToyModel | None = None) -> Trajectory:
    return start(model or toy_for(name), Request(f"p{seed}", sampler=name, steps=steps, seed=seed, guidance=guidance))[
        0
    ]


@pytest.mark.slow
def test_a_mixed_batch_equals_singles_bit_for_bit() -> None:
    denoiser = denoiser_of(ToyModel())
    batch = [one(name, 4 + i, i, guidance=(1.0, 3.0, 7.5)[i % 3]) for i, name in enumerate(SAMPLERS)]
    batch[2] = denoise([batch[2]], denoiser, until=2)[0]
    together = denoise(batch, denoiser)
    for before, after in zip(batch, together, strict=True):
        alone = denoise([before], denoiser)[0]
        assert after.done
        assert np.array_equal(alone.latents, after.latents)


def test_denoise_equals_repeated_advance_and_keeps_its_input() -> None:
    denoiser = denoiser_of(ToyModel())
    batch = [one("pndm", 5, 1)]
    before = batch[0].latents.copy()
    current = batch
    seen: list[int] = []
    while not current[0].done:
        current = advance(current, denoiser)
    end = denoise(batch, denoiser, on_step=lambda now: seen.append(now[0].step))
    assert np.array_equal(end[0].latents, current[0].latents)
    assert np.array_equal(batch[0].latents, before)
    assert seen == [1, 2, 3, 4, 5, 6]
    with pytest.raises(ConfigError, match="last step"):
        advance(end, denoiser)


def test_cancel_between_calls() -> None:
    seen: list[int] = []
    denoiser = denoiser_of(ToyModel())
    with pytest.raises(Cancelled):
        denoise([one("ddim", 9, 1)], denoiser, None, lambda now: seen.append(now[0].step), lambda: len(seen) == 4)
    assert seen == [1, 2, 3, 4]


def test_embeddings_are_put_once_while_the_batch_stays() -> None:
    runner = ToyModel().use("unet")
    denoiser = plain(runner, kind("sd"))
    denoise([one("ddim", 6, 1), one("ddim", 6, 2)], denoiser)
    assert runner.puts == 1
    assert [call["sample"][0] for call in runner.calls] == [4] * 6
    denoise([one("ddim", 3, 3)], denoiser)
    assert runner.puts == 2


def test_different_sizes_do_not_share_a_call() -> None:
    model = ToyModel()
    batch = [one("ddim", 4, 1), start(model, Request("x", size=(128, 64)))[0]]
    with pytest.raises(ConfigError, match="different shapes"):
        advance(batch, denoiser_of(model))


def test_guidance_rows_are_negatives_first() -> None:
    batch = [one("ddim", 4, 1, guidance=3.0), one("ddim", 4, 2, guidance=1.0), one("ddim", 4, 3, guidance=2.0)]
    rows = np.arange(5, dtype=np.float32)[:, None]
    assert [float(row[0]) for row in guide(batch, rows)] == [0 + 3 * 2, 3, 1 + 2 * 3]


def test_a_denoiser_must_answer_for_all() -> None:
    with pytest.raises(ConfigError, match="outputs"):
        advance([one("ddim", 4, 1)], lambda batch: [])


@pytest.mark.parametrize(("guidance", "width"), [(8.5, 256), (1.0, 256), (14.99, 256), (4.0, 33), (4.0, 4)])
def test_guidance_embedding_equals_diffusers(guidance: float, width: int) -> None:
    w = torch.tensor(guidance - 1).repeat(1)
    theirs = StableDiffusionPipeline.get_guidance_scale_embedding(None, w, embedding_dim=width)[0].numpy()
    # the argument is up to 14 000 radians in float32: one ulp of it is 1e-3
    assert np.abs(guidance_embedding(guidance - 1, width) - theirs).max() <= 1e-3


def test_guidance_embedding_has_its_closed_form() -> None:
    """In float64, element by element: sin and cos of 1000 w times 10000^(-j / (half - 1))."""
    w, half = 7.5, 128
    angles = [1000 * w * math.exp(-math.log(10_000) * j / (half - 1)) for j in range(half)]
    wanted = [*map(math.sin, angles), *map(math.cos, angles)]
    assert np.abs(guidance_embedding(w, 2 * half) - np.array(wanted)).max() <= 1e-3  # float32 holds 7500 to 5e-4
    assert np.abs(guidance_embedding(0.0, 4) - np.array([0, 0, 1, 1])).max() == 0


@pytest.mark.parametrize("width", [1, 2, 3])
def test_a_guidance_embedding_without_two_frequencies_is_refused(width: int) -> None:
    with pytest.raises(ConfigError, match="legal is 4 or more"):
        guidance_embedding(3.0, width)
    with pytest.raises(ConfigError, match=r"time_cond_dim is .*legal is from 4"):
        Family("sd", time_cond_dim=width)


def test_any_array_becomes_float32_numpy() -> None:
    values = torch.tensor([1.5, -2.0], requires_grad=True)
    for array in (values, values.to(torch.bfloat16), values.half(), [1.5, -2.0], np.array([1.5, -2.0])):
        found = as_numpy(array)
        assert found.dtype == np.float32 and found.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("name", SAMPLERS)
def test_torch_latents_take_the_same_steps(name: str) -> None:
    from dataclasses import replace

    trajectory = one(name, 5, 4)
    as_torch = replace(trajectory, latents=torch.from_numpy(trajectory.latents))

    def torch_unet(feeds: dict[str, Any]) -> Any:
        return torch.from_numpy(unet({key: np.asarray(value) for key, value in feeds.items()})["out_sample"])

    def in_torch(batch: Any) -> Any:
        conditions = np.stack([side["encoder_hidden_states"] for side in (batch[0].negative, batch[0].positive)])
        now = batch[0].sampler.coefficients(batch[0].step, batch[0].steps, len(batch[0].history))
        sample = torch.stack([batch[0].latents * now.input_scale] * 2)
        feeds = {
            "sample": sample,
            "timestep": np.full(2, now.timestep, np.float32),
            "encoder_hidden_states": conditions,
        }
        return guide(batch, torch_unet(feeds))

    end = denoise([as_torch], in_torch)[0]
    assert isinstance(end.latents, torch.Tensor)
    plain_end = denoise([trajectory], denoiser_of(ToyModel()))[0]
    assert np.array_equal(end.latents.numpy(), plain_end.latents)


def test_half_precision_is_widened_before_it_is_multiplied() -> None:
    half = np.full((2, 2), 1.0009765625, np.float16)
    (out,) = apply_matrix(((1.0, 1e-4, 0.0),), half, half, None)
    assert out.dtype == np.float32
    assert np.array_equal(out, half.astype(np.float32) + half.astype(np.float32) * np.float32(1e-4))
    (wide,) = apply_matrix(((0.0, 0.5, 0.0),), torch.ones(2), torch.ones(2, dtype=torch.float16), None)
    assert wide.dtype == torch.float32
