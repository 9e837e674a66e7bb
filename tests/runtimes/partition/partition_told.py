"""Toy stages that read a prompt, and trajectories that have one; no pytest, because ranks of a run import it too."""

from __future__ import annotations

from typing import Any

import numpy as np
from partition_oracle import Toy, toys
from sampling_toy import SD

from diffship.core.spec import TensorSpec
from diffship.sampling.rng import make_noise
from diffship.sampling.samplers import make_sampler
from diffship.sampling.trajectory import Conditioning, Trajectory

WORDS = "encoder_hidden_states"


class Told(Toy):
    """A stage that also adds what its row is told; it keeps the rows of each call."""

    rows: list[int]

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (*super().inputs, TensorSpec(WORDS, "float32", ("batch_size", "n", 2)))

    def run(self, feeds: Any) -> dict[str, Any]:
        words = feeds[WORDS].value
        self.rows.append(len(words))
        rest = {name: feed for name, feed in feeds.items() if name != WORDS}
        made = Toy(self.name, self.reads, self.writes, self.gain).run(rest)
        push = words.mean(axis=(1, 2), keepdims=True)[..., None]
        return {name: array + push for name, array in made.items()}


def told(devices: int) -> list[Told]:
    stages = [Told(toy.name, toy.reads, toy.writes, toy.gain) for toy in toys(devices)[0]]
    for stage in stages:
        stage.rows = []
    return stages


def said(seed: int, guidance: float, steps: int = 5) -> Trajectory:
    words = np.random.default_rng(seed).random((2, 3, 2), np.float32)
    positive, negative = (Conditioning({WORDS: row}) for row in words)
    latents = np.random.default_rng(seed).standard_normal((4, 4, 4)).astype(np.float32)
    sampler, noise = make_sampler(SD, "dpmpp-2m"), make_noise("philox", seed, 0)
    return Trajectory(latents, 0, steps, sampler, noise, (32, 32), guidance, positive, negative)
