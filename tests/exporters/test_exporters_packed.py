"""Weights as integers in ONNX files: what is stored, what engines make of it, and which faults the proof catches."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file

from diffship.calibration.packings import packings
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.precision import FP32, INT4_WEIGHTS, INT8_WEIGHTS
from diffship.export import export
from diffship.exporters.onnx import Onnx
from diffship.exporters.onnx.stored import Stored
from diffship.models.pipeline import Pipeline
from diffship.runtimes.engines.engine import make_engine
from diffship.runtimes.proof.verify import PartCheck, check_part

PART = "vae_decoder"
PACKED = ("int4-weights", pytest.param("int8-weights", marks=pytest.mark.slow))


@pytest.fixture(scope="module")
def bundles(tiny_sd: Pipeline, graphs: Job, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The decoder of `arch:tiny-sd`, which has linear layers and convolutions, with weights packed as asked for."""
    folder = tmp_path_factory.mktemp("packed")

    @cache
    def make(name: str) -> Bundle:
        return export(tiny_sd, out=folder / name, parts=[PART], precision=name, job=graphs)

    return make


def checked(bundle: Bundle, engine: str = "onnxruntime") -> PartCheck:
    return check_part(bundle, bundle.part(PART), make_engine(engine))


def stored_weights(bundle: Bundle) -> dict[str, np.ndarray]:
    """{name in the source: values} of packed weights, by the definition of DequantizeLinear (ONNX operators, version
    21): every axis but one is as it is, and along that one a scale holds for `block_size` values, or for one."""
    model = onnx.load(str(bundle.file(f"{PART}/model.onnx")))
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    found = {}
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        codes, scales, *zeros = (numpy_helper.to_array(tensors[name]).astype(np.float32) for name in node.input)
        options = {entry.name: entry.i for entry in node.attribute}
        if "block_size" not in options:
            scales = np.expand_dims(scales, [axis for axis in range(codes.ndim) if axis != options["axis"]])
        block, axis = options.get("block_size", 1), options["axis"]
        shift = np.repeat(zeros[0], block, axis) if zeros else 0
        values = (codes - shift) * np.repeat(scales, block, axis)
        stored = Stored.of(node.input[0])
        found[stored.source] = values.T if stored.form.reversed else values
    return found


@pytest.mark.slow
@pytest.mark.parametrize("precision", PACKED)
def test_what_is_stored(tiny_sd: Pipeline, bundles: Callable[[str], Bundle], precision: str) -> None:
    bundle, component = bundles(precision), tiny_sd.components[PART]
    found = stored_weights(bundle)
    packed = bundle.part(PART).extra["packed"]
    assert len(found) == sum(row["layers"] for row in packed["bits"].values()) > 20
    assert not any(name.startswith(("post_quant_conv", "decoder.conv_in", "decoder.conv_out")) for name in found)
    for name, values in found.items():
        true = np.asarray(component.weights.read(name))
        flat = true.reshape(true.shape[0], -1)
        four = precision == "int4-weights" and flat.shape[1] % 16 == 0
        span = np.ptp(np.append(flat, 0)) / 15 if four else np.abs(flat).max() / 127
        assert np.abs(values.reshape(flat.shape) - flat).max() <= span * 0.51, name
    sizes = {row["bytes"] for row in packed["bits"].values()}
    predicted = sum(sizes) + 4 * packed["unpacked_weights"]
    assert predicted <= bundle.part(PART).extra["data_bytes"] <= predicted * 1.2  # gaps that align tensors
    onnx.checker.check_model(str(bundle.file(f"{PART}/model.onnx")), full_check=True)


@pytest.mark.parametrize("engine", ["onnxruntime", pytest.param("openvino", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", PACKED)
def test_engines_agree_with_torch_on_the_stored_weights(
    tiny_sd: Pipeline, bundles: Callable[[str], Bundle], precision: str, engine: str
) -> None:
    bundle = bundles(precision)
    check = checked(bundle, engine)
    assert check.status == "passed", check.text()
    assert check.report is not None and check.report.worst.psnr_db > 100
    assert check.quality is not None and 15 < check.quality.worst.psnr_db < 70
    assert f"quality: {check.quality.worst.psnr_db:.1f} dB" in check.text()
    assert json.dumps(check.to_json()["quality"])
    tensors = load_file(bundle.file(f"golden/{PART}.safetensors"))
    with tiny_sd.components[PART].load() as runner:
        true = runner.run({"latent_sample": tensors["0.in.latent_sample"]})["sample"]
    assert np.allclose(tensors["0.full.sample"], true, atol=1e-5)
    error = np.abs(tensors["0.full.sample"] - tensors["0.out.sample"])
    assert check.quality.worst.max_abs == pytest.approx(error.max(), rel=1e-2)


def scale(array: np.ndarray) -> np.ndarray:
    array.reshape(-1)[3] *= np.float32(1.05)
    return array


def zero(array: np.ndarray) -> np.ndarray:
    return array * 0


def nibbles(array: np.ndarray) -> np.ndarray:
    return (array << 4) | (array >> 4)


def backwards(array: np.ndarray) -> np.ndarray:
    return array[..., ::-1].copy()


FAULTS: dict[str, tuple[str, str, Callable[[np.ndarray], np.ndarray]]] = {
    "a broken scale": ("int4-weights", "resnets.0.conv1.weight.packed_scales", scale),
    "scales of the other axis": ("int4-weights", "to_q.weight.packed_scales.transposed", backwards),
    "scales in another order": ("int8-weights", "to_out.0.weight.packed_scales.transposed", backwards),
    "a lost zero": ("int4-weights", "resnets.0.conv1.weight.packed_zeros", zero),
    "lost zeros of a product": ("int4-weights", "to_v.weight.packed_zeros.transposed", zero),
    "halves of bytes swapped": ("int4-weights", "to_out.0.weight.packed_codes.transposed", nibbles),
    "codes in another order": ("int8-weights", "resnets.1.conv2.weight.packed_codes", backwards),
}


def _marked(fault: str) -> Any:
    return pytest.param(fault, marks=pytest.mark.slow) if FAULTS[fault][0] == "int8-weights" else fault


@pytest.mark.parametrize("fault", [_marked(fault) for fault in FAULTS])
def test_faults_are_caught(bundles: Callable[[str], Bundle], tmp_path: Path, fault: str) -> None:
    precision, suffix, change = FAULTS[fault]
    shutil.copytree(bundles(precision).path, tmp_path / "bundle")
    model = onnx.load(str(tmp_path / "bundle" / PART / "model.onnx"), load_external_data=False)
    tensor = next(found for found in model.graph.initializer if found.name.endswith(suffix))
    claims = {entry.key: entry.value for entry in tensor.external_data}
    kind = np.dtype("f4" if "scales" in suffix else "u1")
    data = np.memmap(tmp_path / "bundle" / PART / claims["location"], np.uint8, "r+")
    place = data[int(claims["offset"]) : int(claims["offset"]) + int(claims["length"])]
    shape = tuple(tensor.dims) if kind == np.dtype("f4") or precision == "int8-weights" else (-1,)
    place[:] = change(place.copy().view(kind).reshape(shape)).reshape(-1).view(np.uint8)
    data.flush()
    check = checked(Bundle.open(tmp_path / "bundle"))
    assert check.status == "failed" and check.blocks, fault
    assert tensor.name.startswith(check.blocks[0].failed[0].removesuffix(".out")), "the proof names the place"


def test_four_bits_need_their_opset() -> None:
    with pytest.raises(ConfigError, match="opset 20 has no weights of 4 bits; int4-weights needs 21 or more"):
        Onnx(precision="int4-weights", opset=20)


def test_what_stays(tiny_sd: Pipeline) -> None:
    chosen = packings(tiny_sd.components["unet"], INT4_WEIGHTS)
    weights = tiny_sd.components["unet"].weights
    kept = [name for name in weights.names() if name.endswith(".weight") and name not in chosen]
    matrices = {name for name in kept if len(weights.meta(name).shape) > 1}
    first_and_last = {"conv_in.weight", "conv_out.weight", *(f"time_embedding.linear_{i}.weight" for i in (1, 2))}
    assert {name for name in matrices if not name.endswith("time_emb_proj.weight")} == first_and_last
    assert packings(tiny_sd.components["unet"], FP32) == {}
    text = packings(tiny_sd.components["text_encoder"], INT8_WEIGHTS)
    assert len(text) == 6 * tiny_sd.components["text_encoder"].config["num_hidden_layers"]
