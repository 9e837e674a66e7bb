"""`verify --reduce`: the node that an engine gets wrong is named, whatever way it is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.core.bundle import Bundle
from diffship.core.errors import RunnerError, UnsupportedError
from diffship.runtimes.engines.engine import make_engine
from diffship.runtimes.proof.suspects import look_into, suspects, tolerance_of
from diffship.runtimes.proof.verify import read_golden

onnx = pytest.importorskip("onnx")
PART = "vae_decoder"


@dataclass
class Faulty:
    """ONNX Runtime that gets the output `name` wrong: always, only where nobody asks for it, or by giving up."""

    name: str
    how: str = "always"

    def open(self, files: Sequence[Path]) -> Any:
        model = onnx.load(str(files[0]), load_external_data=False)
        asked = self.name in {port.name for port in model.graph.output}
        mine = [node for node in model.graph.node if self.name in node.output]
        if mine and self.how == "gives up":
            raise RunnerError("no kernel")
        if mine and not (asked and self.how == "fused"):
            self._spoil(model, mine[0])
            files = [files[0].with_name("stage_spoiled.onnx"), *files[1:]]
            onnx.save(model, str(files[0]))
        return make_engine("onnxruntime", {"threads": 1}).open(files)

    def _spoil(self, model: Any, node: Any) -> None:
        node.output[0] = "right"
        half = onnx.helper.make_tensor("half", onnx.TensorProto.FLOAT, [], [1.5])
        model.graph.initializer.append(half)
        place = list(model.graph.node).index(node) + 1
        model.graph.node.insert(place, onnx.helper.make_node("Mul", ["right", "half"], [self.name], name="spoiled"))


@pytest.fixture(scope="module")
def graph(tiny_bundle: Path) -> Any:
    """(file, feeds, tolerance, the output of a convolution in the middle, its node's name)."""
    bundle = Bundle.open(tiny_bundle)
    part = bundle.part(PART)
    assert part.golden is not None
    file = bundle.file(part.files[0])
    nodes = [node for node in onnx.load(str(file), load_external_data=False).graph.node if node.op_type == "Conv"]
    node = nodes[len(nodes) // 2]
    return file, read_golden(bundle, part.golden)[0][0], tolerance_of(part), node.output[0], node.name


@pytest.mark.slow
def test_a_node_that_is_always_wrong_is_named(graph: Any) -> None:
    file, feeds, tolerance, output, node = graph
    where, what = suspects(file, Faulty(output), feeds, tolerance)
    assert where.startswith("stretch ") and f"node Conv {node}: FAIL" in what


@pytest.mark.slow
def test_a_node_that_is_wrong_only_within_others_is_told_as_that(graph: Any) -> None:
    file, feeds, tolerance, output, _ = graph
    _, what = suspects(file, Faulty(output, "fused"), feeds, tolerance)
    assert "several nodes computed as one" in what


def test_an_engine_that_gives_up_is_told_with_its_words(graph: Any) -> None:
    file, feeds, tolerance, output, _ = graph
    where, what = suspects(file, Faulty(output, "gives up"), feeds, tolerance)
    assert where.endswith(": no kernel") and what == "its nodes cannot be looked at one by one: no kernel"


def test_an_engine_cannot_be_looked_into(tiny_bundle: Path) -> None:
    from dataclasses import replace

    bundle = Bundle.open(tiny_bundle)
    part = replace(bundle.part(PART), files=bundle.part("unet").files[1:])
    with pytest.raises(UnsupportedError, match=r"give the --to onnx bundle .* with --graphs"):
        look_into(bundle, part, make_engine("onnxruntime"), {"x": np.zeros(1)})
