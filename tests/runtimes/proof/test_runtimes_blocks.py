"""A graph that is cut at its points computes each block on what is fed, and block references are read strictly."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffship.core.bundle import Bundle
from diffship.core.bundle_check import digest_file
from diffship.core.dtype import meta_of
from diffship.core.errors import BundleError, RunnerError
from diffship.core.manifest import parse_manifest
from diffship.core.safetensors_file import write_safetensors
from diffship.core.weights import SafetensorsWeights
from diffship.runtimes.proof.blocks import BlockCheck
from diffship.runtimes.proof.onnx_model import FORCED, forced, read_model
from diffship.runtimes.proof.onnx_split import split
from diffship.runtimes.proof.verify import verify

Change = Callable[[dict[str, np.ndarray]], None]


def three_steps(dtype: int = TensorProto.FLOAT) -> bytes:
    """b = 2 x; c = b + 1; y = c * b, with names and types for all of them."""
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    nodes = [
        helper.make_node("Mul", ["x", "two"], ["b"]),
        helper.make_node("Add", ["b", "one"], ["c"]),
        helper.make_node("Mul", ["c", "b"], ["y"]),
    ]
    info = {name: helper.make_tensor_value_info(name, dtype, ["n"]) for name in "xbcy"}
    constants = [numpy_helper.from_array(np.array([v], kind), n) for n, v in (("two", 2), ("one", 1))]
    graph = helper.make_graph(nodes, "g", [info["x"]], [info["y"]], constants, value_info=[info["b"], info["c"]])
    data: bytes = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    ).SerializeToString()
    return data


def test_every_reader_of_a_cut_tensor_reads_what_is_fed(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(three_steps())
    model = forced(read_model(three_steps()), ["b"], ["b", "c"])
    assert model.inputs == ("x", f"{FORCED}b") and model.outputs == ("y", "b", "c")
    (tmp_path / "stage").mkdir()
    (stage,) = split(tmp_path / "model.onnx", 1 << 20, tmp_path / "stage", model=model)
    onnx.checker.check_model(str(stage.path), full_check=True)
    session = onnxruntime.InferenceSession(str(stage.path))
    feeds = {"x": np.float32([1, 2]), f"{FORCED}b": np.float32([10, 20])}
    b, c, y = session.run(["b", "c", "y"], feeds)
    assert b.tolist() == [2, 4] and c.tolist() == [11, 21] and y.tolist() == [110, 420]


def test_a_graph_without_a_point_is_refused() -> None:
    with pytest.raises(RunnerError, match=r"no tensor 'mid\.out'"):
        forced(read_model(three_steps()), ["b"], ["mid.out"])
    with pytest.raises(RunnerError, match="no tensor 'x'"):
        forced(read_model(three_steps()), ["x"], [])


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT16, TensorProto.BFLOAT16])
def test_sixteen_bits_are_widened_with_their_values(tmp_path: Path, dtype: int) -> None:
    (tmp_path / "model.onnx").write_bytes(three_steps(dtype))
    (tmp_path / "stage").mkdir()
    (stage,) = split(tmp_path / "model.onnx", 1 << 20, tmp_path / "stage", widen=True)
    onnx.checker.check_model(str(stage.path), full_check=True)
    third = np.float32([1 / 3])
    (y,) = onnxruntime.InferenceSession(str(stage.path)).run(["y"], {"x": third})
    assert y.dtype == np.float32 and np.allclose(y, (2 * third + 1) * 2 * third, rtol=1e-6)


@pytest.fixture
def edited(tiny_bundle: Path, tmp_path: Path) -> Callable[[Change], Path]:
    """The tiny bundle with other block references for its VAE decoder, hashes renewed."""

    def change(how: Change) -> Path:
        copy = tmp_path / "edited"
        shutil.copytree(tiny_bundle, copy)
        manifest = json.loads((copy / "diffship.json").read_text())
        name = "golden/vae_decoder.blocks.safetensors"
        weights = SafetensorsWeights(copy / name)
        metas = {key: weights.meta(key) for key in weights.names()}
        arrays = {key: np.array(weights.read(key)) for key in weights.names()}
        how(arrays)
        kept = {key: metas.get(key) or meta_of(array) for key, array in arrays.items()}
        write_safetensors(copy / name, kept, arrays.__getitem__)
        manifest["files"][name] = {"size": (copy / name).stat().st_size, "sha256": digest_file(copy / name)}
        (copy / "diffship.json").write_text(json.dumps(manifest))
        return copy

    return change


def first_point(arrays: dict[str, np.ndarray]) -> str:
    return next(name for name in arrays if name.startswith("graph."))


def checked(path: Path) -> tuple[bool, str, tuple[BlockCheck, ...]]:
    report = verify(path, parts=["vae_decoder"])
    return report.passed, report.text(), report.checks[0].blocks


@pytest.mark.slow
def test_a_sound_part_passes_with_its_closest_point(tiny_bundle: Path) -> None:
    passed, text, (block,) = checked(tiny_bundle)
    assert passed and block.kind == "graph" and not block.failed
    assert block.report.closest.margin_db > 10 and "points agree; closest to its limit" in text
    document = json.loads(json.dumps(block.to_json(), allow_nan=False))
    assert document["points"] == len(block.report.outputs) > 10 and document["margin_db"] > 10
    assert Bundle.open(tiny_bundle).part("vae_decoder").proof["blocks"][0]["points"] == document["points"]


@pytest.mark.slow
def test_another_reference_fails_and_names_its_point(edited: Callable[[Change], Path]) -> None:
    names: list[str] = []

    def shift(arrays: dict[str, np.ndarray]) -> None:
        names.append(first_point(arrays))
        arrays[names[0]] = arrays[names[0]] + np.float32(0.01) * np.abs(arrays[names[0]]).max()

    passed, text, (block,) = checked(edited(shift))
    assert not passed and block.failed == (names[0].removeprefix("graph."),)
    assert f"FAIL graph, in float32 arithmetic: {block.failed[0]}" in text


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "is missing or not listed in the manifest"),
        ("strange", "is missing or not listed in the manifest"),
        ("unfed", "blocks.safetensors does not feed 'latent_sample'"),
        ("unread", "blocks.safetensors feeds, and the graph does not take, 'thing'"),
    ],
)
def test_a_file_that_holds_other_references_is_damage(edited: Callable[[Change], Path], how: str, said: str) -> None:
    def change(arrays: dict[str, np.ndarray]) -> None:
        if how in ("missing", "unfed"):
            del arrays[first_point(arrays) if how == "missing" else "in.latent_sample"]
        else:
            arrays["other.thing" if how == "strange" else "in.thing"] = np.zeros(1, np.float32)

    passed, text, _ = checked(edited(change))
    assert not passed and said in text


@pytest.mark.parametrize(
    ("precision", "change", "said"),
    [
        ("fp32", {"graph": {}}, "block references without a point would prove nothing"),
        ("fp16", {}, "has no tolerances for an engine in fp16"),
    ],
)
def test_a_manifest_that_leaves_half_of_the_proof_out_is_refused(
    tiny_bundle: Path, precision: str, change: dict[str, Any], said: str
) -> None:
    manifest = json.loads((tiny_bundle / "diffship.json").read_text())
    part = next(part for part in manifest["parts"] if part["name"] == "vae_decoder")
    part["precision"] = precision
    part["golden"]["blocks"].update(change)
    with pytest.raises(BundleError, match=said):
        parse_manifest(json.dumps(manifest).encode())


def test_a_graph_without_references_inside_it_is_told_to_be_proved_as_a_whole(
    tiny_bundle: Path, tmp_path: Path
) -> None:
    copy, name = tmp_path / "copy", "golden/vae_decoder.blocks.safetensors"
    shutil.copytree(tiny_bundle, copy)
    manifest = json.loads((copy / "diffship.json").read_text())
    next(part for part in manifest["parts"] if part["name"] == "vae_decoder")["golden"].pop("blocks")
    del manifest["files"][name]
    (copy / name).unlink()
    (copy / "diffship.json").write_text(json.dumps(manifest))
    passed, text, blocks = checked(copy)
    assert passed and not blocks and "proved as a whole: the bundle has no references inside it" in text


@pytest.mark.slow
def test_a_fault_that_the_whole_part_hides_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    """One convolution, half a per cent off."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    model = onnx.load(str(copy / "vae_decoder/model.onnx"), load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == "decoder.mid_block.resnets.0.conv2.weight")
    claims = {entry.key: int(entry.value) for entry in tensor.external_data if entry.key != "location"}
    data = copy / "vae_decoder/model.onnx_data"
    raw = bytearray(data.read_bytes())
    weights = np.frombuffer(raw, "<f4", claims["length"] // 4, claims["offset"])
    weights *= np.float32(1.005)
    data.write_bytes(raw)
    manifest = json.loads((copy / "diffship.json").read_text())
    manifest["files"]["vae_decoder/model.onnx_data"]["sha256"] = digest_file(data)
    (copy / "diffship.json").write_text(json.dumps(manifest))
    passed, _, (block,) = checked(copy)
    assert not passed and "decoder.mid_block.resnets.0.out" in block.failed


def test_a_number_of_samples_that_a_graph_froze_is_found(tiny_bundle: Path, tmp_path: Path) -> None:
    """The decoder's output times min(samples, 2) / 2: right for the two samples of the references."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_bundle, copy)
    place = copy / "vae_decoder/model.onnx"
    model = onnx.load(str(place), load_external_data=False)
    (last,) = (node for node in model.graph.node if "sample" in node.output)
    last.output[list(last.output).index("sample")] = "before"
    constants = {"first": np.int64([0]), "two": np.int64([2]), "half": np.float32([0.5])}
    model.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    model.graph.node.extend(
        [
            helper.make_node("Shape", ["before"], ["shape"]),
            helper.make_node("Gather", ["shape", "first"], ["samples"]),
            helper.make_node("Min", ["samples", "two"], ["least"]),
            helper.make_node("Cast", ["least"], ["number"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["number", "half"], ["factor"]),
            helper.make_node("Mul", ["before", "factor"], ["sample"]),
        ]
    )
    place.write_bytes(model.SerializeToString())
    manifest = json.loads((copy / "diffship.json").read_text())
    manifest["files"]["vae_decoder/model.onnx"] = {"size": place.stat().st_size, "sha256": digest_file(place)}
    (copy / "diffship.json").write_text(json.dumps(manifest))
    passed, text, _ = checked(copy)
    assert not passed and "FAIL sample, one sample" in text and "ok   sample, call 1" in text
