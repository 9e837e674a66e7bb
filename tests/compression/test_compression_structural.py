"""The structural pruning pass: budgets, what it writes, and what it refuses."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from structural_cases import outputs, small_model, with_pictures

from diffship.compression.narrow import interiors
from diffship.compression.structural import PrunePass
from diffship.compression.traced import KINDS, Interior, traced
from diffship.core.errors import ConfigError, MissingExtra
from diffship.core.job import Job
from diffship.core.registry import PASSES, load
from diffship.core.strict import load as load_options
from diffship.core.weights import Weights
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source

Command = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def small() -> Pipeline:
    return small_model()


@pytest.fixture(scope="module")
def found(small: Pipeline) -> list[Interior]:
    return traced(small.components["unet"])[1]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_pictures(tmp_path_factory.mktemp("pictures"))


# the pass


@pytest.mark.slow
def test_a_pruned_model_loads_back_to_the_same_bits(small: Pipeline, tmp_path: Path) -> None:
    made = PrunePass(keep=0.5).run(small, Job())
    config = made.components["unet"].config["diffship"]
    assert set(config) == {"inner", "heads", "feedforward"} and all(config.values())
    again = open_source(str(save(made, tmp_path / "pruned")))
    assert json.loads((tmp_path / "pruned" / "unet" / "config.json").read_text())["diffship"] == config
    np.testing.assert_array_equal(outputs(again.components["unet"]), outputs(made.components["unet"]))
    assert [entry["pass"] for entry in again.history] == ["layout", "prune"]
    assert again.history[-1]["layers"] == list(KINDS)
    count = sum(parameter.numel() for parameter in again.components["unet"].meta.parameters())
    assert made.history[-1]["parameters"] == count < made.history[-1]["parameters_before"]


@pytest.mark.slow
def test_pruning_a_pruned_model_goes_on_from_its_widths(small: Pipeline) -> None:
    once = PrunePass(keep=0.75, layers=("feedforward",)).run(small, Job())
    twice = PrunePass(keep=0.5, layers=("feedforward", "heads")).run(once, Job())
    first, now, last = (interiors(one.components["unet"]) for one in (small, once, twice))
    assert now.feedforward == {name: size * 3 // 4 for name, size in first.feedforward.items()}
    assert last.feedforward == {name: size // 2 for name, size in now.feedforward.items()}
    assert last.heads == {name: count // 2 for name, count in first.heads.items()}
    assert np.isfinite(outputs(twice.components["unet"])).all()


@pytest.mark.slow
@pytest.mark.parametrize("ranking", ["layer", "global"])
def test_a_budget_is_met_within_one_unit(small: Pipeline, found: list[Interior], ranking: str) -> None:
    entry = PrunePass(parameters=0.7, ranking=ranking).run(small, Job()).history[-1]
    target = entry["parameters_before"] * 0.7
    assert entry["parameters"] <= target < entry["parameters"] + max(one.cost for one in found)
    assert entry["parameters_share"] == 0.7


@pytest.mark.slow
def test_the_outline_has_the_shapes_of_the_result(small: Pipeline, pictures: Path) -> None:
    step = PrunePass(parameters=0.7)
    told, made = step.outline(small).pipeline, step.run(small, Job())
    assert interiors(told.components["unet"]) == interiors(made.components["unet"])
    options: dict[str, Any] = {
        "ranking": "global",
        "layers": ("heads",),
        "data": str(pictures),
        "batch": 4,
        "stride": 3,
    }
    long = PrunePass(keep=0.7, criterion="taylor", **options)
    outline = long.outline(small)
    assert [(calls.count, calls.part.name) for calls in outline.calls] == [(3 * 4 * 334, "unet")]
    assert "hangs on their scores" in outline.note


@pytest.mark.slow
def test_a_pruned_folder_exports_and_draws(command: Command, tmp_path: Path, graphs_folder: Path) -> None:
    """The gate of the export compares ONNX Runtime with torch on the narrowed U-Net."""
    folder, bundle = tmp_path / "pruned", tmp_path / "bundle"
    options = ("--set", "keep=0.5", "--set", "layers=inner,heads,feedforward", "--cache", tmp_path / "cache")
    made = command("compress", "arch:tiny-sd", "--pass", "prune", *options, "-o", folder)
    assert made["exit_code"] == 0 and made["history"][-1]["pass"] == "prune", made["stderr"]
    done = command("export", folder, "--to", "onnx", "-o", bundle, "--cache", graphs_folder)
    assert done["exit_code"] == 0, done["stderr"]
    drawn = command("run", bundle, "a cat", "--steps", "2", "-o", tmp_path / "cat.png")
    assert drawn["exit_code"] == 0, drawn["stderr"]


# what is refused


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give either keep"),
        ({"keep": 0.5, "parameters": 0.5}, "give either keep"),
        ({"keep": 0.5, "layers": []}, "no layers are given; legal: inner, heads, feedforward"),
        ({"keep": 0.5, "layers": ["conv"]}, "unknown value 'conv'"),
        ({"keep": 0.5, "criterion": "taylor"}, "criterion taylor needs pictures with captions: data=FOLDER"),
        ({"keep": 0.5, "data": "x"}, "criterion magnitude takes no data; legal with data: taylor, diff-pruning"),
        ({"keep": 0.0}, "legal is from 0.01 to 1"),
        ({"keep": 0.5, "criterion": "magnitud"}, "did you mean 'magnitude'"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_options_are_checked(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        load_options(load(PASSES, "prune", "pass"), options, "pass prune")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 0.3}, r"attn1; the least that is legal there is 0\.5"),
        ({"keep": 0.1, "ranking": "global"}, "heads of 18 layers; the least"),
        ({"parameters": 0.05}, r"can reach [\d,]+, so 0\.\d+ is the least"),
    ],
    ids=["no head", "no head in all", "budget"],
)
def test_what_would_leave_nothing_is_refused(small: Pipeline, options: dict[str, Any], text: str) -> None:
    (problem,) = PrunePass(layers=("heads",), **options).check(small)
    assert problem.part == "unet" and re.search(text, problem.text), problem.text


@pytest.mark.slow
def test_the_least_budget_is_legal(small: Pipeline) -> None:
    (problem,) = PrunePass(parameters=0.05, layers=("heads",)).check(small)
    least = int(str(problem).split("can reach ")[1].split(", so")[0].replace(",", ""))
    made = PrunePass(parameters=(least + 1) / small.history[-1]["parameters"], layers=("heads",)).run(small, Job())
    assert made.history[-1]["parameters"] == least
    assert set(interiors(made.components["unet"]).heads.values()) == {1}


@pytest.mark.slow
def test_data_is_checked_before_work(small: Pipeline, pictures: Path, tmp_path: Path) -> None:
    step = PrunePass(keep=0.5, criterion="taylor", data=str(pictures), batch=9, layers=("feedforward",))
    assert [str(problem) for problem in step.check(small)] == [f"data: batch is 9; {pictures} has 4 pictures"]
    (problem,) = replace(step, data=str(tmp_path / "none")).check(small)
    assert "is not a folder of pictures with captions" in str(problem)


@pytest.mark.slow
def test_a_model_that_cannot_read_pictures_is_refused(small: Pipeline, pictures: Path) -> None:
    step = PrunePass(keep=0.5, criterion="taylor", data=str(pictures), batch=2, layers=("feedforward",))
    parts = {name: part for name, part in small.components.items() if name != "vae_encoder"}
    (problem,) = step.check(replace(small, components=parts))
    assert str(problem) == "vae_encoder: gradients need it, and the source has none: --base SOURCE"
    filling = replace(small, family=replace(small.family, unet_channels=9))
    (problem,) = step.check(filling)
    assert "fills masks" in str(problem)


def test_without_torch_pruning_its_extra_is_named(small: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    for ask in (lambda: PrunePass(keep=0.5).check(small), lambda: PrunePass(keep=0.5).run(small, Job())):
        with pytest.raises(MissingExtra, match=r"pip install 'diffship\[prune\]'"):
            ask()


@pytest.mark.slow
def test_weights_that_are_not_finite_are_named(small: Pipeline) -> None:
    class Damaged:
        def __init__(self, weights: Weights) -> None:
            self.weights = weights
            self.names, self.meta, self.nbytes = weights.names, weights.meta, weights.nbytes

        def read(self, name: str) -> NDArray[np.generic]:
            array = self.weights.read(name).copy()
            if name == "up_blocks.0.resnets.0.conv2.weight":
                array.flat[0] = np.nan
            return array

    unet = small.components["unet"]
    parts = {**small.components, "unet": replace(unet, weights=Damaged(unet.weights))}
    with pytest.raises(ConfigError, match=r"the scores of up_blocks\.0\.resnets\.0 are not finite"):
        PrunePass(keep=0.5, layers=("inner",)).run(replace(small, components=parts), Job())
