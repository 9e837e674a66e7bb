from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.core.errors import DiffshipError, SourceError, UnsupportedError
from diffship.core.gguf_file import GgufWeights, is_gguf

F32, F16, Q4_0, Q8_0, BF16 = 0, 1, 2, 8, 30
Tensor = tuple[str, tuple[int, ...], int, bytes]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def gguf(tensors: list[Tensor], notes: bytes = b"", count: int = 0, alignment: int = 32) -> bytes:
    """A file of these (name, shape, type, bytes), as ggml's document has it."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), count) + notes
    body = b""
    for name, shape, kind, data in tensors:
        head += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *shape[::-1])
        head += struct.pack("<IQ", kind, len(body))
        body += data + bytes(-len(data) % alignment)
    return head + bytes(-len(head) % alignment) + body


def q8(scale: float, values: list[int]) -> bytes:
    return np.float16(scale).tobytes() + np.array(values, np.int8).tobytes()


def q4(scale: float, values: list[int]) -> bytes:
    low, high = np.array(values[:16]), np.array(values[16:])
    return np.float16(scale).tobytes() + (low | high << 4).astype(np.uint8).tobytes()


@pytest.fixture
def made(tmp_path: Path) -> GgufWeights:
    half = np.arange(6, dtype=np.float16).reshape(2, 3)
    tensors: list[Tensor] = [
        ("half", (2, 3), F16, half.tobytes()),
        ("bytes", (2, 32), Q8_0, q8(0.5, [*range(-16, 16)]) + q8(2.0, [127] * 32)),
        ("nibbles", (1, 1, 32), Q4_0, q4(0.25, [i % 16 for i in range(7, 39)])),
        ("bits", (2,), BF16, bytes([0x80, 0x3F, 0x00, 0xC0])),
    ]
    notes = text("general.architecture") + struct.pack("<I", 8) + text("sd1")
    notes += text("sizes") + struct.pack("<IIQ3I", 9, 4, 3, 1, 2, 3)
    notes += text("comfy.gguf.orig_shape.half") + struct.pack("<IIQ3i", 9, 5, 3, 1, 3, 2)
    (tmp_path / "a.gguf").write_bytes(gguf(tensors, notes, 3))
    return GgufWeights(tmp_path / "a.gguf")


def test_values_are_those_that_the_blocks_stand_for(made: GgufWeights) -> None:
    assert {name: (made.meta(name).dtype, made.meta(name).shape) for name in made.names()} == {
        "half": ("float16", (1, 3, 2)),  # as the note says
        "bytes": ("float32", (2, 32)),
        "nibbles": ("float32", (1, 1, 32)),
        "bits": ("bfloat16", (2,)),
    }
    assert made.read("half").reshape(-1).tolist() == [0, 1, 2, 3, 4, 5]
    assert made.read("bytes").tolist() == [[i / 2 for i in range(-16, 16)], [254.0] * 32]
    assert made.read("nibbles").reshape(-1).tolist() == [(i % 16 - 8) / 4 for i in range(7, 39)]
    assert made.read("bits").tolist() == [0x3F80, 0xC000]


def test_the_reference_library_reads_the_same(made: GgufWeights, tmp_path: Path) -> None:
    reference = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    values = rng.standard_normal((4, 64)).astype(np.float32)
    tensors: list[Tensor] = []
    for name, kind in (("q8", Q8_0), ("q4", Q4_0)):
        packed = reference.quants.quantize(values, reference.GGMLQuantizationType(kind))
        tensors.append((name, (4, 64), kind, packed.tobytes()))
    (tmp_path / "b.gguf").write_bytes(gguf(tensors))
    ours = GgufWeights(tmp_path / "b.gguf")
    for tensor in reference.GGUFReader(tmp_path / "b.gguf").tensors:
        wanted = reference.quants.dequantize(tensor.data, tensor.tensor_type).reshape(4, 64)
        assert np.array_equal(ours.read(tensor.name), wanted)
        assert np.abs(wanted - values).max() < 0.5


ONE: list[Tensor] = [("a", (32,), F32, bytes(128))]
LIST = text("k") + struct.pack("<IIQ", 9, 0, 2**60)
DEEP = text("k") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 6
ATTACKS: dict[str, tuple[bytes, str]] = {
    "version": (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1; legal: 2, 3"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "little-endian"),
    "tensors": (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 0), "claims 9223372036854775808 tensors"),
    "notes": (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "claims 9223372036854775808 notes"),
    "list": (gguf(ONE, LIST, 1), "claims 1152921504606846976 entries"),
    "lists in lists": (gguf(ONE, DEEP, 1), "unknown type 9"),
    "long name": (gguf(ONE, struct.pack("<Q", 2**40), 1), "has 1099511627776 bytes"),
    "alignment": (gguf(ONE, text("general.alignment") + struct.pack("<II", 4, 0), 1), "general.alignment is 0"),
    "shape": (gguf([("a", (2**40, 32), F32, b"")]), "no whole number of F32 blocks"),
    "row": (gguf([("a", (2, 16), Q8_0, bytes(34))]), "no whole number of Q8_0 blocks"),
    "rank": (gguf([("a", (1,) * 9, F32, bytes(4))]), "has 9 axes"),
    "twice": (gguf([*ONE, *ONE]), "stands twice"),
    "cut": (gguf(ONE)[:-1], "1 bytes past the file"),
    "cut header": (gguf(ONE)[:40], "its header goes on"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_claim_of_a_file_is_believed(attack: str, tmp_path: Path) -> None:
    data, told = ATTACKS[attack]
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(SourceError, match=told):
        GgufWeights(tmp_path / "a.gguf")


@given(place=st.integers(0, 120), byte=st.integers(0, 255))
@settings(max_examples=60, deadline=None)
def test_a_changed_byte_is_refused_or_read(tmp_path_factory: pytest.TempPathFactory, place: int, byte: int) -> None:
    data = bytearray(gguf([*ONE, ("b", (32,), Q8_0, q8(1, [1] * 32))]))
    data[place] = byte
    path = tmp_path_factory.mktemp("fuzz") / "a.gguf"
    path.write_bytes(data)
    try:
        weights = GgufWeights(path)
        for name in weights.names():
            weights.read(name)
    except DiffshipError:
        pass


def test_blocks_that_are_not_read_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf([("a", (256,), 12, bytes(144))]))
    with pytest.raises(UnsupportedError, match=r"is of Q4_K, which is not read; legal: F32, F16, Q4_0, Q8_0"):
        GgufWeights(tmp_path / "a.gguf")


def test_a_file_that_changes_is_noticed(made: GgufWeights, tmp_path: Path) -> None:
    with (tmp_path / "a.gguf").open("ab") as file:
        file.write(b"x")
    with pytest.raises(SourceError, match="was changed since it was opened"):
        made.read("half")


def test_only_the_first_bytes_say_that_a_file_is_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(gguf(ONE))
    (tmp_path / "b.gguf").write_bytes(b"GGML")
    found: list[Any] = [is_gguf(tmp_path / name) for name in ("a.bin", "b.gguf", "none")]
    assert found == [True, False, False]
