from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffship.core.bundle import Bundle, Manifest, write_bundle
from diffship.core.errors import BundleError
from diffship.core.onnx_wire import ExternalData, external_data

onnx = pytest.importorskip("onnx")
helper, TensorProto = pytest.importorskip("onnx.helper"), onnx.TensorProto


def outside(name: str, entries: list[tuple[str, str]], flag: int = 1) -> onnx.TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[4])
    tensor.data_location = flag
    for key, value in entries:
        tensor.external_data.add(key=key, value=value)
    return tensor


def entry(location: str, offset: object = None, length: object = None) -> list[tuple[str, str]]:
    pairs = [("location", location)]
    pairs += [] if offset is None else [("offset", str(offset))]
    return pairs + ([] if length is None else [("length", str(length))])


def graph(name: str, tensors: list[onnx.TensorProto], nodes: list[onnx.NodeProto] | None = None) -> onnx.GraphProto:
    return helper.make_graph(nodes or [], name, [], [], initializer=tensors)


def model_with_every_hiding_place() -> onnx.ModelProto:
    inner = helper.make_node("If", ["c"], ["y"], then_branch=graph("then", [outside("branch", entry("d"))]))
    inner.attribute.append(helper.make_attribute("graphs", [graph("g", [outside("in_graphs", entry("d"))])]))
    constant = helper.make_node("Constant", [], ["k"], value=outside("constant", entry("d", 8, 16)))
    constant.attribute.append(helper.make_attribute("many", [outside("in_tensors", entry("d"))]))
    sparse = onnx.SparseTensorProto(
        values=outside("sparse_values", entry("d")), indices=outside("sparse_at", entry("d"))
    )
    constant.attribute.append(helper.make_attribute("sparse", sparse))
    main = graph("main", [outside("plain", entry("d", 0, 16)), outside("unmarked", entry("d"), 0)], [inner, constant])
    main.initializer.append(onnx.numpy_helper.from_array(np.zeros(1000, np.float32), "inline"))
    main.sparse_initializer.append(sparse)
    model = helper.make_model(main)
    body = helper.make_node("Constant", [], ["k"], value=outside("in_function", entry("d")))
    model.functions.append(helper.make_function("local", "f", [], ["k"], [body], []))
    model.training_info.add().initialization.CopyFrom(graph("t", [outside("in_training", entry("d"))]))
    return model


def test_every_hiding_place_is_found(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(model_with_every_hiding_place().SerializeToString())
    found = external_data(path)
    names = {"branch", "in_graphs", "constant", "in_tensors", "sparse_values", "sparse_at", "plain", "unmarked"}
    assert {claim.tensor for claim in found} == names | {"in_function", "in_training"}
    assert ExternalData("constant", "d", 8, 16) in found and ExternalData("branch", "d", 0, None) in found


def test_agrees_with_a_model_that_onnx_saved(tmp_path: Path) -> None:
    arrays = {f"w{index}": np.full(1000 + index, index, np.float32) for index in range(5)}
    main = graph("main", [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()])
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(main), path, save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    data = (tmp_path / "model.onnx_data").read_bytes()
    found = {claim.tensor: claim for claim in external_data(path)}
    assert set(found) == set(arrays)
    for name, array in arrays.items():
        claim = found[name]
        assert claim.location == "model.onnx_data" and claim.length == array.nbytes
        assert data[claim.offset : claim.offset + claim.length] == array.tobytes()


def build(tmp_path: Path, manifest: Manifest, tensors: list[onnx.TensorProto]) -> Bundle:
    """A bundle whose model is swapped for a hostile one after it was written, hashes made to fit."""
    part = replace(manifest.parts[0], files=("unet/model.onnx", "unet/model.onnx_data"), golden=None)
    with write_bundle(tmp_path / "bundle") as draft:
        (draft.folder / "unet").mkdir()
        (draft.folder / "unet/model.onnx_data").write_bytes(bytes(64))
        model = helper.make_model(graph("main", tensors))
        (draft.folder / "unet/model.onnx").write_bytes(model.SerializeToString())
        return draft.finish(replace(manifest, target="onnx", parts=(part,)))


def test_sound_external_data_opens(tmp_path: Path, manifest: Manifest) -> None:
    tensors = [outside("a", entry("model.onnx_data", 48, 16)), outside("b", entry("./model.onnx_data"))]
    Bundle.open(build(tmp_path, manifest, tensors).path).verify()


HOSTILE = {
    "negative_offset": entry("model.onnx_data", -1, 4),
    "negative_length": entry("model.onnx_data", 0, -4),
    "length_2_60": entry("model.onnx_data", 0, 2**60),
    "offset_2_60": entry("model.onnx_data", 2**60, 1),
    "one_past_the_end": entry("model.onnx_data", 60, 5),
    "offset_past_the_end": entry("model.onnx_data", 65),
    "wraps_around": entry("model.onnx_data", 2**63 - 1, 2**63 - 1),
    "twenty_digits": entry("model.onnx_data", "9" * 30, 1),
    "not_a_number": entry("model.onnx_data", "0x10", 4),
    "other_digits": entry("model.onnx_data", "٣", 4),
    "parent": entry("../secret"),
    "deep_parent": entry("a/../../../../etc/passwd"),
    "absolute": entry("/etc/passwd"),
    "memory_address": entry("*/_ORT_MEM_ADDR_/*", 140737488355328, 4),
    "windows": entry("C:\\secret"),
    "unlisted": entry("other_data"),
    "nul": entry("model.onnx_data\0/../../x"),
    "no_location": [("offset", "0")],
    "no_entries": [],
    "dunder_key": [*entry("model.onnx_data"), ("__class__", "x")],
    "base_path": [*entry("model.onnx_data"), ("basepath", "/etc")],
    "location_twice": [*entry("model.onnx_data"), ("location", "../secret")],
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_external_data_is_refused(name: str, tmp_path: Path, manifest: Manifest) -> None:
    with pytest.raises(BundleError, match="tensor 'evil'"):
        build(tmp_path, manifest, [outside("evil", HOSTILE[name])])
    assert not (tmp_path / "bundle").exists()


def test_hostile_model_that_was_swapped_in_is_refused_at_open(tmp_path: Path, manifest: Manifest) -> None:
    bundle = build(tmp_path, manifest, [outside("a", entry("model.onnx_data"))])
    model = bundle.file("unet/model.onnx")
    model.write_bytes(helper.make_model(graph("main", [outside("a", entry("/etc/passwd"))])).SerializeToString())
    path = bundle.path / "diffship.json"
    table = json.loads(path.read_text())
    table["files"]["unet/model.onnx"]["size"] = model.stat().st_size
    path.write_text(json.dumps(table))
    with pytest.raises(BundleError, match="external data location '/etc/passwd'"):
        Bundle.open(bundle.path)


def test_a_model_under_another_name_does_not_escape_the_scan(tmp_path: Path, manifest: Manifest) -> None:
    model = helper.make_model(graph("main", [outside("evil", entry("/etc/passwd"))])).SerializeToString()
    cases = (
        ("onnx", "model.dat", r"not named \*\.onnx"),
        ("tensorrt", "model.dat", r"not named \*\.plan"),
        ("sample", "model.ONNX", "external data"),
        ("onnx", "model.onnx", "external data"),
    )
    for target, name, message in cases:
        part = replace(manifest.parts[0], files=(name,), golden=None)
        with pytest.raises(BundleError, match=message), write_bundle(tmp_path / "bundle") as draft:
            (draft.folder / name).write_bytes(model)
            draft.finish(replace(manifest, target=target, parts=(part,)))


def field(number: int, wire: int, payload: bytes = b"") -> bytes:
    return bytes([number << 3 | wire]) + payload


def wrapped(number: int, data: bytes) -> bytes:
    length, varint = len(data), b""
    while length > 127:
        varint += bytes([length & 127 | 128])
        length >>= 7
    return field(number, 2, varint + bytes([length]) + data)


def nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):  # graph { node { attribute { graph ...
        data = wrapped(1, wrapped(5, wrapped(6, data)))
    return wrapped(7, data)


BROKEN: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "length_over_end": lambda: field(7, 2, b"\x7f") + b"abc",
    "length_2_60": lambda: field(7, 2, b"\x80" * 8 + b"\x10"),
    "endless_varint": lambda: field(1, 0, b"\xff" * 40),
    "group": lambda: field(7, 3),
    "wire_type_7": lambda: field(7, 7),
    "field_0": lambda: bytes([0x02, 0x00]),
    "graph_as_number": lambda: field(7, 0, b"\x01"),
    "cut_key": lambda: b"\x80",
    "pickle": lambda: b"\x80\x04\x95" + bytes(20),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_fast(name: str, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(BROKEN[name]())
    begin = time.perf_counter()
    with pytest.raises(BundleError, match=r"model\.onnx: not a sound ONNX model"):
        external_data(path)
    assert time.perf_counter() - begin < 1


def test_nesting_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(nested(10))
    assert external_data(path) == []
    path.write_bytes(nested(5000))
    with pytest.raises(BundleError, match="nested too deeply"):
        external_data(path)


def test_mutated_models_never_crash_the_scan(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    source = np.frombuffer(model_with_every_hiding_place().SerializeToString(), np.uint8)
    generator = np.random.default_rng(0)
    for _ in range(300):
        mutated = source.copy()
        mutated[generator.integers(0, len(mutated), 3)] = generator.integers(0, 256, 3)
        path.write_bytes(mutated.tobytes())
        try:
            external_data(path)
        except BundleError as fault:
            str(fault).encode()


def test_ten_thousand_nodes_are_scanned_in_moderate_time(tmp_path: Path) -> None:
    nodes = [helper.make_node("Add", [f"x{index}", "one"], [f"x{index + 1}"]) for index in range(10_000)]
    path = tmp_path / "model.onnx"
    path.write_bytes(helper.make_model(graph("main", [outside("one", entry("d"))], nodes)).SerializeToString())
    begin = time.process_time()
    assert len(external_data(path)) == 1
    assert time.process_time() - begin < 2
