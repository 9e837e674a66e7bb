"""Splits judged: the same pictures as drawing each split by itself, and figures that equal a count by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sampling_toy import ToyModel

from diffship.benchmarks import freshness
from diffship.benchmarks.measure.record import read_result
from diffship.benchmarks.studies.quality.handoff_quality import (
    Ask,
    Figures,
    curve_of,
    drawn_by_split,
    kept,
    main,
    parse_splits,
    rows_of,
    timed,
)
from diffship.benchmarks.studies.quality.judging import Judged
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.runtimes.engines.model import open_model
from diffship.runtimes.handoff.choose import read_curve
from diffship.runtimes.handoff.router import Router, begin, draw

ROOT = Path(__file__).parents[2]
ASK = Ask(4, (0, 1, 3, 4), sampler="dpmpp-2m")  # a sampler with a history, which must travel
TEXTS = ("red apple", "black cat", "pizza")


def pair() -> tuple[ToyModel, ToyModel]:
    """Two models that draw differently."""
    large, small = ToyModel(), ToyModel()
    plain = small.runners["unet"].function
    small.runners["unet"].function = lambda feeds: {"out_sample": plain(feeds)["out_sample"] * np.float32(0.8)}
    return large, small


def test_every_split_is_drawn_as_by_itself_and_no_call_is_made_twice() -> None:
    large, small = pair()
    requests = [ASK.request(text, seed) for seed, text in enumerate(TEXTS)]
    found = drawn_by_split(large, small, requests, ASK)
    calls = [len(model.runners["unet"].calls) for model in (large, small)]
    assert calls == [4, 4 + 3 + 1], "three pictures share each call"
    assert len({pictures.tobytes() for pictures in found.values()}) == 4
    for end, pictures in found.items():
        for request, pixels in zip(requests, pictures, strict=True):
            router = Router([large, small], (end, 4 - end))
            (alone,) = draw(router, begin(router, request))
            assert np.array_equal(alone.pixels, pixels), end


@pytest.mark.slow
def test_what_a_seed_drew_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("safetensors")
    large, small = pair()
    requests = [ASK.request(text, seed) for seed, text in enumerate(TEXTS)]
    job = Job(tmp_path)
    first = kept(job, None, large, small, requests, ASK)
    calls = len(large.runners["unet"].calls)
    again = kept(job, None, large, small, requests, ASK)
    assert len(large.runners["unet"].calls) == calls > 0
    assert first.keys() == again.keys() == set(ASK.ends)
    assert all(np.array_equal(first[end], again[end]) for end in first)
    kept(job, "openvino", large, small, requests, ASK)
    kept(job, None, large, small, requests[:2], ASK)
    assert len(large.runners["unet"].calls) == 3 * calls, "another engine or other prompts are drawn anew"
    monkeypatch.setattr(freshness, "digest", lambda entry, runners: "other code")
    kept(job, None, large, small, requests, ASK)
    assert len(large.runners["unet"].calls) == 4 * calls, "and so is what other code drew"


def test_seconds_and_bytes_of_each_side() -> None:
    large, small = pair()
    found = {end: Figures() for end in ASK.ends}
    timed(large, small, TEXTS[:2], ASK, found)
    assert [len(found[1].cloud), len(found[1].edge)] == [2, 2], "the first picture is a warm-up"
    assert set(found[0].cloud) == {0.0} == set(found[4].edge) and min(found[0].edge) > 0 < min(found[4].cloud)
    whole, bare = found[3].sizes.values()
    assert bare < whole and found[3].sizes["handoff_bytes"] > found[0].sizes["handoff_bytes"], "the history travels"


def figures(right: list[list[float]], rms: float) -> Figures:
    texts = tuple(f"prompt {place}" for place in range(len(right[0])))
    judged = [Judged({"top1": row, "top5": row, "large_rms": [rms] * len(row)}, 1.0, texts) for row in right]
    return Figures(judged, [0.2], [0.1], {"handoff_bytes": 7})


def test_rows_and_the_curve_are_the_means_and_claims_need_enough_prompts() -> None:
    found = {0: figures([[0, 0, 1, 1]] * 3, 0.5), 4: figures([[1, 1, 1, 1]] * 3, 0.0)}
    rows = {(row.subject, row.metric): row for row in rows_of(found, 4)}
    assert rows["split 0,4", "top5"].value == 0.5 and rows["split 4,0", "top5"].value == 1
    assert rows["split 0,4", "top5"].n == 12 and rows["split 0,4", "large_rms"].value == 0.5
    assert rows["split 0,4 against split 4,0", "top1_difference"].value == -0.5
    assert rows["split 0,4 against split 4,0", "top1_difference"].conditions["verdict"] == "no difference shown"
    many = {0: figures([[0.0, 1.0] * 250] * 3, 0.5), 4: figures([[1.0] * 500] * 3, 0.0)}
    claimed = {
        row.subject: row.conditions.get("verdict") for row in rows_of(many, 4) if row.metric == "top1_difference"
    }
    assert claimed == {"split 0,4 against split 4,0": "worse"}, "the same pair once"
    (said,) = {row.conditions["interval"] for row in rows_of(many, 4) if row.metric == "top1_difference"}
    assert said == "Student t over 500 prompts, 3 sampling seeds averaged in each"
    shares = [row for row in rows_of(many, 4) if row.unit == "share"]
    assert all(0 <= (row.low or 0) <= (row.value or 0) <= (row.high or 0) <= 1 for row in shares)
    rare = {0: figures([[0.0] * 49 + [1.0]] * 3, 0.5), 4: figures([[1.0] * 49 + [0.0]] * 3, 0.0)}
    ends = {(row.low, row.high) for row in rows_of(rare, 4) if row.metric == "top1"}
    assert {0.0, 1.0} <= {end for both in ends for end in both}, "shares end at 0 and at 1"
    large, small = pair()
    curve = curve_of(found, large, small, 4, "top5")
    assert [(point.cloud_calls, point.value) for point in curve.points] == [(0, 0.5), (4, 1.0)]
    assert (curve.cloud, curve.edge, curve.better) == (large.digest, small.digest, "higher")


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (["a,b"], "a split is two numbers"),
        (["4,0", "3,2"], "the same sum"),
        (["4,0", "4,0"], "must differ"),
        (["4"], "2 models"),
    ],
)
def test_splits_that_cannot_be_compared_are_refused(splits: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_splits(splits)
    assert parse_splits(["25,0", "10,15"]) == Ask(25, (10, 25))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "metric"), [("emoji-top5", "top5"), ("emoji-distance", "large_rms")])
def test_the_committed_curves_are_those_of_the_results_and_of_these_models(name: str, metric: str) -> None:
    curve = read_curve(ROOT / "benchmarks" / "curves" / f"{name}.json")
    rows = read_result(ROOT / "benchmarks" / "results" / "handoff-quality.json").rows
    measured = {row.conditions["cloud_calls"]: row.value for row in rows if row.metric == metric}
    assert {point.cloud_calls: point.value for point in curve.points} == pytest.approx(measured, abs=1e-4)
    pytest.importorskip("torch")
    with open_model("emoji", "torch") as large, open_model("emoji-small", "torch") as small:
        assert (curve.cloud, curve.edge) == (large.digest, small.digest)


@pytest.mark.slow
def test_a_model_handed_to_itself_loses_nothing(data: Path, tmp_path: Path) -> None:
    """The same weights on both sides: every split is the same pictures, in torch, with the trained model."""
    pytest.importorskip("torch")
    out, curve = tmp_path / "r.json", tmp_path / "c.json"
    words = [
        "--large",
        "emoji",
        "--small",
        "emoji",
        "--work",
        str(tmp_path / "work"),
        "--engine",
        "torch",
        "--data",
        str(data),
        "--prompts",
        "3",
        "--seeds",
        "2",
    ]
    words += [
        "--splits",
        "2,0",
        "1,1",
        "0,2",
        "--out",
        str(out),
        "--curve",
        str(curve),
        "--grid",
        str(tmp_path / "g.png"),
    ]
    main(words)
    rows = json.loads(out.read_text(encoding="utf-8"))["rows"]
    assert {row["value"] for row in rows if row["metric"] == "large_rms"} == {0.0}
    assert {row["value"] for row in rows if row["metric"].endswith("_difference")} == {0.0}
    assert len({row["value"] for row in rows if row["metric"] == "frechet_distance"}) == 1
    assert [point.cloud_calls for point in read_curve(curve).points] == [0, 1, 2]
    assert (tmp_path / "g.png").read_bytes().startswith(b"\x89PNG")
