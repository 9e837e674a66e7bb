"""Stages of real U-Nets, tiny, on torch: the exact cases are exact, and threads change no bit."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest

from diffship.core.kind import Kind
from diffship.core.registry import kind
from diffship.models.parts.component import Component
from diffship.models.sources.opening import open_source
from diffship.models.walks.cuts import find_cuts, partition
from diffship.runtimes.partition.denoiser import simulate, threads
from diffship.runtimes.partition.placement import Placement, place
from diffship.runtimes.partition.timetable import Scheme
from diffship.sampling.loop import denoise, plain
from diffship.sampling.rng import make_noise
from diffship.sampling.samplers import make_sampler
from diffship.sampling.trajectory import Conditioning, Trajectory

pytest.importorskip("torch")
NAMES = ("tiny-sd", "tiny-sdxl", "tiny-lcm")


@cache
def opened(name: str) -> tuple[Component, Any]:
    pipeline = open_source(f"arch:{name}")
    return pipeline.components["unet"], make_sampler(pipeline.scheduler)


def kind_of(name: str) -> Kind:
    return kind("sdxl" if name == "tiny-sdxl" else "sd")


@cache
def staged(name: str, stages: int) -> tuple[Placement, tuple[Any, ...]]:
    component, _ = opened(name)
    cuts = find_cuts(component, stages)
    parts = partition(component, cuts)
    return place(parts, cuts.homes), tuple(part.load() for part in parts)


def drawn(name: str, steps: int, seed: int) -> Trajectory:
    component, sampler = opened(name)
    rng = np.random.default_rng(seed)
    width = {spec.name: int(spec.shape[-1]) for spec in component.inputs if isinstance(spec.shape[-1], int)}

    def condition() -> Conditioning:
        rows = {field: rng.random(width[field], np.float32) for field in ("text_embeds", "time_ids") if field in width}
        states = rng.random((5, width["encoder_hidden_states"]), np.float32)
        return Conditioning({"encoder_hidden_states": states, **rows})

    latents = rng.standard_normal((4, 8, 16)).astype(np.float32) * sampler.init_noise_sigma(steps)
    negative = None if "timestep_cond" in width else condition()
    return Trajectory(latents, 0, steps, sampler, make_noise("torch", seed, 0), (128, 64), 4.0, condition(), negative)


def worst(found: list[Trajectory], expected: list[Trajectory]) -> float:
    return max(float(np.abs(a.latents - b.latents).max()) for a, b in zip(found, expected, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_a_full_warm_up_is_the_plain_picture_and_threads_are_the_simulation(name: str, stages: int) -> None:
    batch = [drawn(name, 4, seed) for seed in range(2)]
    whole = denoise(batch, plain(opened(name)[0].load(), kind_of(name)))
    if stages == 1:
        with opened(name)[0].load() as runner:
            only = place([OnlyStage(runner)], [0])
            assert worst(denoise(batch, simulate(only, [runner], kind=kind_of(name))), whole) == 0.0
        return
    placement, runners = staged(name, stages)
    assert worst(denoise(batch, simulate(placement, runners, Scheme(2, 9), kind=kind_of(name))), whole) == 0.0
    stale = denoise(batch, simulate(placement, runners, Scheme(2, 1), kind=kind_of(name)))
    with threads(placement, runners, Scheme(2, 1), timeout=60, kind=kind_of(name)) as denoiser:
        assert worst(denoise(batch, denoiser), stale) == 0.0
    assert worst(stale, whole) > 0.0


class OnlyStage:
    """A whole U-Net as the only stage."""

    def __init__(self, runner: Any) -> None:
        self.name, self.inputs, self.outputs = "unet", runner.inputs, runner.outputs
