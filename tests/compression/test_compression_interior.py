"""What narrowing saves, counted per layer, against the model that is built."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from diffship.compression import interior
from diffship.compression.interior import CROSS, FEEDFORWARD, RESIDUAL, SELF, Layer, layers, unit_macs, widths_for
from diffship.models.parts.unet import unet
from diffship.models.pipeline import Pipeline
from diffship.models.reduced.widths import widths_of, with_widths
from diffship.models.sources.opening import open_source
from diffship.models.walks.cost import cost

SIZES = {"height": 16, "width": 8}


def narrower(pipeline: Pipeline, listed: tuple[Layer, ...], counts: dict[str, int]) -> tuple[int, int]:
    """(parameters, MACs) of the U-Net built with these counts, on the meta device."""
    old = pipeline.components["unet"]
    config = with_widths(old.config, widths_for(listed, counts).over(widths_of(old.config)))
    found = cost(replace(unet(config, old.weights), smallest=old.smallest), SIZES)
    return found.params, found.macs


@pytest.mark.slow
@pytest.mark.parametrize("source", ["arch:tiny-sd", "arch:tiny-sdxl", "emoji"])
def test_what_layers_save_adds_up_to_the_built_model(source: str) -> None:
    pipeline = open_source(source)
    listed = layers(pipeline.components["unet"], feedforward=True)
    assert {layer.kind for layer in listed} == {RESIDUAL, SELF, CROSS, FEEDFORWARD}
    rng = np.random.default_rng(0)
    counts = {layer.name: layer.kept(float(rng.choice([0.25, 0.5, 0.75, 1.0]))) for layer in listed}
    whole, small = narrower(pipeline, listed, {}), narrower(pipeline, listed, counts)
    macs = unit_macs(pipeline.components["unet"], listed, SIZES)
    saved = [(layer.size - counts[layer.name], layer) for layer in listed]
    assert whole[0] - small[0] == sum(count * layer.parameters for count, layer in saved) > 0
    assert whole[1] - small[1] == sum(count * macs[layer.name] for count, layer in saved) > 0


@pytest.mark.slow
def test_one_layer_of_each_kind() -> None:
    pipeline = open_source("arch:tiny-sd")
    listed = layers(pipeline.components["unet"], feedforward=True)
    whole, macs = narrower(pipeline, listed, {}), unit_macs(pipeline.components["unet"], listed, SIZES)
    for layer in {layer.kind: layer for layer in listed}.values():
        gone = layer.size - layer.kept(0.25)
        small = narrower(pipeline, listed, {layer.name: layer.kept(0.25)})
        expected = gone * layer.parameters, gone * macs[layer.name]
        assert (whole[0] - small[0], whole[1] - small[1]) == expected, layer.kind


KEPT = {
    (1280, 32, 0.25): 320,
    (320, 32, 0.25): 96,
    (320, 32, 0.75): 256,
    (8, 1, 0.25): 2,
    (8, 1, 0.75): 6,
    (3, 1, 0.25): 1,
    (96, 32, 0.75): 96,
    (64, 32, 0.1): 32,
    (16, 8, 0.75): 16,
}


@pytest.mark.parametrize(("size", "step", "keep"), list(KEPT))
def test_widths_are_legal(size: int, step: int, keep: float) -> None:
    assert Layer("x", RESIDUAL, size, step, 1).kept(keep) == KEPT[size, step, keep]


@pytest.mark.slow
def test_wide_models_keep_multiples_of_32_and_narrow_ones_their_norm_groups() -> None:
    wide = layers(open_source("arch:sd15").components["unet"], feedforward=True)
    assert {layer.step for layer in wide} == {1, 32}
    assert all(layer.step == 1 for layer in wide if layer.kind in (SELF, CROSS))
    tiny = layers(open_source("arch:tiny-sd").components["unet"])
    assert {layer.step for layer in tiny if layer.kind == RESIDUAL} == {8}


def test_lost_norm_is_what_is_cut_away() -> None:
    component = open_source("arch:tiny-sd").components["unet"]
    layer = next(layer for layer in layers(component) if layer.kind == RESIDUAL)
    filters = component.weights.read(f"{layer.name}.conv1.weight").astype(np.float64)
    kept = interior.largest_kept(component.weights, [layer], {layer.name: layer.kept(0.5)}).inner[layer.name]
    gone = np.delete(filters, kept, 0)
    expected = math.sqrt((gone**2).sum() / (filters**2).sum())
    found = interior.norms(component.weights, layer)
    assert interior.lost_norm(found, len(kept)) == pytest.approx(expected)
    assert interior.lost_norm(found, layer.size) == 0
