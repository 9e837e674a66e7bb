from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from diffship.core.dtype import TensorMeta, from_float32, to_float32
from diffship.core.errors import ConfigError, SourceError
from diffship.core.safetensors_file import write_safetensors
from diffship.core.weights import (
    MemoryWeights,
    SafetensorsWeights,
    SeededWeights,
    cast,
    joined,
    renamed,
    source_digest,
    subset,
)

ARRAYS = {"b": np.arange(4, dtype=np.int64), "a": np.linspace(-1, 1, 6, dtype=np.float32).reshape(2, 3)}


def test_every_bfloat16_and_float8_value() -> None:
    bits16 = np.arange(65536, dtype=np.uint16)
    expected = bits16.view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(to_float32(bits16, "bfloat16"), expected, equal_nan=True)
    bits8 = np.arange(256, dtype=np.uint8)
    for name, kind in (("float8_e4m3fn", ml_dtypes.float8_e4m3fn), ("float8_e5m2", ml_dtypes.float8_e5m2)):
        assert np.array_equal(to_float32(bits8, name), bits8.view(kind).astype(np.float32), equal_nan=True)


def test_rounding_to_bfloat16_is_to_nearest_even() -> None:
    values = np.random.default_rng(0).standard_normal(100_000).astype(np.float32) * np.float32(1e3)
    values = np.concatenate([values, np.array([0, -0.0, np.inf, -np.inf, np.nan, 1.00390625, 1.01171875], np.float32)])
    expected = values.astype(ml_dtypes.bfloat16)
    mine = from_float32(values, "bfloat16").view(ml_dtypes.bfloat16)
    assert np.array_equal(mine.astype(np.float32), expected.astype(np.float32), equal_nan=True)


@pytest.mark.parametrize(("dtype", "value"), [("float16", 65520.0), ("float16", -1e6), ("bfloat16", 3.4e38)])
def test_a_value_that_does_not_fit_is_refused(dtype: str, value: float) -> None:
    weights = MemoryWeights({"w": np.array([1, value], np.float32)})
    with pytest.raises(ConfigError, match="tensor w: the value"):
        cast(weights, dtype).read("w")
    assert cast(MemoryWeights({"w": np.array([65519, np.inf], np.float32)}), "float16").read("w")[0] == 65504


def test_maps_compose_lazily() -> None:
    weights = cast(renamed(MemoryWeights(ARRAYS), {"x.a": "a", "x.b": "b"}), "float16")
    assert weights.names() == ("x.a", "x.b")
    assert weights.meta("x.a") == TensorMeta("float16", (2, 3)) and weights.meta("x.b").dtype == "int64"
    assert np.array_equal(weights.read("x.a"), ARRAYS["a"].astype(np.float16))
    assert weights.nbytes == 6 * 2 + 4 * 8
    assert subset(weights, ["x.b"]).names() == ("x.b",)
    for broken in (lambda: subset(weights, ["y"]), lambda: weights.read("a"), lambda: weights.meta("a")):
        with pytest.raises(SourceError, match="there is no tensor"):
            broken()


def test_sets_of_weights_join_unless_both_have_a_name() -> None:
    first, second = (MemoryWeights({name: np.full(2, value, np.float32)}) for name, value in (("a", 1), ("b", 2)))
    both = joined(first, second)
    assert (both.names(), both.nbytes, both.read("b").tolist()) == (("a", "b"), 16, [2, 2])
    assert both.meta("a") == TensorMeta("float32", (2,))
    with pytest.raises(SourceError, match="'a' stands in two of 3"):
        joined(first, second, first)
    with pytest.raises(SourceError, match="no tensor 'c'"):
        both.read("c")


def test_bfloat16_source_cast_to_float32(tmp_path: Path) -> None:
    values = np.array([1.5, -2.25, 0.0], np.float32)
    raw = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    write_safetensors(tmp_path / "w.safetensors", {"w": TensorMeta("bfloat16", (3,))}, lambda _: raw)
    weights = SafetensorsWeights(tmp_path / "w.safetensors")
    assert weights.read("w").dtype == np.uint16
    assert np.array_equal(cast(weights, "float32").read("w"), values)


def test_ml_dtypes_arrays_enter_as_raw_bits() -> None:
    weights = MemoryWeights({"w": np.array([1.5], ml_dtypes.bfloat16)})
    assert weights.meta("w").dtype == "bfloat16" and weights.read("w").dtype == np.uint16


def digest_by_hand(arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(json.dumps([name, array.dtype.name, list(array.shape)]).replace(" ", "").encode() + b"\n")
        digest.update(array.tobytes())
    return digest.hexdigest()


def test_digest_is_the_documented_bytes_and_blind_to_storage(tmp_path: Path) -> None:
    expected = digest_by_hand(ARRAYS)
    assert source_digest(MemoryWeights(ARRAYS)) == expected
    assert source_digest(MemoryWeights(dict(reversed(ARRAYS.items())))) == expected
    big_endian = {name: array.astype(array.dtype.newbyteorder(">")) for name, array in ARRAYS.items()}
    assert source_digest(MemoryWeights(big_endian)) == expected
    assert source_digest(MemoryWeights({"b": ARRAYS["b"], "a": ARRAYS["a"].T.copy().T})) == expected
    for name, array in ARRAYS.items():
        safetensors.numpy.save_file({name: array}, tmp_path / f"{name}.safetensors")
    shards = [tmp_path / "b.safetensors", tmp_path / "a.safetensors"]
    assert source_digest(SafetensorsWeights(shards)) == expected


def test_digest_knows_name_shape_dtype_and_value() -> None:
    base = source_digest(MemoryWeights(ARRAYS))
    changed = ARRAYS["a"].copy()
    changed[0, 0] = np.nextafter(changed[0, 0], 2)
    others = [{"c": ARRAYS["a"]}, {"a": ARRAYS["a"].reshape(3, 2)}, {"a": changed}, {"a": ARRAYS["a"].astype("f8")}]
    digests = [source_digest(MemoryWeights({"b": ARRAYS["b"], **other})) for other in others]
    assert len({base, *digests}) == 5


def test_sharded_by_index_and_renamed(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"a": ARRAYS["a"], "unused": ARRAYS["b"]}, tmp_path / "1.safetensors")
    safetensors.numpy.save_file({"b": ARRAYS["b"]}, tmp_path / "2.safetensors")
    where = {"a": tmp_path / "1.safetensors", "b": tmp_path / "2.safetensors"}
    weights = SafetensorsWeights(where, rename={"a": "text_model.a"})
    assert weights.names() == ("text_model.a", "b")
    assert np.array_equal(weights.read("text_model.a"), ARRAYS["a"])
    with pytest.raises(SourceError, match="though the index says so"):
        SafetensorsWeights({"c": tmp_path / "1.safetensors"})
    with pytest.raises(SourceError, match="also stands in"):
        SafetensorsWeights([tmp_path / "1.safetensors", tmp_path / "2.safetensors"], rename={"b": "a"})


METAS = {
    "conv.weight": TensorMeta("float32", (320, 64, 3, 3)),
    "norm.weight": TensorMeta("float32", (320,)),
    "conv.bias": TensorMeta("float32", (320,)),
    "linear.weight": TensorMeta("float16", (511, 257)),
    "embeddings.token_embedding.weight": TensorMeta("float32", (1000, 64)),
    "position_ids": TensorMeta("int64", (1, 77)),
    "logit_scale": TensorMeta("float32", ()),
    "none": TensorMeta("float32", (0, 3)),
}


def test_seeded_values_do_not_depend_on_order_or_company() -> None:
    first, second = SeededWeights(METAS, 7), SeededWeights(METAS, 7)
    forward = {name: first.read(name) for name in METAS}
    backward = {name: second.read(name) for name in reversed(METAS)}
    alone = SeededWeights({"conv.bias": METAS["conv.bias"]}, 7).read("conv.bias")
    assert all(np.array_equal(forward[name], backward[name]) for name in METAS)
    assert np.array_equal(alone, forward["conv.bias"])
    assert not np.array_equal(alone, SeededWeights(METAS, 8).read("conv.bias"))
    assert not np.array_equal(forward["norm.weight"] - 1, forward["conv.bias"])


def test_seeded_digest_is_the_same_on_every_machine() -> None:
    assert source_digest(SeededWeights(METAS, 0)) == "5f79b179474ec9a535cb9bdd5430b12a75b96a7daf18538e35288c11ac034a46"
    code = (
        "from diffship.core.weights import *\n"
        "w = SeededWeights({'a.weight': TensorMeta('float32', (3, 50000))}, 5)\nprint(source_digest(w))"
    )
    runs = {subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout for _ in range(2)}
    weights = SeededWeights({"a.weight": TensorMeta("float32", (3, 50000))}, 5)
    assert runs == {source_digest(weights) + "\n"}


def test_seeded_spreads() -> None:
    weights = SeededWeights(METAS, 1)
    values = {name: weights.read(name).astype(np.float64) for name in METAS if METAS[name].count}
    assert values["conv.weight"].std() == pytest.approx((64 * 9) ** -0.5, rel=0.01)
    assert values["linear.weight"].std() == pytest.approx(257**-0.5, rel=0.01)
    assert abs(values["linear.weight"].mean()) < 1e-3
    assert values["norm.weight"].mean() == pytest.approx(1, abs=0.01)
    assert values["embeddings.token_embedding.weight"].std() == pytest.approx(0.02, rel=0.02)
    assert abs(values["conv.bias"]).max() < 0.035
    assert np.array_equal(weights.read("position_ids"), np.arange(77)[None])
    assert weights.read("logit_scale").shape == () and weights.read("none").shape == (0, 3)
    assert {name: weights.read(name).dtype for name in METAS} == {name: METAS[name].storage for name in METAS}


def test_seeded_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(ConfigError, match="not bfloat16"):
        SeededWeights({"a": TensorMeta("bfloat16", (1,))}, 0)
    with pytest.raises(ConfigError, match="dtype 'float128' is unknown"):
        TensorMeta("float128", ())


def nearest(values: np.ndarray, legal: np.ndarray) -> np.ndarray:
    """Of `legal` (rising, entries of even place have an even mantissa), the value nearest to each; ties to even."""
    above = np.clip(np.searchsorted(legal, values), 1, len(legal) - 1)
    low, high = legal[above - 1], legal[above]
    down, up = values - low, high - values
    even = np.where((above - 1) % 2 == 0, low, high)
    return np.where(down < up, low, np.where(down > up, high, even))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_float64_is_rounded_once(dtype: str) -> None:
    kind = np.dtype(np.float16) if dtype == "float16" else np.dtype(ml_dtypes.bfloat16)
    legal = np.arange(0x7C00 if dtype == "float16" else 0x7F80, dtype=np.uint16).view(kind).astype(np.float64)
    rng = np.random.default_rng(1)
    places = rng.integers(1, len(legal) - 2, 20_000)
    middle = (legal[places] + legal[places + 1]) / 2  # exact ties, and values that float32 makes ties of
    values = np.concatenate([middle, middle * (1 + 2.0**-40), middle * (1 - 2.0**-40), rng.random(1000) * legal[-2]])
    found = cast(MemoryWeights({"w": values}), dtype).read("w").view(kind).astype(np.float64)
    assert np.array_equal(found, nearest(values, legal))
    assert np.array_equal(cast(MemoryWeights({"w": -values}), dtype).read("w").view(kind).astype(np.float64), -found)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_a_float64_value_that_does_not_fit_is_refused(dtype: str) -> None:
    with pytest.raises(ConfigError, match=r"tensor w: the value 1e\+39 does not fit"):
        cast(MemoryWeights({"w": np.array([1.0, -1e39])}), dtype).read("w")
    kept = cast(MemoryWeights({"w": np.array([np.inf, np.nan, 1.5])}), dtype).read("w")
    assert np.array_equal(to_float32(kept, dtype), np.array([np.inf, np.nan, 1.5], np.float32), equal_nan=True)
    with pytest.raises(ConfigError, match="does not fit float32"):
        to_float32(np.array([1e39]))


def test_arrays_in_memory_cannot_be_changed_through_what_is_read() -> None:
    source = np.zeros(3, np.float32)
    read = MemoryWeights({"w": source}).read("w")
    with pytest.raises(ValueError, match="read-only"):
        read[0] = 7
    source[0] = 1  # the owner still may
