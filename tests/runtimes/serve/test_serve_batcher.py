"""Who shares a model call: groups, turns, isolation. No thread, no clock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from sampling_toy import ToyModel

from diffship.core.errors import RunnerError
from diffship.runtimes.serve.batcher import Batcher, Strand
from diffship.sampling.generate import Request, start
from diffship.sampling.guidance import group_key
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.trajectory import Conditioning, Trajectory

MODEL = ToyModel()


def trajectory(prompt: str = "cat", size: int = 64, steps: int = 4, **words: Any) -> Trajectory:
    return start(MODEL, Request(prompt, size=(size, size), steps=steps, **words))[0]


def strand(owner: object, **words: Any) -> Strand:
    made = trajectory(**words)
    return Strand(made, made.calls, owner)


class Recorder:
    """A denoiser that writes down who shared a call; `broken` prompts make a call of them fail."""

    def __init__(self, broken: str = "") -> None:
        self.calls: list[list[tuple[str, int]]] = []
        self.broken = broken

    def __call__(self, batch: Sequence[Trajectory]) -> list[Any]:
        self.calls.append([(entry.prompt, entry.step) for entry in batch])
        if self.broken and any(entry.prompt == self.broken for entry in batch):
            raise RunnerError("not finite")
        assert len({entry.latents.shape for entry in batch}) == 1
        return [np.zeros_like(entry.latents) for entry in batch]


def run(batcher: Batcher, limit: int = 1000) -> int:
    for turn in range(limit):
        if not batcher.step():
            return turn
    raise AssertionError("it does not end")


def test_one_size_shares_every_call() -> None:
    denoiser = Recorder()
    batcher = Batcher(denoiser, 8)
    batcher.add(strand(i, prompt=f"p{i}") for i in range(5))
    assert run(batcher) == 4 and len(batcher) == 0
    assert [len(call) for call in denoiser.calls] == [5, 5, 5, 5]


def test_requests_join_at_any_step_and_keep_their_own() -> None:
    denoiser = Recorder()
    batcher = Batcher(denoiser, 8)
    batcher.add([strand(0, prompt="early")])
    batcher.step()
    batcher.step()
    batcher.add([strand(1, prompt="late", steps=2)])
    batcher.step()
    assert denoiser.calls[-1] == [("early", 2), ("late", 0)]


@pytest.mark.parametrize("kind", ["sd", "sdxl", "lcm"])
def test_a_batch_of_mixed_steps_samplers_and_guidance_equals_each_alone(kind: str) -> None:
    model = ToyModel(kind)
    words = [
        {"steps": 4, "sampler": "euler", "guidance": 3.0},
        {"steps": 3, "sampler": "ddim", "guidance": 1.0},
        {"steps": 5, "sampler": "dpmpp-2m", "guidance": 7.5, "seed": 9},
    ]
    begun = [start(model, Request("cat", **entry))[0] for entry in words]  # type: ignore[arg-type]
    strands = [Strand(made, made.calls, place) for place, made in enumerate(begun)]
    batcher = Batcher(denoiser_of(model), 8)
    batcher.add(strands[:1])
    batcher.step()
    batcher.add(strands[1:])
    run(batcher)
    for made, alone in zip(strands, begun, strict=True):
        expected = denoise([alone], denoiser_of(ToyModel(kind)))[0]
        np.testing.assert_allclose(made.trajectory.latents, expected.latents, atol=1e-5)


def test_a_call_never_holds_more_than_the_batch_and_strands_take_turns() -> None:
    denoiser = Recorder()
    batcher = Batcher(denoiser, 3)
    strands = [strand(i, prompt=f"p{i}", steps=6) for i in range(5)]
    batcher.add(strands)
    for _ in range(5):
        batcher.step()
        steps = [entry.trajectory.step for entry in strands]
        assert max(steps) - min(steps) <= 1
    assert {len(call) for call in denoiser.calls} == {3}


def test_sizes_take_turns_so_that_a_rare_one_is_not_starved() -> None:
    denoiser = Recorder()
    batcher = Batcher(denoiser, 8)
    batcher.add(strand(i, prompt="common", steps=6) for i in range(8))
    batcher.add([strand(9, prompt="rare", size=128, steps=6)])
    for _ in range(6):
        batcher.step()
    assert Counter(call[0][0] for call in denoiser.calls) == {"common": 3, "rare": 3}


def test_guided_and_unguided_share_a_group_but_other_conditioning_does_not() -> None:
    plainly, guided = trajectory(guidance=1.0), trajectory(guidance=5.0)
    assert group_key(plainly) == group_key(guided)
    assert plainly.positive is not None
    from dataclasses import replace

    short = replace(plainly, positive=Conditioning({name: array[:9] for name, array in plainly.positive.items()}))
    assert group_key(short) != group_key(plainly)
    assert group_key(trajectory(size=128)) != group_key(plainly)


def test_room_is_what_one_call_of_that_size_has_left() -> None:
    batcher = Batcher(Recorder(), 4)
    batcher.add(strand(i) for i in range(3))
    assert batcher.room((4, 8, 8)) == 1 and batcher.room((4, 16, 16)) == 4


def test_removing_an_owner_takes_all_of_its_strands() -> None:
    denoiser = Recorder()
    batcher = Batcher(denoiser, 8)
    batcher.add([strand("a", prompt="a"), strand("b", prompt="b"), strand("a", prompt="a", size=128)])
    batcher.remove("a")
    assert len(batcher) == 1
    run(batcher)
    assert {prompt for call in denoiser.calls for prompt, _ in call} == {"b"}


def test_only_the_strand_at_fault_fails() -> None:
    denoiser = Recorder(broken="bad")
    batcher = Batcher(denoiser, 8)
    strands = [strand(i, prompt="bad" if i == 1 else f"good{i}") for i in range(3)]
    batcher.add(strands)
    moved = batcher.step()
    assert moved == strands and isinstance(strands[1].fault, RunnerError)
    assert [entry.trajectory.step for entry in strands] == [1, 0, 1] and len(batcher) == 2
    before = len(denoiser.calls)
    batcher.step()
    assert len(denoiser.calls) == before + 1  # together again, without it


def test_a_goal_before_the_end_is_where_a_strand_leaves() -> None:
    batcher = Batcher(Recorder(), 8)
    made = trajectory()
    batcher.add([Strand(made, 2, "handoff"), Strand(made, made.calls, "whole")])
    batcher.step()
    batcher.step()
    assert len(batcher) == 1 and batcher.strands()[0].owner == "whole"


def test_nothing_to_do_is_an_empty_turn() -> None:
    assert Batcher(Recorder(), 8).step() == []
