"""The study of number formats: what is asked, how like pictures are, and what is said of costs."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.benchmarks.studies.quality import emoji_quality
from diffship.benchmarks.studies.quality.emoji_quality import draw_once
from diffship.benchmarks.studies.quality.formats import (
    EQUAL_DB,
    FORMATS,
    REFERENCE,
    command_of,
    cost_rows,
    main,
    picture_db,
    quality_rows,
)
from diffship.benchmarks.studies.quality.judging import Judged
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.exporters.onnx import Onnx
from diffship.runtimes.engines.model import BundleModel


def judged(top5: list[float]) -> Judged:
    return Judged({"top1": top5, "top5": top5}, 1.0, tuple(f"prompt {i}" for i in range(len(top5))))


def test_every_format_is_one_that_the_exporter_takes() -> None:
    for entry in FORMATS.values():
        options = {**entry.options, "calibration": "somewhere"} if entry.measured else entry.options
        assert Onnx(**options).precision == entry.options["precision"]
    with pytest.raises(ConfigError, match="did you mean 'fp16'"):
        main(["--formats", "fp15", "--data", "nowhere"])


def test_pictures_of_one_format_are_not_taken_for_those_of_another(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bundles of one source have one digest; their files tell them apart."""
    bundle = Bundle.open(tiny_bundle)
    manifest, name = bundle.manifest, bundle.part("unet").files[-1]
    files = {**manifest.files, name: replace(manifest.files[name], sha256="0" * 64)}
    other = replace(bundle, manifest=replace(manifest, files=files))
    drawn: list[Any] = []

    def draw(model: Any, *_: Any, **more: Any) -> Any:
        drawn.append(model)
        return np.full((1, 8, 8, 3), len(drawn), np.uint8)

    monkeypatch.setattr(emoji_quality, "draw", draw)
    monkeypatch.setattr(emoji_quality, "digest", lambda *_: "")  # of the code, which takes a second
    models = [BundleModel(one, "onnxruntime") for one in (bundle, other, bundle)]
    assert len({model.digest for model in models}) == 1
    found = [draw_once(Job(tmp_path), "formats", model, ["red apple"], 0, steps=1, guidance=1.0) for model in models]
    assert [int(pixels[0, 0, 0, 0]) for pixels in found] == [1, 2, 1]


def test_the_command_of_a_file_says_all_that_was_asked_for() -> None:
    asked = argparse.Namespace(prompts=3, seeds=2, samples=8, rounds=5, formats=list(FORMATS))
    told = "python -m diffship.benchmarks formats --prompts=3 --seeds=2 --samples=8 --rounds=5"
    assert command_of(asked) == told
    asked.formats = ["fp16", "int8, max"]
    assert command_of(asked) == f"{told} --formats fp16 'int8, max'"


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
    assert rows["int8, max", "denoiser_bytes_share"].value == 0.25
    assert rows["int8, max", "picture_seconds_ratio"].value == pytest.approx(0.5)
    assert rows["int8, max", "picture_seconds_ratio"].conditions["verdict"] == "faster"
