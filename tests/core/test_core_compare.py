from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffship.core.compare import Tolerance, compare
from diffship.core.errors import ParityError

REFERENCE = {"y": np.array([0.0, 1.0, -2.0, 4.0], np.float32)}


def test_figures_against_values_worked_by_hand() -> None:
    report = compare(REFERENCE, {"y": np.array([0.1, 1.0, -2.0, 4.4])}, Tolerance(0.05, 0.01))
    (found,) = report.outputs
    assert found.max_abs == pytest.approx(0.4) and found.mean_abs == pytest.approx(0.125)
    assert found.max_rel == pytest.approx(0.1 / 0.04)
    assert found.psnr_db == pytest.approx(10 * math.log10(16 / ((0.01 + 0.16) / 4)), rel=1e-6)
    assert found.cosine == pytest.approx((1 + 4 + 17.6) / math.sqrt(21 * (0.01 + 1 + 4 + 4.4**2)))
    assert found.needed_atol == pytest.approx(0.4 - 0.04)
    assert found.needed_rtol == math.inf
    assert not report and "atol 0.36 (with rtol 0.01)" in report.text()


@given(st.lists(st.floats(-10, 10), min_size=1, max_size=20), st.floats(0, 1), st.integers(0, 99))
def test_the_smallest_tolerance_is_where_the_verdict_turns(values: list[float], rtol: float, seed: int) -> None:
    reference = np.array(values)
    candidate = reference + np.random.default_rng(seed).standard_normal(len(values))
    needed = compare({"y": reference}, {"y": candidate}, Tolerance(0.0, rtol)).outputs[0].needed_atol
    assert compare({"y": reference}, {"y": candidate}, Tolerance(needed * 1.0001 + 1e-12, rtol))
    if needed > 1e-9:
        assert not compare({"y": reference}, {"y": candidate}, Tolerance(needed * 0.999, rtol))


def test_needed_rtol_passes() -> None:
    reference, candidate = {"y": np.array([1.0, 2.0])}, {"y": np.array([1.1, 2.6])}
    needed = compare(reference, candidate, Tolerance(0.05)).outputs[0].needed_rtol
    assert needed == pytest.approx(0.275)
    assert compare(reference, candidate, Tolerance(0.05, needed * 1.0001))
    assert not compare(reference, candidate, Tolerance(0.05, needed * 0.999))


def test_equal_outputs() -> None:
    report = compare(REFERENCE, REFERENCE, Tolerance(0.0))
    assert report.passed and report.outputs[0].psnr_db == math.inf and report.outputs[0].cosine == 1
    data = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert data["passed"] is True and data["outputs"][0]["psnr_db"] is None and data["outputs"][0]["max_abs"] == 0


@pytest.mark.parametrize("side", ["reference", "candidate"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_fails_on_either_side(side: str, value: float) -> None:
    bad = {"y": np.array([0.0, 1.0, value, 4.0])}
    pair = (bad, REFERENCE) if side == "reference" else (REFERENCE, bad)
    report = compare(*pair, Tolerance(1e30, 1e30))
    assert not report and f"1 of 4 values of the {side}" in report.text()
    assert not compare(bad, bad, Tolerance(1e30))
    json.dumps(report.to_json(), allow_nan=False)


def test_missing_extra_and_misshapen_outputs_fail() -> None:
    tolerance = Tolerance(1e30)
    assert not compare({}, {}, tolerance)
    assert "candidate has no such output" in compare(REFERENCE, {}, tolerance).text()
    assert "reference has no such output" in compare(REFERENCE, {**REFERENCE, "z": np.zeros(1)}, tolerance).text()
    assert "shape (2, 2), expected (4,)" in compare(REFERENCE, {"y": np.zeros((2, 2))}, tolerance).text()


def test_psnr_alone_may_decide() -> None:
    candidate = {"y": REFERENCE["y"] + np.float32(0.04)}
    assert compare(REFERENCE, candidate, Tolerance(psnr_db=39.9))
    report = compare(REFERENCE, candidate, Tolerance(psnr_db=40.1))
    assert not report and "PSNR 40.0 dB is less than 40.1 dB" in report.text()


def test_zero_reference_and_empty_output() -> None:
    zero = {"y": np.zeros(3, np.float32)}
    assert compare(zero, zero, Tolerance(0.0)).outputs[0].cosine == 1
    report = compare(zero, {"y": np.full(3, 1e-3)}, Tolerance(1e-2))
    assert report and report.outputs[0].psnr_db == -math.inf and report.outputs[0].max_rel == math.inf
    assert compare({"y": np.zeros((0, 4))}, {"y": np.zeros((0, 4))}, Tolerance(0.0))


def test_require_names_the_worst_output() -> None:
    reference = {"good": np.ones(2), "bad": np.ones(2)}
    report = compare(reference, {"good": np.ones(2), "bad": np.zeros(2)}, Tolerance(1e-4, 1e-3))
    with pytest.raises(ParityError, match=r"unet does not compute the same .*FAIL bad: max 1"):
        report.require("unet")
    compare(reference, reference, Tolerance(0.0)).require("unet")
    with pytest.raises(ParityError, match="no output"):
        compare({}, {}, Tolerance(0.0)).require("unet")


def test_float16_outputs_do_not_overflow_in_the_comparison() -> None:
    big = {"y": np.full(1000, 60000, np.float16)}
    found = compare(big, {"y": -big["y"]}, Tolerance(0.0)).outputs[0]
    assert found.max_abs == 120000 and found.cosine == pytest.approx(-1)
