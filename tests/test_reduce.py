"""Stretches of a graph, each built as an engine of its own: fixed shapes, sizes as constants, metadata that opens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship import reduce
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.exporters.tensorrt.build import Order
from diffship.runtimes.engines.engine import make_engine
from diffship.runtimes.proof.verify import read_golden
from diffship.targets.tensorrt.plan import KINDS, PlanFacts, PlanInput, PlanOutput, read_facts

onnx = pytest.importorskip("onnx")


class Double:
    """Runs the graph that a plan was built from, in ONNX Runtime; `wrong` scales what the n-th stretch gives."""

    def __init__(self, wrong: int = 0) -> None:
        self.orders: list[Order] = []
        self._wrong = wrong

    def build(self, order: Order, part: str, job: Any) -> dict[str, Any]:
        self.orders.append(order)
        Path(order.out).write_bytes(b"plan")
        return {}

    def open(self, files: Sequence[Path]) -> Any:
        order, facts = self.orders[-1], read_facts(files[1])
        assert {name: entry.profiles[0] for name, entry in facts.inputs.items()} == order.shapes
        model = onnx.load(order.onnx, load_external_data=False)
        assert all(dim.dim_value for port in model.graph.input for dim in port.type.tensor_type.shape.dim)
        session = make_engine("onnxruntime", {"threads": 1}).open([Path(order.onnx)])
        if len(self.orders) == self._wrong:
            plain = session.run
            session.run = lambda feeds, outputs: [  # type: ignore[method-assign]
                array * 2 if array.dtype.kind == "f" else array for array in plain(feeds, outputs)
            ]
        return session


def looked(bundle: Bundle, name: str, double: Any) -> tuple[str, ...]:
    part = bundle.part(name)
    assert part.golden is not None
    feeds = read_golden(bundle, part.golden)[0][0]
    return reduce.through_graphs(bundle.path)(bundle, part, double, feeds)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs stand for the engines that were built from them."""
    shapes = {kind: [1] for kind in KINDS}
    ports = {"x": PlanInput("float32", (shapes,))}, {"y": PlanOutput("float32")}
    facts = PlanFacts("rtx", "1.2.3", "fp32", *ports)
    monkeypatch.setattr(reduce, "read_facts", lambda _: facts)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, plans: None) -> Any:
    def make(wrong: int = 0) -> Double:
        made = Double(wrong)
        monkeypatch.setattr(reduce, "run_build", made.build)
        monkeypatch.setattr(reduce, "library", lambda flavour: type("Library", (), {"__version__": "1.2.3"}))
        return made

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text_encoder", "unet", "vae_encoder", "vae_decoder"])
def test_stretches_that_compute_the_same_clear_the_engine(tiny_bundle: Path, double: Any, name: str) -> None:
    made = double()
    (said,) = looked(Bundle.open(tiny_bundle), name, made)
    assert "the graph or its weights are wrong, not the engine" in said and len(made.orders) > 2
    assert not any(np.size(shapes["opt"]) == 0 for order in made.orders for shapes in order.shapes.values())


def test_the_stretch_that_is_built_wrong_is_named(tiny_bundle: Path, double: Any) -> None:
    where, _ = looked(Bundle.open(tiny_bundle), "vae_decoder", double(wrong=2))
    assert where.startswith("stretch 2 of ")


def test_graphs_must_be_those_of_the_engine(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    part = bundle.part("unet")
    assert reduce._graph_of(bundle, part) == part
    with pytest.raises(ConfigError, match="precision of unet is fp32; the engine's is fp16"):
        reduce._graph_of(bundle, replace(part, precision="fp16", golden=None))
    with pytest.raises(ConfigError, match="source_digest of unet is"):
        reduce._graph_of(bundle, replace(part, source_digest="0" * 64))
    engines = Bundle(bundle.path, replace(bundle.manifest, target="tensorrt"))
    with pytest.raises(ConfigError, match="holds tensorrt; --graphs takes a bundle of --to onnx"):
        reduce._graph_of(engines, part)


def test_the_flag_needs_reduce(command: Any, tiny_bundle: Path) -> None:
    assert command("verify", tiny_bundle, "--graphs", tiny_bundle)["exit_code"] == 2


@pytest.mark.slow
@pytest.mark.usefixtures("rtx", "plans")
def test_every_stretch_can_be_built(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = Double(), reduce.run_build

    def build(order: Order, part: str, job: Any) -> dict[str, Any]:
        # on a GPU's host the library builds for that GPU; here one must be named
        found = real(replace(order, sm=(89,)), part, job)
        made.orders.append(order)
        return found

    monkeypatch.setattr(reduce, "run_build", build)
    (said,) = looked(Bundle.open(tiny_bundle), "unet", made)
    assert "not the engine" in said
