"""Choosing k: against a brute search and the published curve, refusals, strict files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.core.errors import ConfigError
from diffship.core.strict import plain
from diffship.runtimes.handoff.choose import (
    Budget,
    QualityCurve,
    QualityPoint,
    SplitProfile,
    choose_split,
    read_curve,
    read_profile,
    splits,
    write_profile,
)

CLOUD, EDGE = "c" * 64, "e" * 64
PROFILE = SplitProfile(
    cloud=CLOUD,
    edge=EDGE,
    size=(512, 512),
    guided=True,
    edge_begin_ms=30,
    edge_call_ms=100,
    edge_end_ms=50,
    cloud_begin_ms=10,
    cloud_call_ms=20,
    round_trip_ms=40,
    bytes_per_second=1e6,
    handoff_bytes=60_000,
)
CURVE = QualityCurve(
    CLOUD, EDGE, 25, "top1", "higher", (QualityPoint(0, 0.5), QualityPoint(10, 0.8), QualityPoint(25, 0.9))
)


def test_the_cost_of_a_split_by_hand() -> None:
    every = splits(PROFILE, 25)
    assert every[0].latency_ms == 30 + 25 * 100 + 50 and every[0].cloud_ms == 0 and every[0].handoff_bytes == 0
    # encode and 10 calls there, 40 + 60 ms on the wire, 15 calls and a decode here
    assert every[10].latency_ms == 10 + 200 + 100 + 1500 + 50
    assert every[10].cloud_ms == 210 and every[10].split == (10, 15)
    # Heun's 49 calls for 25 steps: the surplus is of whoever ends
    heun = splits(PROFILE, 25, calls=49)
    assert heun[10].latency_ms == 10 + 200 + 100 + 3900 + 50 and heun[10].cloud_ms == 210
    assert heun[25].latency_ms == 10 + 980 + 100 + 50 and heun[25].cloud_ms == 990
    slow = replace(PROFILE, edge_begin_ms=5000)
    assert splits(slow, 25)[10].latency_ms == 5000 + 1500 + 50  # this device encodes while the cloud draws


def test_each_budget_by_hand() -> None:
    assert choose_split(PROFILE, 25, Budget(cloud_ms=215)).split == (10, 15)  # the most that it pays for
    assert choose_split(PROFILE, 25, Budget(cloud_ms=5)).split == (0, 25)
    # 2660 - 80 k <= 2000 from k = 9 on
    assert choose_split(PROFILE, 25, Budget(latency_ms=2000)).split == (9, 16)
    assert choose_split(PROFILE, 25, Budget(quality=0.74), CURVE).split == (8, 17)
    assert choose_split(PROFILE, 25, Budget(quality=0.74, latency_ms=2000), CURVE).split == (9, 16)
    assert choose_split(PROFILE, 25, Budget(cloud_ms=300, quality=0.74), CURVE).split == (14, 11)


NUMBER = st.floats(0, 1000)


@given(NUMBER, NUMBER, NUMBER, NUMBER, NUMBER, NUMBER, st.integers(1, 40), st.booleans())
@settings(max_examples=200, deadline=None)
def test_against_a_brute_search(
    begin: float, here: float, end: float, there: float, trip: float, bound: float, steps: int, spend: bool
) -> None:
    profile = replace(
        PROFILE, edge_begin_ms=begin, edge_call_ms=here, edge_end_ms=end, cloud_call_ms=there, round_trip_ms=trip
    )
    legal = []
    for k in range(steps + 1):
        cloud = 10 + k * there if k else 0.0
        wall = max(begin, cloud + trip + 60 if k else 0.0) + (steps - k) * here + end
        if (cloud if spend else wall) <= 10 * bound:
            legal.append(k)
    budget = Budget(cloud_ms=10 * bound) if spend else Budget(latency_ms=10 * bound)
    if not legal:
        with pytest.raises(ConfigError, match="no split meets"):
            choose_split(profile, steps, budget)
    else:
        assert choose_split(profile, steps, budget).split[0] == (legal[-1] if spend else legal[0])


def test_what_cannot_be_met_names_the_best_that_can() -> None:
    with pytest.raises(
        ConfigError, match=r"no split meets latency=0.1: the fastest is split 25,0: 510 ms of the cloud"
    ):
        choose_split(PROFILE, 25, Budget(latency_ms=100))
    with pytest.raises(ConfigError, match=r"quality=0.95: the best is split 25,0: .* quality 0.9$"):
        choose_split(PROFILE, 25, Budget(quality=0.95), CURVE)
    with pytest.raises(ConfigError, match=r"cloud-ms=50 and latency=1: the least of the cloud .* the fastest is"):
        choose_split(PROFILE, 25, Budget(cloud_ms=50, latency_ms=1000))
    with pytest.raises(ConfigError, match="needs the pair's quality curve: --quality-curve"):
        choose_split(PROFILE, 25, Budget(quality=0.5))
    with pytest.raises(ConfigError, match="there is no budget"):
        Budget()


def test_the_curve_is_linear_between_what_was_measured_and_silent_outside() -> None:
    part = QualityCurve(CLOUD, EDGE, 25, "fid", "lower", (QualityPoint(5, 40.0), QualityPoint(15, 20.0)))
    assert [part.at(k) for k in (4, 5, 10, 15, 16)] == [None, 40.0, 30.0, 20.0, None]
    assert choose_split(PROFILE, 25, Budget(quality=30), part).split == (10, 15)
    with pytest.raises(ConfigError, match="the best is split 15,10"):
        choose_split(PROFILE, 25, Budget(quality=10), part)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cloud": "d" * 64}, "another cloud model"),
        ({"edge": "d" * 64}, "another edge model"),
        ({"steps": 30}, "of 30 steps, asked are 25"),
    ],
    ids=["cloud", "edge", "steps"],
)
def test_a_curve_of_something_else_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        choose_split(PROFILE, 25, Budget(quality=0.5), replace(CURVE, **change))


def test_files_come_back_as_they_were(tmp_path: Path) -> None:
    write_profile(tmp_path / "sub" / "profile.json", PROFILE)
    assert read_profile(tmp_path / "sub" / "profile.json") == PROFILE
    (tmp_path / "curve.json").write_text(json.dumps(plain(CURVE)), encoding="utf-8")
    assert read_curve(tmp_path / "curve.json") == CURVE


BAD: dict[str, Any] = {
    "no points": {"points": []},
    "one point": {"points": [{"cloud_calls": 0, "value": 1.0}]},
    "falling": {"points": [{"cloud_calls": 5, "value": 1.0}, {"cloud_calls": 0, "value": 1.0}]},
    "twice": {"points": [{"cloud_calls": 5, "value": 1.0}, {"cloud_calls": 5, "value": 1.0}]},
    "beyond the end": {"points": [{"cloud_calls": 5, "value": 1.0}, {"cloud_calls": 26, "value": 1.0}]},
    "NaN": {"points": [{"cloud_calls": 0, "value": float("nan")}, {"cloud_calls": 5, "value": 1.0}]},
    "direction": {"better": "more"},
    "schema": {"schema": 2},
    "unknown key": {"metrics": "x"},
    "no steps": {"steps": 0},
}


@pytest.mark.parametrize("name", BAD)
def test_bad_curves_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "curve.json").write_text(json.dumps({**plain(CURVE), **BAD[name]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"curve\.json"):
        read_curve(tmp_path / "curve.json")


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, "null"], ids=["empty", "list", "half", "deep", "null"])
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "profile.json").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="profile"):
        read_profile(tmp_path / "profile.json")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(tmp_path / "nothing.json")
