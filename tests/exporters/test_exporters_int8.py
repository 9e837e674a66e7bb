"""Graphs that round activations to codes: ranges from a calibration, the proof of them, and the faults it catches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator

from diffship.calibration.capture import Capture, calibrate
from diffship.calibration.simulation import coded_inputs
from diffship.calibration.stored import calibration_digest, read_calibration, write_calibration
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.precision import INT8, Affine
from diffship.core.weights import MemoryWeights
from diffship.export import export
from diffship.exporters.onnx import Onnx
from diffship.exporters.onnx.stored import Stored
from diffship.models.pipeline import Pipeline
from diffship.runtimes.engines.engine import make_engine
from diffship.runtimes.proof.verify import PartCheck, check_part

PART = "vae_decoder"
LAYER = "decoder.mid_block.resnets.0.conv1"


@pytest.fixture(scope="module")
def ranges(tiny_sd: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the decoder of `arch:tiny-sd`, from two pictures."""
    folder = tmp_path_factory.mktemp("ranges") / "cal"
    asked = Capture(("red apple", "black cat"), steps=1, guidance=1.0, size=64, parts=(PART,))
    write_calibration(calibrate(tiny_sd, asked, Job()), folder)
    return folder


@pytest.fixture(scope="module")
def bundle(tiny_sd: Pipeline, ranges: Path, graphs: Job, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    out = tmp_path_factory.mktemp("int8") / "bundle"
    parts = [PART, "vae_encoder"]
    return export(tiny_sd, out=out, parts=parts, precision="int8", calibration=str(ranges), ranges="max", job=graphs)


def checked(bundle: Bundle, engine: str = "onnxruntime") -> PartCheck:
    return check_part(bundle, bundle.part(PART), make_engine(engine))


def graph_of(bundle: Bundle) -> onnx.ModelProto:
    return onnx.load(str(bundle.file(f"{PART}/model.onnx")), load_external_data=False)


@pytest.mark.slow
def test_what_the_graph_says(bundle: Bundle, ranges: Path) -> None:
    part, seen = bundle.part(PART), read_calibration(ranges).parts[PART].layers
    assert part.extra["calibration"] == {"digest": calibration_digest(ranges), "ranges": "max"}
    assert bundle.part("vae_encoder").precision == "int8-weights", "the calibration has no ranges of it"
    model = onnx.load(str(bundle.file(f"{PART}/model.onnx")))
    onnx.checker.check_model(model, full_check=True)
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    nodes = {name: node for node in model.graph.node for name in node.output}
    layers = 0
    for node in model.graph.node:
        kernel = nodes.get(node.input[1]) if node.op_type in ("Conv", "MatMul") else None
        if kernel is None or kernel.op_type != "DequantizeLinear" or not kernel.input[0].count("packed"):
            continue
        back = nodes[node.input[0]]
        forth = nodes[back.input[0]]
        assert (back.op_type, forth.op_type) == ("DequantizeLinear", "QuantizeLinear")
        assert list(back.input[1:]) == list(forth.input[1:])
        scale, zero = (numpy_helper.to_array(arrays[name]) for name in back.input[1:])
        one = seen[Stored.of(kernel.input[0]).source.removesuffix(".weight")]
        low, high = min(float(one.low.min()), 0), max(float(one.high.max()), 0)
        assert scale == pytest.approx((high - low) / 255, rel=1e-6) and zero.dtype == np.uint8
        assert (0 - zero.astype(float)) * scale == pytest.approx(low, abs=float(scale))
        assert np.abs(numpy_helper.to_array(arrays[kernel.input[0]])).max() == 63
        layers += 1
    assert layers == len(seen)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_engines_agree_with_the_simulation(bundle: Bundle, engine: str) -> None:
    check = checked(bundle, engine)
    assert check.status == "passed", check.text()
    assert check.quality is not None and check.report is not None
    assert 15 < check.quality.worst.psnr_db < check.report.worst.psnr_db


def test_the_simulation_rounds_as_onnx_says() -> None:
    """onnx.reference is the standard's own implementation; halves go to the even code."""
    codes = Affine(0.5, 3, 8)
    values = np.array([[-9.0, -1.75, -1.25, -0.25, 0.0, 0.25, 0.75, 60.1, 126.0, 900.0]], np.float32)
    scale, zero = np.array(0.5, np.float32), np.array(3, np.uint8)
    nodes = [
        onnx.helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        onnx.helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    ports = [onnx.helper.make_tensor_value_info(name, 1, None) for name in ("x", "y")]
    held = [numpy_helper.from_array(scale, "s"), numpy_helper.from_array(zero, "z")]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", ports[:1], ports[1:], held))
    (expected,) = ReferenceEvaluator(model).run(None, {"x": values})
    module = torch.nn.Module()
    module.inner = torch.nn.ModuleDict({"layer": torch.nn.Linear(10, 10, bias=False)})
    torch.nn.init.eye_(module.inner["layer"].weight)
    with coded_inputs(module, replace(INT8, ranges={"layer": codes})), torch.no_grad():
        found = module.inner["layer"](torch.from_numpy(values)).numpy()
    assert np.array_equal(found, expected)
    assert found[0].tolist() == [-1.5, -1.5, -1.0, 0.0, 0.0, 0.0, 1.0, 60.0, 126.0, 126.0]


FAULTS: dict[str, tuple[str, int, Callable[[np.ndarray], np.ndarray]]] = {
    "a scale of codes is broken": ("DequantizeLinear", 1, lambda value: value * np.float32(1.03)),
    "a zero of codes is lost": ("DequantizeLinear", 2, lambda value: value * 0),
    "codes are clipped": ("both", 1, lambda value: value / np.float32(4)),
    "codes are coarse": ("both", 1, lambda value: value * np.float32(4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(bundle: Bundle, tmp_path: Path, fault: str) -> None:
    which, place, change = FAULTS[fault]
    shutil.copytree(bundle.path, tmp_path / "bundle")
    model = graph_of(bundle)
    made = {name: node for node in model.graph.node for name in node.output}
    conv = next(node for node in model.graph.node if node.op_type == "Conv" and node.name.startswith(LAYER))
    back = made[conv.input[0]]
    forth = made[back.input[0]]
    held = {tensor.name: tensor for tensor in model.graph.initializer}
    value = change(numpy_helper.to_array(held[back.input[place]]))
    model.graph.initializer.append(numpy_helper.from_array(value, "other"))
    for node in (back, forth) if which == "both" else (back,):
        node.input[place] = "other"
    (tmp_path / "bundle" / PART / "model.onnx").write_bytes(model.SerializeToString())
    check = checked(Bundle(tmp_path / "bundle", bundle.manifest))
    assert check.status == "failed", check.text()
    assert LAYER.startswith(check.blocks[0].failed[0].removesuffix(".out")), "the proof names the place"


@pytest.mark.slow
def test_ranges_of_other_weights_are_refused(tiny_sd: Pipeline, ranges: Path, tmp_path: Path) -> None:
    component = tiny_sd.components[PART]
    arrays = {name: np.array(component.weights.read(name)) for name in component.weights.names()}
    arrays["post_quant_conv.bias"] += 1
    other = replace(tiny_sd, components={PART: replace(component, weights=MemoryWeights(arrays))})
    with pytest.raises(ConfigError, match="the calibration is of another vae_decoder"):
        export(other, out=tmp_path / "b", precision="int8", calibration=str(ranges))
    assert not (tmp_path / "b").exists()


def test_what_does_not_go_together_is_refused(tiny_sd: Pipeline, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="int8 needs what diffship calibrate measured: give --calibration CAL"):
        Onnx(precision="int8")
    with pytest.raises(ConfigError, match="int4-weights takes no --calibration"):
        Onnx(precision="int4-weights", calibration="somewhere")
    with pytest.raises(ConfigError, match="nowhere"):
        Onnx(precision="int8", calibration=str(tmp_path / "nowhere")).check(tiny_sd)
