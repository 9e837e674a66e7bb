from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_oracle import Toy, placed, published, toys
from sampling_toy import SD

from diffship.core.errors import ConfigError, DeadlineError, RunnerError
from diffship.core.registry import SAMPLERS, kind
from diffship.core.spec import TensorSpec
from diffship.runtimes.partition.denoiser import Partitioned, everywhere, seats, simulate, threads
from diffship.runtimes.partition.timetable import Scheme
from diffship.sampling.kernel import apply_matrix
from diffship.sampling.loop import advance, denoise, plain
from diffship.sampling.rng import make_noise
from diffship.sampling.sampler import times_of
from diffship.sampling.samplers import make_sampler
from diffship.sampling.trajectory import Conditioning, Trajectory

SD_KIND = kind("sd")


class Chain:
    """The whole toy as one runner."""

    inputs = tuple(TensorSpec(name, "float32", ("batch_size",)) for name in ("sample", "timestep"))
    outputs = (TensorSpec("out_sample", "float32", ("batch_size",)),)

    def __init__(self, stages: list[Toy]) -> None:
        self.stages = stages

    def run(self, feeds: Any) -> dict[str, Any]:
        values = dict(feeds)
        for stage in self.stages:
            values |= stage.run({spec.name: values[spec.name] for spec in stage.inputs})
        return {"out_sample": values["out_sample"]}

    def put(self, array: Any) -> Any:
        raise AssertionError("there are no conditions")

    def close(self) -> None:
        pass


def drawn(steps: int, sampler: str = "ddim", seed: int = 0, side: int = 4) -> Trajectory:
    latents = np.random.default_rng(seed).standard_normal((4, side, side)).astype(np.float32)
    noise = make_noise("philox", seed, 0)
    return Trajectory(latents, 0, steps, make_sampler(SD, sampler), noise, (8 * side, 8 * side))


def simulated(devices: int, scheme: Scheme, ends: bool = False) -> Partitioned:
    return simulate(placed(devices, ends), toys(devices, ends)[0], scheme, kind=SD_KIND)


def recursive(devices: int, ends: bool, trajectory: Trajectory, stride: int, warm_up: int, shift: bool) -> Any:
    """The oracle's predictions carried through the sampler: the last latents."""
    end: list[Any] = []
    history: tuple[Any, ...] = ()

    def follow(step: int, x: Any, eps: Any) -> Any:
        nonlocal history
        now = trajectory.sampler.coefficients(step, trajectory.steps, len(history))
        after, *rest = apply_matrix(now.matrix, x[0], eps[0], None, history)
        history = tuple(rest)
        end.append(after)
        return after[None]

    times = list(times_of(trajectory.sampler, trajectory.steps))
    scales = [trajectory.sampler.coefficients(step, trajectory.steps, 0).input_scale for step in range(len(times))]
    published(devices, ends, trajectory.latents[None], times, follow, stride, warm_up, shift, scales)
    return end[-1]


WARM_UPS = st.sampled_from([1, 2, 3, 9])


@pytest.mark.slow
@given(st.integers(1, 4), st.booleans(), st.integers(1, 2), WARM_UPS, st.booleans(), st.integers(1, 14))
@settings(max_examples=80, deadline=None)
def test_predictions_are_those_of_the_published_equation(
    devices: int, ends: bool, stride: int, warm_up: int, shift: bool, steps: int
) -> None:
    shift = shift and devices > 1
    trajectory = drawn(steps)
    (after,) = denoise([trajectory], simulated(devices, Scheme(stride, warm_up, shift), ends))
    assert np.array_equal(after.latents, recursive(devices, ends, trajectory, stride, warm_up, shift))


@pytest.mark.parametrize(("sampler", "calls"), [("pndm", 8), ("heun", 13)])
@pytest.mark.parametrize("scheme", [(1, 1, False), (2, 2, False), (2, 7, True), (1, 7, True)], ids=str)
def test_a_sampler_that_makes_more_calls_than_steps_is_counted_by_calls(
    sampler: str, calls: int, scheme: tuple[int, int, bool]
) -> None:
    """Seven steps; a warm-up of seven calls is not all of them."""
    trajectory = drawn(7, sampler)
    assert trajectory.calls == calls == len(times_of(trajectory.sampler, 7))
    (after,) = denoise([trajectory], simulated(3, Scheme(*scheme)))
    assert np.array_equal(after.latents, recursive(3, False, trajectory, *scheme))
    (exact,) = denoise([trajectory], simulated(3, Scheme(1, calls)))
    assert not np.array_equal(after.latents, exact.latents)
    assert np.array_equal(exact.latents, recursive(3, False, trajectory, 1, calls, False))


@pytest.mark.parametrize("ends", [False, True])
@pytest.mark.parametrize("scheme", [Scheme(1, 1), Scheme(2, 3), Scheme(2, 2, True)], ids=str)
def test_threads_give_what_one_process_gives(scheme: Scheme, ends: bool) -> None:
    batch = [drawn(9, "euler-a", seed) for seed in range(2)]
    expected = denoise(batch, simulated(3, scheme, ends))
    with threads(placed(3, ends), toys(3, ends)[0], scheme, timeout=20, kind=SD_KIND) as denoiser:
        found = denoise(batch, denoiser)
        again = denoise(batch, denoiser)
    for want, have, second in zip(expected, found, again, strict=True):
        assert np.array_equal(want.latents, have.latents) and np.array_equal(want.latents, second.latents)


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if not name.startswith(("edm-", "flow-"))])
def test_a_warm_up_of_all_steps_is_the_plain_run(sampler: str) -> None:
    batch = [drawn(4, sampler, seed) for seed in range(2)]
    expected = denoise(batch, plain(Chain(toys(3)[0]), SD_KIND))
    for devices, scheme in ((3, Scheme(1, 10)), (3, Scheme(2, 10, True)), (1, Scheme(1, 1))):
        found = denoise(batch, simulated(devices, scheme))
        whole = denoise(batch, plain(Chain(toys(devices)[0]), SD_KIND)) if devices == 1 else expected
        assert all(np.array_equal(a.latents, b.latents) for a, b in zip(found, whole, strict=True))
    stale = denoise(batch, simulated(3, Scheme(1, 1)))
    assert not np.array_equal(stale[0].latents, expected[0].latents)


def test_stages_read_the_timestep_of_the_table_and_latents_as_their_step_scales_them() -> None:
    seen: list[tuple[float, Any]] = []

    class Spy(Toy):
        def run(self, feeds: Any) -> dict[str, Any]:
            seen.append((float(feeds["timestep"][0]), feeds["sample"]))
            return super().run(feeds)

    stages = toys(2)[0]
    spy = made_of(Spy, stages[0])
    trajectory = drawn(6, "euler")
    current = [trajectory]
    denoiser = simulate(placed(2), [spy, stages[1]], Scheme(2, 1), kind=SD_KIND)
    starts = []
    while not current[0].done:
        starts.append(current[0].latents * current[0].sampler.coefficients(current[0].step, 6, 0).input_scale)
        current = advance(current, denoiser)
    times = times_of(trajectory.sampler, 6)
    assert [time for time, _ in seen] == pytest.approx([times[0], times[2], times[4]])  # none for the last, lone step
    for (_, sample), step in zip(seen, (0, 1, 3), strict=True):
        assert np.array_equal(sample[0], starts[step])


def test_a_trajectory_from_elsewhere_begins_with_a_fresh_warm_up() -> None:
    whole = plain(Chain(toys(2)[0]), SD_KIND)
    middle = denoise([drawn(8)], whole, until=3)
    scheme = Scheme(1, 2)
    denoiser = simulated(2, scheme)
    exact = denoise(middle, whole, until=5)
    assert np.array_equal(denoise(middle, denoiser, until=5)[0].latents, exact[0].latents)
    # the same run goes on stale; a copy that came by the wire begins anew
    stale = advance(exact, denoiser)
    other = replace(exact[0], facts={})
    fresh = advance([other], denoiser)
    assert not np.array_equal(stale[0].latents, fresh[0].latents)
    assert np.array_equal(fresh[0].latents, advance([other], whole)[0].latents)
    with pytest.raises(ConfigError, match=r"one step; these stand at \(step, calls\) \[\(0, 8\), \(3, 8\)\]"):
        advance([drawn(8), *middle], denoiser)


def made_of(kind: type[Toy], toy: Toy) -> Toy:
    """The same stage with another behaviour."""
    return kind(toy.name, toy.reads, toy.writes, toy.gain)


class Broken(Toy):
    """Runs until the third call, then fails or waits until it is let go."""

    hang: threading.Event | None = None
    calls = 0

    def run(self, feeds: Any) -> dict[str, Any]:
        Broken.calls += 1
        if Broken.calls == 3 and self.hang is not None:
            self.hang.wait(20)
        elif Broken.calls == 3:
            raise MemoryError("no room")
        return super().run(feeds)


def broken(at: int, devices: int = 3) -> list[Toy]:
    stages = toys(devices)[0]
    Broken.calls = 0
    stages[at] = made_of(Broken, stages[at])
    return stages


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2])
@pytest.mark.parametrize("warm_up", [1, 9])
def test_a_stage_that_fails_is_named_and_the_next_run_is_sound(threaded: bool, at: int, warm_up: int) -> None:
    stages, scheme = broken(at), Scheme(1, warm_up)
    make: Any = threads if threaded else simulate
    with make(placed(3), stages, scheme, kind=SD_KIND) as denoiser:
        with pytest.raises(RunnerError, match=rf"stage toy\.{at} on device {at}, step 3 of 8: no room"):
            denoise([drawn(8)], denoiser)
        found = denoise([drawn(8)], denoiser)
    assert np.array_equal(found[0].latents, denoise([drawn(8)], simulated(3, scheme))[0].latents)


def test_a_stage_that_hangs_ends_in_a_deadline_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = broken(1)
    monkeypatch.setattr(Broken, "hang", threading.Event())
    with threads(placed(3), stages, Scheme(), timeout=0.2, kind=SD_KIND) as denoiser:
        with pytest.raises(DeadlineError, match=r"within 0\.2 s from stage toy\.1 on device 1, step 3 of 8$"):
            denoise([drawn(8)], denoiser)
        with pytest.raises(RunnerError, match="no job is taken any more"):
            denoise([drawn(8)], denoiser)
    assert Broken.hang is not None
    Broken.hang.set()


def test_threads_end_with_their_denoiser() -> None:
    before = set(threading.enumerate())
    with threads(placed(3), toys(3)[0], Scheme(2, 1), kind=SD_KIND) as denoiser:
        denoise([drawn(6)], denoiser)
        workers = set(threading.enumerate()) - before
        assert sorted(worker.name for worker in workers) == [f"diffship device {device}" for device in range(4)]
    assert not workers & set(threading.enumerate())
    with pytest.raises(RunnerError, match="closed"):
        denoise([drawn(6)], denoiser)


def test_devices_really_run_at_once() -> None:
    """Each stage waits inside its second call until all others have come there too."""
    together, trajectory = threading.Barrier(3), drawn(4)
    first = times_of(trajectory.sampler, 4)[0]

    class Meeting(Toy):
        def run(self, feeds: Any) -> dict[str, Any]:
            if float(feeds["timestep"][0]) < first:
                together.wait(20)
            return super().run(feeds)

    stages = [made_of(Meeting, toy) for toy in toys(3)[0]]
    with threads(placed(3), stages, Scheme(), timeout=30, kind=SD_KIND) as denoiser:
        found = denoise([trajectory], denoiser, until=2)
    assert np.array_equal(found[0].latents, denoise([trajectory], simulated(3, Scheme()), until=2)[0].latents)


def test_seats_and_runners_that_do_not_fit() -> None:
    assert seats(placed(2, ends=True), Scheme(2)) == [(0, 1), (1, 0), (1, 2), (2, 0), (2, 2)]
    with pytest.raises(ConfigError, match="3 stages take one runner each, and 2"):
        simulate(placed(3), toys(2)[0], kind=SD_KIND)
    given_ = everywhere(placed(2), toys(2)[0], Scheme(2))
    del given_[2, 1]
    with pytest.raises(ConfigError, match=r"device 2 has no runner of stage toy\.1"):
        denoise([drawn(6)], threads(placed(2), given_, Scheme(2), kind=SD_KIND))


def test_conditions_are_put_on_a_device_once() -> None:
    puts: list[str] = []

    class Texted(Toy):
        @property
        def inputs(self) -> tuple[TensorSpec, ...]:
            return (*super().inputs, TensorSpec("encoder_hidden_states", "float32", ("batch_size", "n", 2)))

        def run(self, feeds: Any) -> dict[str, Any]:
            rest = {name: feed for name, feed in feeds.items() if name != "encoder_hidden_states"}
            assert feeds["encoder_hidden_states"].shape == (2, 3, 2)
            return Toy(self.name, self.reads, self.writes, self.gain).run(rest)

        def put(self, array: Any) -> Any:
            puts.append(self.name)
            return super().put(array)

    stages = [made_of(Texted, toy) for toy in toys(2)[0]]
    words = Conditioning({"encoder_hidden_states": np.ones((3, 2), np.float32)})
    trajectory = replace(drawn(6), positive=words, negative=words, guidance=3.0)
    denoise([trajectory], simulate(placed(2), stages, kind=SD_KIND))
    assert sorted(puts) == ["toy.0", "toy.1"]


@pytest.mark.parametrize("devices", [2, 3, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("warm_up", [1, 3, 9])
@pytest.mark.parametrize("shift", [False, True])
def test_every_scheme_of_the_paper_is_its_equation(devices: int, stride: int, warm_up: int, shift: bool) -> None:
    """Twelve steps, so that a warm-up of nine leaves stale ones."""
    trajectory = drawn(12)
    (after,) = denoise([trajectory], simulated(devices, Scheme(stride, warm_up, shift)))
    assert np.array_equal(after.latents, recursive(devices, False, trajectory, stride, warm_up, shift))
    exact = denoise([trajectory], simulated(devices, Scheme(stride, 12)))[0]
    assert not np.array_equal(after.latents, exact.latents)
