"""Sensitivity: a planted outlier is found, and what a budget buys is what a search over every choice buys."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

from diffship.calibration.capture import Capture, calibrate
from diffship.calibration.packed import packed_bytes
from diffship.calibration.packings import packings, without
from diffship.calibration.sensitivity import (
    Sensitivity,
    choose,
    measure,
    measured_part,
    read_sensitivity,
    write_sensitivity,
)
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.precision import INT4_WEIGHTS, INT8_WEIGHTS
from diffship.core.weights import MemoryWeights
from diffship.exporters.onnx import Onnx
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source

PLANTED = "up_blocks.3.attentions.2.transformer_blocks.0.ff.net.2"
ASKED = Capture(("red apple",), steps=2, guidance=1.0, size=64, batch=1)


def _some(pipeline: Pipeline) -> Sensitivity:
    """Of four layers, so that it takes seconds."""
    seen = calibrate(pipeline, ASKED, Job())
    part = seen.parts["unet"]
    names = [PLANTED, *list(part.layers)[40:43]]
    few = replace(part, layers={name: part.layers[name] for name in names})
    return measure(pipeline, ASKED, replace(seen, parts={"unet": few}), Job())


@pytest.mark.slow
def test_a_planted_outlier_is_found(tmp_path: Path) -> None:
    """One channel of a layer's input is a thousand times as large, and its weights a thousandth: the same network."""
    tiny = open_source("arch:tiny-sd")
    unet = tiny.components["unet"]
    arrays: dict[str, Any] = {name: np.array(unet.weights.read(name)) for name in unet.weights.names()}
    width = arrays[f"{PLANTED}.weight"].shape[1]
    up = f"{PLANTED.removesuffix('.net.2')}.net.0.proj"
    for array in (arrays[f"{up}.weight"], arrays[f"{up}.bias"]):
        array[1] *= 1000  # the value half of GEGLU, whose other half is the gate
    arrays[f"{PLANTED}.weight"][:, 1] /= 1000
    assert arrays[f"{up}.bias"].shape[0] == 2 * width
    planted = replace(tiny, components={**tiny.components, "unet": replace(unet, weights=MemoryWeights(arrays))})
    before, table = (_some(pipeline) for pipeline in (tiny, planted))
    assert table.worst("int8", 1)[0][0] == PLANTED
    assert table.errors[PLANTED]["int8"] > 20 * before.errors[PLANTED]["int8"]
    assert set(table.errors) == set(before.errors) and len(table.errors) == 4
    write_sensitivity(table, tmp_path)
    assert measured_part(tmp_path) == "unet"
    assert read_sensitivity(tmp_path, "unet", table.digest) == table
    with pytest.raises(ConfigError, match="is of another unet"):
        read_sensitivity(tmp_path, "unet", "0" * 64)


@pytest.mark.slow
def test_a_budget_buys_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers, three choices each: all 81 are tried."""
    unet = open_source("arch:tiny-sd").components["unet"]
    names = list(packings(unet, INT8_WEIGHTS))[:4]
    ways = {kind: {name: packings(unet, kind)[name] for name in names} for kind in (INT8_WEIGHTS, INT4_WEIGHTS)}
    monkeypatch.setattr("diffship.calibration.sensitivity.packings", lambda _, kind: ways[kind])
    rng = np.random.default_rng(2)
    eights = rng.random(4) * 1e-3
    errors = {
        name.removesuffix(".weight"): {"int8-weights": float(e), "int4-weights": float(e * rng.uniform(20, 90))}
        for name, e in zip(names, eights, strict=True)
    }
    table = Sensitivity(1, "unet", "0" * 64, 2.0, errors)
    counts = [unet.weights.meta(name).count for name in names]
    for bits in (6.5, 8.2, 14.0, 32.0):
        found = choose(table, unet, bits)
        costs, scores = [], []
        for picked in product(range(3), repeat=4):
            size, score = 0.0, 0.0
            for way, name, count in zip(picked, names, counts, strict=True):
                kind = (None, INT8_WEIGHTS, INT4_WEIGHTS)[way]
                meta = unet.weights.meta(name)
                size += 4 * count if kind is None else packed_bytes(ways[kind][name], meta.shape)
                score += 0 if kind is None else errors[name.removesuffix(".weight")][kind.name]
            costs.append(8 * size / sum(counts))
            scores.append(score)
        best = min(score for cost, score in zip(costs, scores, strict=True) if cost <= bits)
        assert found.bits <= bits
        assert found.predicted_db == pytest.approx(table.psnr(best))
    assert found.packings == {} and found.predicted_db == float("inf")
    with pytest.raises(ConfigError, match=r"3 bits a weight cannot be met; the least is 6\.25"):
        choose(table, unet, 3.0)


@pytest.mark.slow
def test_layers_that_a_user_keeps_stay() -> None:
    unet = open_source("arch:tiny-sd").components["unet"]
    found = packings(
        unet, Onnx(precision="int4-weights", keep=("unet.mid_block", "unet.down_blocks.0.resnets.0.conv1")).bound(unet)
    )
    gone = set(packings(unet, INT4_WEIGHTS)) - set(found)
    assert "down_blocks.0.resnets.0.conv1.weight" in gone
    assert {name for name in gone if not name.startswith("mid_block.")} == {"down_blocks.0.resnets.0.conv1.weight"}
    with pytest.raises(ConfigError, match=r"keep: unknown layer of unet 'mid_blok'"):
        without(packings(unet, INT4_WEIGHTS), ("mid_blok",), "unet")
    with pytest.raises(ConfigError, match="fp32 packs no layer"):
        Onnx(keep=("unet.mid_block",))
    with pytest.raises(ConfigError, match="--bits is the budget of --precision mixed-weights"):
        Onnx(precision="int8-weights", bits=5.0)
    with pytest.raises(ConfigError, match="mixed-weights needs what diffship calibrate measured"):
        Onnx(precision="mixed-weights", bits=5.0)
