"""Stages one after the other as one runner, against a plain loop over them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path.append(str(Path(__file__).parents[1] / "partition"))  # partition_oracle

from partition_oracle import Toy, toys

from diffship.core.errors import RunnerError
from diffship.core.runner import Handle
from diffship.core.spec import TensorSpec
from diffship.runtimes.engines.chain import ChainRunner


class Told(Toy):
    """A stage that also adds a constant, which has to be one that it keeps itself."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return (*super().inputs, TensorSpec("words", "float32", ("batch_size",)))

    def put(self, array: Any) -> Handle:
        return Handle((self.name, array), tuple(array.shape))

    def run(self, feeds: Any) -> dict[str, Any]:
        owner, words = feeds["words"].value
        assert owner == self.name
        rest = {name: feed for name, feed in feeds.items() if name != "words"}
        made = Toy(self.name, self.reads, self.writes, self.gain).run(rest)
        return {name: array + words.sum() for name, array in made.items()}


def chain(stages: list[Any], inputs: tuple[str, ...], closed: list[str]) -> ChainRunner:
    specs = tuple(TensorSpec(name, "float32", ("batch_size",)) for name in inputs)
    out = (TensorSpec("out_sample", "float32", ("batch_size",)),)
    return ChainRunner("unet", stages, specs, out, lambda: closed.append("unet"))


def test_a_chain_is_its_stages_in_order() -> None:
    stages, closed = toys(3, ends=True)[0], list[str]()
    feeds = {"sample": np.random.default_rng(1).standard_normal((2, 4, 4, 4)).astype(np.float32)}
    feeds["timestep"] = np.float32([700.0])
    values: dict[str, Any] = dict(feeds)
    for stage in stages:
        values |= stage.run({spec.name: values[spec.name] for spec in stage.inputs})
    runner = chain(stages, ("sample", "timestep"), closed)
    found = runner.run(feeds)
    assert list(found) == ["out_sample"] and np.array_equal(found["out_sample"], values["out_sample"])
    runner.close()
    assert closed == ["unet"]
    with pytest.raises(RunnerError, match="part unet: missing feed timestep; it takes sample, timestep"):
        runner.run({"sample": feeds["sample"]})
    with pytest.raises(RunnerError, match="unknown feed 'samples'; did you mean 'sample'"):
        runner.run({**feeds, "samples": feeds["sample"]})


def test_every_stage_keeps_a_constant_of_its_own() -> None:
    stages = [Told(toy.name, toy.reads, toy.writes, toy.gain) for toy in toys(2)[0]]
    runner = chain(stages, ("sample", "timestep", "words"), [])
    words = runner.put(np.ones((2, 3), np.float32))
    assert words.shape == (2, 3)
    made = runner.run({"sample": np.zeros((1, 4, 4, 4), np.float32), "timestep": np.float32([7]), "words": words})
    assert made["out_sample"].shape == (1, 4, 4, 4)
