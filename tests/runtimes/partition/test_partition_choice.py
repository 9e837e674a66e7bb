"""Predicted times are those of a simulation by events, and the choice is that of trying everything."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_events import Plan, World, joined_by_hand, picture_time
from partition_oracle import placed as toy_placement
from partition_oracle import toys

from diffship.core.errors import ConfigError
from diffship.runtimes.partition.choose import Choice, choose
from diffship.runtimes.partition.forecast import Link, PartitionProfile, Way, held, joined, placed, seconds, ways
from diffship.runtimes.partition.timetable import Scheme, timetable


def world_of(stages: int, ends: bool, devices: int, seed: int) -> tuple[World, list[int]]:
    """Random costs on unequal devices; one and the same draw for the oracle and the profile."""
    rng = np.random.default_rng(seed)
    made, homes = toys(stages, ends)
    costs = rng.uniform(0.1, 1.0, (devices, len(made))).tolist()
    crowd = np.cumsum([1.0, *rng.uniform(0.0, 0.3, devices - 1)]).tolist()
    sizes = {name: int(rng.integers(1, 100)) for stage in made for name in stage.writes}
    return World(made, costs, crowd, float(rng.uniform(0, 0.05)), float(rng.uniform(0, 0.004)), sizes), homes


def profile_of(world: World, stages: int, ends: bool, guided: bool = True, **more: Any) -> PartitionProfile:
    whole = tuple(map(tuple, world.costs))
    link = Link(world.wait, 1 / world.per_byte)
    names = tuple(f"gpu:{i}" for i in range(len(whole)))
    half = tuple(tuple(cost / 2 for cost in row) for row in whole) if guided else ()
    held = tuple(100 * (k + 1) for k in range(len(world.stages)))
    made = PartitionProfile(
        names, toy_placement(stages, ends), whole, half, tuple(world.crowd), link, world.sizes, held, {}
    )
    return replace(made, **more)


@pytest.mark.slow
@given(st.integers(1, 4), st.booleans(), st.integers(1, 6), st.integers(1, 14), st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_every_way_takes_what_the_events_take(stages: int, ends: bool, devices: int, calls: int, seed: int) -> None:
    world, _ = world_of(stages, ends, devices, seed)
    profile = profile_of(world, stages, ends, begin=2.0, rest=0.25, end=3.0)
    for way in ways(profile, calls, range(1, calls + 1)):
        plan = Plan(way.homes, way.scheme.stride, way.scheme.warm_up, calls, way.parts)
        expected = 2.0 + picture_time(world, plan) + 0.25 * calls + 3.0
        assert seconds(profile, way, calls) == pytest.approx(expected, rel=1e-9), way


def test_small_times_by_hand() -> None:
    """Two stages of 1 s and 3 s; 4 steps, of which one is exact; an exchange takes 0.5 s."""
    world = World(toys(2)[0], [[1.0, 3.0]] * 3, [1.0, 1.0, 1.0], 0.5, 1e-12, dict.fromkeys(("hidden.0", "skip.0"), 1))
    world.sizes["out_sample"] = 1
    profile = profile_of(world, 2, False)
    assert seconds(profile, Way((0, 0)), 4) == pytest.approx(16)
    # 1 + 0.5 + 3 + 0.5, then three rounds of the slower one
    assert seconds(profile, Way((0, 1), Scheme(1, 1)), 4) == pytest.approx(5 + 3 * 3.5)
    # the third device does the step itself, the owners the one after it; the last step is done alone
    assert seconds(profile, Way((0, 1), Scheme(2, 1)), 4) == pytest.approx(5 + 2 * 3.5)
    # halves of the rows in half the time; they meet after every call
    assert seconds(profile, Way((0, 0), parts=2), 4) == pytest.approx(8 + 4 * 0.5)
    # two devices that are one core each take twice as long
    slow = replace(profile, crowd=(1.0, 2.0, 3.0))
    assert seconds(slow, Way((0, 0), parts=2), 4) == pytest.approx(16 + 4 * 0.5)


def likeness(way: Way | Plan) -> float:
    """A synthetic fidelity: less for more stages and stride, more for a longer warm-up."""
    scheme = way.scheme if isinstance(way, Way) else way
    return 40.0 - 6.0 * way.homes[-1] - 5.0 * (scheme.stride - 1) + 1.5 * scheme.warm_up


def tried(world: World, homes: list[int], calls: int, floor: float, warm_ups: range, room: int | None) -> Plan | None:
    """The best of everything, by trying everything."""
    count, legal = len(world.costs), []
    for found in set(joined_by_hand(homes)):
        for stride in (1, 2):
            for warm_up in warm_ups:
                for parts in (1, 2):
                    plan = Plan(found, stride, warm_up, calls, parts)
                    load = [0] * (plan.devices + 1)
                    for k, home in enumerate(found):
                        load[home] += 100 * (k + 1)
                    heaviest = max(load)
                    # nothing lags: exact, and on several devices for nothing
                    if plan.devices > 1 and calls - warm_up < (2 if plan.homes[-1] == 0 else 1):
                        continue
                    if plan.devices * parts > count or (room is not None and heaviest > room):
                        continue
                    if plan.devices == 1 or likeness(plan) >= floor:
                        legal.append((round(picture_time(world, plan), 9), plan.devices * parts, -warm_up, plan))
    return min(legal, key=lambda each: each[:3])[3] if legal else None


@given(
    st.integers(1, 4), st.booleans(), st.integers(1, 8), st.integers(1, 12), st.floats(20, 50), st.integers(0, 10_000)
)
@settings(max_examples=40, deadline=None)
def test_the_choice_is_that_of_trying_everything(
    stages: int, ends: bool, devices: int, calls: int, floor: float, seed: int
) -> None:
    world, homes = world_of(stages, ends, devices, seed)
    room = [None, 400, 150][seed % 3]
    profile = profile_of(world, stages, ends, room={f"gpu:{i}": room for i in range(devices)})
    warm_ups = range(1, max(calls, 2))
    best = tried(world, homes, calls, floor, warm_ups, room)
    if best is None:
        with pytest.raises(ConfigError, match="no way of sharing the picture fits and reaches"):
            choose(profile, calls, floor, likeness, warm_ups)
        return
    taken = choose(profile, calls, floor, likeness, warm_ups).taken
    assert taken.seconds == pytest.approx(picture_time(world, best), rel=1e-9)
    assert (taken.way.homes, taken.way.parts) == (best.homes, best.parts)
    assert best.devices == 1 or (taken.way.scheme.stride, taken.way.scheme.warm_up) == (best.stride, best.warm_up)


def chosen(floor: float, asked: list[Way] | None = None, **more: Any) -> Choice:
    """Two stages on three equal devices, 20 calls."""
    world = World(toys(2)[0], [[1.0, 1.0]] * 3, [1.0, 1.0, 1.0], 0.0, 1e-12, {})
    world.sizes.update(dict.fromkeys(("hidden.0", "skip.0", "out_sample"), 1))

    def fidelity(way: Way) -> float:
        if asked is not None:
            asked.append(way)
        return likeness(way)

    return choose(profile_of(world, 2, False, **more), 20, floor, fidelity)


def test_fidelity_is_asked_from_the_fastest_on_until_one_reaches_the_floor() -> None:
    asked: list[Way] = []
    choice = chosen(33.0, asked)
    assert choice.taken.way == asked[-1] and all(likeness(way) < 33.0 for way in asked[:-1])
    times = [round(each.seconds, 9) for each in choice.candidates]
    assert times == sorted(times)
    assert len(asked) < sum(not each.way.exact for each in choice.candidates)
    why = [each.why for each in choice.candidates]
    place = why.index("")
    assert set(why[:place]) == {"below 33 dB"} and set(why[place + 1 :]) == {"slower"}
    later = [each.fidelity_db for each in choice.candidates[place + 1 :] if not each.way.exact]
    assert later and set(later) == {None}


def test_a_floor_that_nothing_stale_reaches_leaves_the_exact_ways() -> None:
    assert chosen(99.0).taken.way == Way((0, 0), parts=2)
    assert chosen(99.0, half=()).taken.way == Way((0, 0))
    assert chosen(-99.0).taken.way.scheme == Scheme(2, 1)
    told = chosen(99.0).taken.to_json()
    assert told["way"] == "halves of guidance" and told["exact"] and told["fidelity_db"] is None


def test_devices_of_one_name_share_their_room() -> None:
    """200 bytes on each of two halves; both are on one card of 500."""
    names = ("gpu:0", "gpu:0", "gpu:1")
    fits = {"devices": names, "room": {"gpu:0": 600, "gpu:1": None}}
    assert chosen(99.0, **fits).taken.way == Way((0, 0), parts=2)
    choice = chosen(99.0, **{**fits, "room": {"gpu:0": 500, "gpu:1": None}})
    assert choice.taken.way == Way((0, 0))
    halves = next(each for each in choice.candidates if each.way == Way((0, 0), parts=2))
    assert halves.why == "holds 600 bytes on gpu:0, which has 500" and halves.bytes == 300
    with pytest.raises(ConfigError, match="one device holds 300 bytes on gpu:0, which has 10"):
        chosen(99.0, room={name: 10 for name in ("gpu:0", "gpu:1", "gpu:2")})


def test_an_extra_device_holds_the_last_stages_once_more() -> None:
    world = World(toys(3)[0], [[1.0] * 3] * 4, [1.0] * 4, 0.0, 1e-12, {})
    assert held(profile_of(world, 3, False), Way((0, 1, 2), Scheme(2, 1))) == [100, 200, 300, 300]
    assert held(profile_of(world, 3, False), Way((0, 0, 1), parts=2)) == [300, 300, 300, 300]


def test_a_profile_that_is_not_whole_is_refused() -> None:
    world, _ = world_of(2, False, 2, 0)
    with pytest.raises(ConfigError, match="2 devices has figures of 1"):
        profile_of(world, 2, False, whole=((1.0, 1.0),))
    with pytest.raises(ConfigError, match="2 stages has one figure for each"):
        profile_of(world, 2, False, held=(1,))


def test_many_stages_on_few_devices_are_joined_at_once_and_too_many_are_refused() -> None:
    """63 gaps between 64 stages: none or one of them on two devices; on three, 1953 pairs more."""
    found = joined(toy_placement(64), 2)
    assert len(found) == 64 and {homes[-1] for homes in found} == {0, 1}
    with pytest.raises(ConfigError, match=r"64 stages are joined into 3 or fewer in 2017 manners.*fewer devices"):
        joined(toy_placement(64), 3)


def test_ways_cover_what_devices_allow_and_no_warm_up_of_all_calls() -> None:
    world, _ = world_of(3, False, 4, 0)
    profile = profile_of(world, 3, False)
    found = ways(profile, 4, (1, 3, 9))
    assert len(set(found)) == len(found) and Way((0, 0, 0)) in found
    assert {way.homes for way in found} == {(0, 0, 0), (0, 0, 1), (0, 1, 1), (0, 1, 2)}
    assert {way.scheme.warm_up for way in found} == {1, 3} and max(way.devices for way in found) == 4
    assert {way.parts for way in found} == {1, 2} and math.isinf(
        choose(profile, 4, 999, likeness).taken.fidelity_db or 0
    )
    assert {way.parts for way in ways(profile_of(world, 3, False, guided=False), 4)} == {1}
    for way in ways(profile, 4, range(1, 9)):
        table = timetable(placed(profile.placement, way.homes), 4, way.scheme)
        assert way.exact == (max(table.lag(step) for step in range(4)) == 0)
