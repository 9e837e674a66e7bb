"""The study of number formats: what is asked, how like pictures are, and what is said of costs."""

from __future__ import annotations

import numpy as np
import pytest

from diffship.benchmarks.studies.quality.formats import (
    EQUAL_DB,
    FORMATS,
    REFERENCE,
    cost_rows,
    main,
    picture_db,
    quality_rows,
)
from diffship.benchmarks.studies.quality.judging import Judged
from diffship.core.errors import ConfigError
from diffship.exporters.onnx import Onnx


def judged(top5: list[float]) -> Judged:
    return Judged({"top1": top5, "top5": top5}, 1.0, tuple(f"prompt {i}" for i in range(len(top5))))


def test_every_format_is_one_that_the_exporter_takes() -> None:
    for entry in FORMATS.values():
        options = {**entry.options, "calibration": "somewhere"} if entry.measured else entry.options
        assert Onnx(**options).precision == entry.options["precision"]
    with pytest.raises(ConfigError, match="did you mean 'fp16'"):
        main(["--formats", "fp15", "--data", "nowhere"])


def test_decibels_are_those_of_the_definition() -> None:
    reference = np.zeros((3, 2, 2, 3), np.uint8)
    ours = reference.copy()
    ours[1] += 51  # a fifth of the range everywhere: 20 log10(5) dB
    ours[2, 0, 0, 0] = 255  # one value of twelve: 10 log10(12) dB
    assert picture_db(ours, reference) == pytest.approx([EQUAL_DB, 20 * np.log10(5), 10 * np.log10(12)])


def test_formats_are_compared_with_the_reference_and_it_is_not_with_itself() -> None:
    found = {REFERENCE.name: [judged([1.0, 1.0, 0.0, 1.0])], "fp16": [judged([1.0, 0.0, 0.0, 1.0])]}
    likeness = {"fp16": [[40.0, 50.0, 60.0, 50.0]], REFERENCE.name: [[EQUAL_DB] * 4]}
    rows = {(row.subject, row.metric): row for row in quality_rows(found, likeness)}
    assert rows["fp16", "picture_psnr"].value == 50.0 and (REFERENCE.name, "picture_psnr") not in rows
    assert rows["fp16 against fp32", "top5_difference"].value == -0.25


def test_costs_are_shares_of_the_reference_in_the_same_rounds() -> None:
    seconds = {"fp32": [1.0, 2.0, 4.0], "int8, max": [0.5, 1.0, 2.0]}
    rows = {(row.subject, row.metric): row for row in cost_rows({"fp32": 400, "int8, max": 100}, seconds)}
    assert rows["int8, max", "unet_bytes_share"].value == 0.25
    assert rows["int8, max", "picture_seconds_ratio"].value == pytest.approx(0.5)
    assert rows["int8, max", "picture_seconds_ratio"].conditions["verdict"] == "faster"
