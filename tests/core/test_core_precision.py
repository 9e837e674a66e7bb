"""Precisions: what crosses a part's boundary in which type, and what the published formats hold."""

from __future__ import annotations

import numpy as np
import pytest

from diffship.core.errors import BundleError, ConfigError
from diffship.core.manifest import Part
from diffship.core.precision import BF16, FP16, FP32, PRECISIONS, precision_of
from diffship.core.spec import TensorSpec

SAMPLE = TensorSpec("sample", "float32", ("batch_size", 4, "height", "width"))
TIME = TensorSpec("timestep", "float32", ("batch_size",), exact=True)
IDS = TensorSpec("time_ids", "float32", ("batch_size", 6), exact=True, whole=True)
TOKENS = TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"))


@pytest.mark.parametrize(
    ("precision", "ports"),
    [
        (FP32, ("float32", "float32", "float32", "int64")),
        (FP16, ("float16", "float32", "float16", "int64")),
        (BF16, ("float32", "float32", "float32", "int64")),
    ],
)
def test_the_types_of_inputs_hold_the_values(precision: object, ports: tuple[str, ...]) -> None:
    made = [precision.port(spec) for spec in (SAMPLE, TIME, IDS, TOKENS)]  # type: ignore[attr-defined]
    assert tuple(port.dtype for port in made) == ports
    assert not any(port.exact or port.whole for port in made), "a compiled part says it by its types"
    # IEEE 754 binary16 has 11 significant bits: every whole number up to 2048, and no half from 1024 on
    whole = np.arange(2049, dtype=np.float32)
    assert np.array_equal(whole.astype(np.float16).astype(np.float32), whole)


def test_only_what_is_not_exact_is_rounded() -> None:
    specs = (SAMPLE, TIME, IDS, TOKENS)
    feeds = {
        "sample": np.full((1, 4, 2, 2), 1 / 3, np.float32),
        "timestep": np.array([999.1], np.float32),
        "time_ids": np.full((1, 6), 1023.0, np.float32),
        "input_ids": np.array([[49407]], np.int64),
    }
    for precision in PRECISIONS.values():
        made = precision.feeds(specs, feeds)
        assert {name: array.dtype for name, array in made.items()} == {n: a.dtype for n, a in feeds.items()}
        assert all(np.array_equal(made[name], feeds[name]) for name in ("timestep", "time_ids", "input_ids"))
    # 1/3 in binary16 is 1365/4096
    assert FP16.feeds(specs, feeds)["sample"].flat[0] == np.float32(1365 / 4096)
    assert BF16.feeds(specs, feeds)["sample"].flat[0] == np.float32(1 / 3), "its ports are float32"
    with pytest.raises(ConfigError, match="does not fit float16"):
        FP16.feeds((SAMPLE,), {"sample": np.full((1, 4, 1, 1), 7e4, np.float32)})


def test_a_part_with_wide_values_leaves_float16_and_keeps_bfloat16() -> None:
    assert [precision.for_range(True) for precision in (FP32, FP16, BF16)] == [FP32, FP32, BF16]
    assert FP16.for_range(False) is FP16
    assert [precision.weight_bytes for precision in (FP32, FP16, BF16)] == [4, 2, 2]
    assert [precision.lossless for precision in (FP32, FP16, BF16)] == [True, False, False]


def test_names_that_mean_no_precision_are_refused() -> None:
    assert precision_of("fp16") is FP16
    with pytest.raises(ConfigError, match="unknown precision 'fp61'; did you mean 'fp16'"):
        precision_of("fp61")
    part = Part("unet", ("a",), (SAMPLE,), (SAMPLE,), "int3", "0" * 64)
    with pytest.raises(BundleError, match="part unet: unknown precision 'int3'"):
        _ = part.format


def test_what_cannot_be_exact_is_refused() -> None:
    with pytest.raises(ConfigError, match="an exact tensor is float32"):
        TensorSpec("timestep", "float16", ("batch_size",), exact=True)
    with pytest.raises(ConfigError, match="only an exact tensor is whole"):
        TensorSpec("time_ids", "float32", ("batch_size", 6), whole=True)
