"""The two halves of guidance on two devices: equal, bit for bit, to one device that computes one after the other."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from partition_oracle import placed, toys
from partition_told import WORDS, Told, said, told
from test_partition_run import SD_KIND, Chain, made_of

from diffship.core.errors import ConfigError, DeadlineError, RunnerError
from diffship.runtimes.partition.denoiser import Partitioned, threads
from diffship.runtimes.partition.halves import Halves, cfg_parallel
from diffship.runtimes.partition.lanes import ThreadEach
from diffship.runtimes.partition.timetable import Scheme
from diffship.sampling.kernel import apply_matrix
from diffship.sampling.loop import denoise
from diffship.sampling.trajectory import Conditioning, Trajectory


def apart(trajectory: Trajectory, whole: Told) -> np.ndarray[Any, Any]:
    """The last latents, computed without any Denoiser: a call for each half, Ho and Salimans' equation, the sampler."""
    x, history = trajectory.latents, ()
    for step in range(trajectory.calls):
        now = trajectory.sampler.coefficients(step, trajectory.steps, len(history))
        feeds = {"sample": x[None] * now.input_scale, "timestep": np.float32([now.timestep])}

        def half(condition: Conditioning | None, feeds: dict[str, Any] = feeds) -> Any:
            assert condition is not None
            return whole.run({**feeds, WORDS: whole.put(condition[WORDS][None])})["out_sample"][0]

        positive = half(trajectory.positive)
        if trajectory.guidance > 1:
            negative = half(trajectory.negative)
            positive = negative + (positive - negative) * trajectory.guidance
        x, *rest = apply_matrix(now.matrix, x, positive, None, history)
        history = tuple(rest)
    return x


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_halves_are_one_device_that_computes_one_after_the_other(timeout: float | None) -> None:
    """A batch of one that is guided, one that is not, and both."""
    runners = [told(1)[0] for _ in range(2)]
    one, two = said(1, 4.0), said(2, 1.0)
    with cfg_parallel(runners, timeout, kind=SD_KIND) as denoiser:
        for batch in ([one], [two], [one, two]):
            for found, start in zip(denoise(batch, denoiser), batch, strict=True):
                assert np.array_equal(found.latents, apart(start, told(1)[0]))
    # one guided trajectory, none, one of two
    assert runners[0].rows == [1] * 10 and runners[1].rows == [1] * 10 + [2] * 5


def test_both_halves_run_at_once() -> None:
    """Each waits in every call until the other has come there too."""
    together = threading.Barrier(2)

    class Meeting(Told):
        def run(self, feeds: Any) -> dict[str, Any]:
            together.wait(20)
            return super().run(feeds)

    runners = [made_of(Meeting, toys(1)[0][0]) for _ in range(2)]
    for runner in runners:
        runner.rows = []  # type: ignore[attr-defined]
    with cfg_parallel(runners, 30, kind=SD_KIND) as denoiser:
        (found,) = denoise([said(1, 4.0)], denoiser)
    assert np.array_equal(found.latents, apart(said(1, 4.0), told(1)[0]))


def partitions(scheme: Scheme, stages: tuple[list[Any], list[Any]], timeout: float = 20) -> list[Partitioned]:
    return [threads(placed(2), each, scheme, timeout, kind=SD_KIND) for each in stages]


def test_each_half_may_be_stages_that_lag_behind() -> None:
    """2 x 2 devices. With a full warm-up it is the plain picture; stale, it is that of unequal halves apart."""
    start = said(1, 4.0, 6)
    for scheme, exact in ((Scheme(1, 9), True), (Scheme(2, 1), False)):
        negative, positive = partitions(scheme, (told(2), told(2)))
        with negative, positive, Halves(negative, positive, ThreadEach(60)) as denoiser:
            found = denoise([start], denoiser)[0].latents
        with threads(placed(2), told(2), scheme, 20, kind=SD_KIND) as one:
            together = denoise([start], one)[0].latents
        # this toy computes rows apart, so one partition of both rows gives the same bits
        assert np.array_equal(found, together)
        assert np.array_equal(found, apart(start, told_chain())) == exact


def told_chain() -> Any:
    chain = Chain(told(2))  # type: ignore[arg-type]
    chain.put = told(1)[0].put  # type: ignore[method-assign]
    return chain


def test_a_half_that_fails_or_hangs_is_named() -> None:
    class Broken(Told):
        def run(self, feeds: Any) -> dict[str, Any]:
            raise MemoryError("no room")

    class Hanging(Told):
        def run(self, feeds: Any) -> dict[str, Any]:
            done.wait(20)
            return {}

    done = threading.Event()
    for at, (kind_, error, text) in enumerate(
        [(Broken, RunnerError, "negative half of guidance: stage toy.0 on device 0, step 1 of 5: no room"),
         (Hanging, DeadlineError, "positive half of guidance: no answer within 0.2 s from stage toy.0 on device 0")]
    ):  # fmt: skip
        stages = (told(2), told(2))
        stages[at][0] = made_of(kind_, stages[at][0])  # type: ignore[call-overload]
        negative, positive = partitions(Scheme(), stages, 0.2)
        with negative, positive, Halves(negative, positive, ThreadEach(30)) as denoiser:
            with pytest.raises(error, match=text.replace(".", r"\.")):
                denoise([said(1, 4.0)], denoiser)
    done.set()
    with pytest.raises(ConfigError, match="two halves, which take one runner each; got 1"):
        cfg_parallel(told(1), kind=SD_KIND)
