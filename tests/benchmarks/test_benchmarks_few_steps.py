"""The studies about few steps: what is asked, what share of a figure is kept, and how many times as fast a chain is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffship.benchmarks.studies.cost.fast_chain import FAST, PAIRS, bundle_of
from diffship.benchmarks.studies.cost.fast_chain import rows_of as speed_rows
from diffship.benchmarks.studies.quality.distilled import MADE, RECIPES, Distilled
from diffship.benchmarks.studies.quality.few_steps import REFERENCE, STEPS, kept_row, rows_of, ways
from diffship.benchmarks.studies.quality.judging import Judged
from diffship.core.errors import ConfigError
from diffship.core.recipe import read_recipe

ROOT = Path(__file__).parents[2]


def judged(top5: list[float]) -> Judged:
    return Judged({"top1": top5, "top5": top5}, 1.0, tuple(f"prompt {i}" for i in range(len(top5))))


def test_every_way_that_the_comparison_needs_is_asked() -> None:
    found = ways(["emoji-lcm", "emoji-lcm-lora"])
    assert len(set(found)) == len(found) and found[0] == REFERENCE
    asked = {(way.model, way.sampler, way.steps, way.guidance) for way in found}
    for sampler in ("ddim", "dpmpp-2m"):
        assert {("emoji", sampler, steps, 4.0) for steps in (4, 8, 25)} <= asked
    for model, guidance in (("emoji", 4.0), ("emoji-lcm", 4.0), ("emoji-lcm-lora", 1.0)):
        assert {(model, "lcm", steps, guidance) for steps in STEPS} <= asked


def test_what_is_kept_is_a_ratio_of_means_with_its_interval() -> None:
    """Every prompt keeps nine tenths, so that pairs drawn again keep just that; without pairs they scatter."""
    draw = np.random.default_rng(1)
    reference = draw.random(200) + 0.5
    row = kept_row("ours", [judged((0.9 * reference).tolist())], [judged(reference.tolist())], "top5")
    assert (row.value, row.low, row.high) == pytest.approx((0.9, 0.9, 0.9), abs=1e-5)
    other = kept_row(
        "ours", [judged((0.9 * draw.permutation(reference)).tolist())], [judged(reference.tolist())], "top5"
    )
    assert other.low is not None and other.high is not None and other.low < 0.88 < 0.92 < other.high
    # the delta method for a ratio of means of independent values
    spread = 0.9 * np.sqrt(2 / 200) * reference.std() / reference.mean()
    assert other.high - other.low == pytest.approx(2 * 1.96 * spread, rel=0.2)


def test_rows_compare_every_way_with_the_reference() -> None:
    found = {way: [judged([0.0, 1.0, 1.0, 1.0])] * 3 for way in ways(["emoji-lcm-lora"])}
    rows = {(row.subject, row.metric): row for row in rows_of(found)}
    other = next(way for way in found if way.model == "emoji-lcm-lora")
    assert (REFERENCE.name, "top5_kept") not in rows and rows[other.name, "top5_kept"].value == 1.0
    assert rows[other.name, "top5"].value == 0.75 and rows[other.name, "top5"].conditions["seeds"] == 3
    assert rows[f"{other.name} against {REFERENCE.name}", "top5_difference"].value == 0.0


def test_times_as_fast_is_slow_over_fast_and_a_claim_needs_three_rounds() -> None:
    slow, fast = [12.0, 12.6, 11.4], [1.0, 1.05, 0.95]
    rows = speed_rows(PAIRS["emoji"], [slow, fast])
    assert [row.value for row in rows[:2]] == [12.0, 1.0]
    assert rows[2].value == pytest.approx(12.0) and rows[2].conditions["verdict"] == "faster"
    assert speed_rows(PAIRS["emoji"], [slow[:2], fast[:2]])[2].conditions["verdict"] == "no difference shown"
    assert speed_rows(PAIRS["emoji"], [fast, slow])[2].conditions["verdict"] == "slower"


def test_models_are_those_that_are_named_or_made_by_recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in MADE:
        assert (ROOT / RECIPES / f"{name}.toml").is_file()
        (kind,) = {kind for kind, _ in read_recipe(ROOT / RECIPES / f"{name}.toml").passes}
        assert kind == ("vae" if name == "emoji-tiny-vae" else "lcm")
    made = Distilled([("emoji-lcm", "out/mine")], None, tmp_path)
    assert (made.source("emoji-lcm"), made.source("arch:sd15")) == ("out/mine", "arch:sd15")
    with pytest.raises(ConfigError, match="or name it: --made emoji-lcm-lora=SOURCE"):
        made.source("emoji-lcm-lora")
    asked = []
    monkeypatch.setattr(Distilled, "with_vae", lambda self, name, vae: asked.append((name, vae)) or "joined")
    monkeypatch.setattr(Distilled, "bundle", lambda self, name: Path(name))
    assert (bundle_of(made, FAST), bundle_of(made, "emoji")) == (Path("joined"), Path("emoji"))
    assert asked == [("emoji-small-lcm-lora", "emoji-tiny-vae")]
