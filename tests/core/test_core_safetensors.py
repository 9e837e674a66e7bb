from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import time
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.core import safetensors_file
from diffship.core.dtype import TensorMeta
from diffship.core.errors import ConfigError, SourceError
from diffship.core.limits import LIMITS
from diffship.core.safetensors_file import read_header, read_tensor, write_safetensors
from diffship.core.sniff import classify, refuse_unsafe
from diffship.core.weights import SafetensorsWeights


def raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(begin: int, end: int, shape: object = None, dtype: str = "U8") -> dict[str, object]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


ATTACKS = {
    "empty": (b"", "has 0 bytes"),
    "length_2_63": (raw({}, length=2**63), "claims 9223372036854775808 bytes"),
    "length_over_file": (raw({}, length=3), "claims 3 bytes"),
    "overlap": (raw({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "overlaps"),
    "same_bytes_twice": (raw({"a": tensor(0, 8), "b": tensor(0, 8)}, bytes(8)), "overlaps"),
    "hole": (raw({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "hole"),
    "hole_at_start": (raw({"a": tensor(4, 8)}, bytes(8)), "hole"),
    "appended": (raw({"a": tensor(0, 4)}, bytes(9)), "appended"),
    "cut_short": (raw({"a": tensor(0, 4)}, bytes(3)), "cut short"),
    "duplicate_key": (raw(b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}}'), "twice"),
    "duplicate_inner_key": (raw(b'{"a":{"dtype":"U8","dtype":"F32","shape":[0],"data_offsets":[0,0]}}'), "twice"),
    "nan_shape": (raw(b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,0]}}'), "'NaN'"),
    "float_shape": (raw(b'{"a":{"dtype":"U8","shape":[1.0],"data_offsets":[0,1]}}', b"x"), "'1.0'"),
    "bool_shape": (raw({"a": tensor(0, 1, [True])}, b"x"), "whole numbers"),
    "negative_shape": (raw({"a": tensor(0, 1, [-1, -1])}, b"x"), "whole numbers"),
    "overflowing_shape": (raw({"a": tensor(0, 0, [2**32, 2**32])}), "takes"),
    "huge_integer": (raw(b'{"a":{"dtype":"U8","shape":[' + b"9" * 5000 + b'],"data_offsets":[0,0]}}'), "not JSON"),
    "backward_offsets": (raw({"a": tensor(4, 0, [4])}, bytes(4)), "spans -4"),
    "offset_2_62": (raw({"a": tensor(0, 2**62)}), "its tensors take"),
    "unknown_dtype": (raw({"a": tensor(0, 4, [4], "PKL")}, bytes(4)), "unknown dtype"),
    "object_dtype": (raw({"a": {"dtype": ["U8"], "shape": [0], "data_offsets": [0, 0]}}), "unknown dtype"),
    "extra_field": (raw({"a": {**tensor(0, 0), "code": "x"}}), "nothing else"),
    "rank_9": (raw({"a": tensor(0, 1, [1] * 9)}, b"x"), "short lists"),
    "nul_in_name": (raw({"a\0b": tensor(0, 0)}), "NUL"),
    "long_name": (raw({"a" * 600: tensor(0, 0)}), "too long"),
    "deep_json": (raw(b'{"a":' + b"[" * 100_000), "not JSON"),
    "list_header": (raw(b"[]"), "does not start with"),
    "space_first": (raw(b" {}"), "does not start with"),
    "bad_utf8": (raw(b'{"\xff":{}}'), "not JSON"),
    "metadata_not_strings": (raw({"__metadata__": {"a": 1}}), "table of strings"),
    "metadata_list": (raw({"__metadata__": ["a"]}), "table of strings"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_fast_without_allocating(name: str, tmp_path: Path) -> None:
    data, reason = ATTACKS[name]
    path = tmp_path / "evil.safetensors"
    path.write_bytes(data)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(SourceError) as refused:
        read_header(path)
    seconds = time.process_time() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reason in str(refused.value) and str(path) in str(refused.value)
    assert len(str(refused.value)) < 600
    assert seconds < 0.1
    assert peak < 2_000_000


@pytest.mark.parametrize("size", [100_000_000, 2**40])
def test_header_of_100_mb_is_refused_unread(size: int, tmp_path: Path) -> None:
    path = tmp_path / "sparse.safetensors"
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", size) + b"{")
        file.truncate(8 + size)
    tracemalloc.start()
    begin = time.process_time()
    with pytest.raises(SourceError, match="the limit is"):
        read_header(path)
    assert time.process_time() - begin < 0.1
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_too_many_tensors_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_file, "LIMITS", replace(LIMITS, tensors=20))
    path = tmp_path / "many.safetensors"
    path.write_bytes(raw({f"t{index}": tensor(0, 0) for index in range(21)}))
    with pytest.raises(SourceError, match="21 tensors; the limit is 20"):
        read_header(path)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_mutated_files_are_read_as_the_reference_reads_them_or_refused(data: st.DataObject) -> None:
    arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.arange(5, dtype=np.int64)}
    blob = bytearray(safetensors.numpy.save(arrays, {"k": "v"}))
    for _ in range(data.draw(st.integers(1, 4))):
        blob[data.draw(st.integers(0, len(blob) - 1))] = data.draw(st.integers(0, 255))
    path = Path(f"/tmp/diffship-mutated-{os.getpid()}.safetensors")
    path.write_bytes(blob)
    try:
        header = read_header(path)
    except SourceError:
        return
    finally:
        path.unlink(missing_ok=True)
    expected = safetensors.numpy.load(bytes(blob))
    assert {name: (entry.meta.shape) for name, entry in header.entries.items()} == {
        name: array.shape for name, array in expected.items()
    }


def test_reader_agrees_with_the_reference_writer(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {
        "weight": generator.standard_normal((7, 5, 3)).astype(np.float32),
        "half": generator.standard_normal(9).astype(np.float16),
        "ids": np.arange(77, dtype=np.int64)[None],
        "scalar": np.array(3.5, np.float64),
        "empty": np.zeros((0, 4), np.float32),
        "mask": np.array([True, False]),
    }
    path = tmp_path / "reference.safetensors"
    safetensors.numpy.save_file(arrays, path, {"format": "pt"})
    header = read_header(path)
    assert header.metadata == {"format": "pt"}
    assert set(header.entries) == set(arrays)
    for name, array in arrays.items():
        read = read_tensor(header, name)
        assert read.dtype == array.dtype and np.array_equal(read, array)


def test_reference_reader_agrees_with_the_writer(tmp_path: Path) -> None:
    arrays = {"b": np.arange(3, dtype=np.int8), "a": np.arange(8, dtype=np.float32).reshape(2, 4)}
    metas = {name: TensorMeta(array.dtype.name, array.shape) for name, array in arrays.items()}
    path = tmp_path / "ours.safetensors"
    order: list[str] = []
    write_safetensors(path, metas, arrays.__getitem__, {"by": "diffship"}, order.append)
    read = safetensors.numpy.load_file(path)
    assert order == ["a", "b"]
    assert all(np.array_equal(read[name], arrays[name]) for name in arrays)
    assert path.read_bytes() == safetensors.numpy.save(arrays, {"by": "diffship"})


def test_bfloat16_and_float8_keep_their_bits(tmp_path: Path) -> None:
    metas = {"b": TensorMeta("bfloat16", (3,)), "f": TensorMeta("float8_e4m3fn", (2,))}
    bits = {"b": np.array([0x3F80, 0xC000, 0x7F80], np.uint16), "f": np.array([0x38, 0xB8], np.uint8)}
    write_safetensors(tmp_path / "raw.safetensors", metas, bits.__getitem__)
    header = read_header(tmp_path / "raw.safetensors")
    assert {name: entry.meta for name, entry in header.entries.items()} == metas
    assert all(np.array_equal(read_tensor(header, name), bits[name]) for name in bits)


def test_writer_holds_one_tensor_at_a_time(tmp_path: Path) -> None:
    metas = {f"t{index}": TensorMeta("float32", (1 << 18,)) for index in range(24)}
    tracemalloc.start()
    write_safetensors(tmp_path / "big.safetensors", metas, lambda _: np.zeros(1 << 18, np.float32))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "big.safetensors").stat().st_size > 24 << 20
    assert peak < 4 << 20


def test_writer_leaves_nothing_behind_when_a_tensor_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tensor a: got float32"):
        write_safetensors(tmp_path / "x.safetensors", {"a": TensorMeta("float32", (2,))}, lambda _: np.zeros(3, "f4"))
    assert not list(tmp_path.iterdir())


def test_file_cut_after_its_header_was_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(1000, np.float32)}, path)
    header = read_header(path)
    os.truncate(path, 500)
    with pytest.raises(SourceError, match="was changed since it was opened"):
        read_tensor(header, "a")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(10_000, np.float32)}, path)
    whole = path.read_bytes()
    for size in range(0, len(whole), 4096):
        path.write_bytes(whole[:size])
        with pytest.raises(SourceError):
            read_header(path)


def test_fifo_device_and_missing_file_do_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.safetensors")
    begin = time.process_time()
    for path in (tmp_path / "pipe.safetensors", Path("/dev/zero"), tmp_path, tmp_path / "none.safetensors"):
        with pytest.raises(SourceError):
            read_header(path)
    assert time.process_time() - begin < 2


def test_hub_cache_layout_opens(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots/abc/unet"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    safetensors.numpy.save_file({"a": np.arange(3.0)}, blobs / "0123abcd")
    link = snapshot / "diffusion_pytorch_model.safetensors"
    link.symlink_to("../../../blobs/0123abcd")
    assert np.array_equal(SafetensorsWeights(link).read("a"), np.arange(3.0))


class _Canary:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("suffix", [".bin", ".pt", ".ckpt", ".pth", ".pkl", ".safetensors"])
def test_pickle_is_never_loaded_whatever_its_name(protocol: int, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(pickle.dumps(_Canary(tmp_path / "canary"), protocol))
    with pytest.raises(SourceError, match="pickle") as refused:
        SafetensorsWeights(path)
    assert "safe_serialization" in str(refused.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("suffix", [".npy", ".safetensors"])
def test_object_array_is_never_loaded(suffix: str, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([_Canary(tmp_path / "canary")], dtype=object), allow_pickle=True)
    (tmp_path / f"x{suffix}").write_bytes(buffer.getvalue())
    with pytest.raises(SourceError, match="numpy"):
        SafetensorsWeights(tmp_path / f"x{suffix}")
    assert not (tmp_path / "canary").exists()


def test_torch_zip_checkpoint_is_told_from_an_archive(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02.")
    with pytest.raises(SourceError, match="pickle"):
        SafetensorsWeights(path)


def _tar(path: Path, kind: str) -> None:
    with tarfile.open(path, "w") as archive:
        member = tarfile.TarInfo({"dotdot": "../evil", "absolute": "/tmp/evil"}.get(kind, "evil"))
        if kind == "link":
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(member)
        if kind == "duplicate":
            archive.addfile(member)


def _zip_bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", bytes(20_000_000))


def _many_entries(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for index in range(2000):
            archive.writestr(str(index), b"")


ARCHIVES = {kind: (lambda path, kind=kind: _tar(path, kind)) for kind in ("dotdot", "absolute", "link", "duplicate")}
ARCHIVES |= {"bomb": _zip_bomb, "entries": _many_entries}


@pytest.mark.parametrize("suffix", [".zip", ".tar", "", ".safetensors"])
@pytest.mark.parametrize("kind", ARCHIVES)
def test_archive_is_refused_and_not_unpacked(kind: str, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"model{suffix}"
    ARCHIVES[kind](path)
    assert classify(path) == "archive"
    begin = time.process_time()
    with pytest.raises(SourceError, match="archives are not read"):
        refuse_unsafe(path)
    assert time.process_time() - begin < 0.1
    assert list(tmp_path.rglob("*")) == [path]


def test_classify_the_rest(tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(raw({}))
    (tmp_path / "README.md").write_text("hello")
    os.mkfifo(tmp_path / "pipe.bin")
    kinds = {path.name: classify(path) for path in tmp_path.iterdir()}
    assert kinds == {"w.safetensors": "safetensors", "README.md": "unknown", "pipe.bin": "unknown"}
    assert classify(tmp_path) == "folder" and classify(tmp_path / "none") == "unknown"


def _file_of(path: Path, value: float) -> None:
    write_safetensors(path, {"w": TensorMeta("float32", (4,))}, lambda _: np.full(4, value, np.float32))


@pytest.mark.parametrize("how", ["replaced", "written over", "gone"])
def test_a_file_that_changes_between_header_and_tensor_is_never_read(how: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    _file_of(path, 1.0)
    header = read_header(path)
    assert read_tensor(header, "w").tolist() == [1.0] * 4
    time.sleep(0.02)  # the clock of file systems is coarse
    if how == "replaced":  # by one of equal size
        _file_of(tmp_path / "b.safetensors", 2.0)
        os.replace(tmp_path / "b.safetensors", path)
    elif how == "gone":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-16] + np.full(4, 2, "<f4").tobytes())
    with pytest.raises(SourceError, match=r"a\.safetensors: (was changed since|cannot be read)"):
        read_tensor(header, "w")
