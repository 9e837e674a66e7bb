from __future__ import annotations

import json
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError
from diffship.core.limits import LIMITS
from diffship.core.manifest import Manifest, check_path, parse_manifest
from diffship.core.strict import unknown

SAMPLE = Path(__file__).parent / "data/bundle-schema-1"
SAMPLE_BYTES = (SAMPLE / "diffship.json").read_bytes()


def sample() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(SAMPLE_BYTES)
    return table


def refusal(table: object) -> str:
    with pytest.raises(BundleError) as refused:
        parse_manifest(json.dumps(table).encode())
    text = str(refused.value)
    assert text.count("\n") <= 1 and len(text) < 600
    return text


def test_the_first_schema_still_opens() -> None:
    bundle = Bundle.open(SAMPLE)
    bundle.verify()
    part = bundle.part("unet")
    assert part.golden is not None and part.golden.tolerance.psnr_db == 60
    assert part.bindings[0].native == "sample" and part.bindings[0].shape == ("batch_size", 4, "height", "width")
    assert bundle.manifest.family.pooled_width == 1280 and bundle.manifest.family.size_step == 32
    assert bundle.manifest.licence["restrictions"] == ["no harm"]


def test_bytes_are_read_back_equal(manifest: Manifest) -> None:
    for one in (manifest, Bundle.open(SAMPLE).manifest):
        assert parse_manifest(one.to_bytes()) == one
    assert parse_manifest(SAMPLE_BYTES).to_bytes() == SAMPLE_BYTES


def test_a_manifest_from_the_future_is_told_so() -> None:
    assert "schema 99, of a newer diffship; this one reads up to 2" in refusal({**sample(), "schema": 99, "new": []})
    for schema in (0, -1, True, "1", 1.0, None, [1]):
        assert "is not a version number" in refusal({**sample(), "schema": schema})


def test_few_legal_names_are_listed_beside_the_nearest() -> None:
    assert unknown("value", "gpu", ("cpu", "cuda")) == "unknown value 'gpu'; did you mean 'cpu'? legal: cpu, cuda"
    assert unknown("value", "tpu", map(str, range(5))) == "unknown value 'tpu'; legal: 0, 1, 2, 3, 4"


def test_unknown_keys_name_the_nearest_legal_one() -> None:
    table = sample()
    table["parts"][0]["golden"]["tolerance"]["atoll"] = 1
    assert "parts[0].golden.tolerance: unknown key 'atoll'; did you mean 'atol'?" in refusal(table)
    assert "unknown key 'licens'; did you mean 'licence'?" in refusal({**sample(), "licens": {}})


WRONG = [
    (("target",), 5, "must be a string"),
    (("target",), "../onnx", "target '../onnx' is not lower-case"),
    (("family",), [], "must be a table"),
    (("family", "vae_factor"), True, "must be a whole number"),
    (("family", "vae_factor"), 8.0, "must be a whole number"),
    (("family", "vae_factor"), 0, "legal is from 1 to 64"),
    (("family", "prediction_type"), "epsilom", "did you mean 'epsilon'?"),
    (("family", "scaling_factor"), "0.13", "must be a number"),
    (("parts",), [], "there are no parts"),
    (("parts",), {}, "must be a list"),
    (("parts", 0, "name"), "UNet", "part name 'UNet'"),
    (("parts", 0, "files"), [], "has no files"),
    (("parts", 0, "files"), "unet", "must be a list"),
    (("parts", 0, "files"), [3], "must be a string"),
    (("parts", 0, "inputs", 0, "dtype"), "object", "is not one of"),
    (("parts", 0, "inputs", 0, "shape"), ["a" * 20, "__import__('os')"], "is not a name"),
    (("parts", 0, "inputs", 0, "shape"), [1.5], "parts[0].inputs[0].shape[0]"),
    (("parts", 0, "inputs", 0, "shape"), [-1], "is not positive"),
    (("parts", 0, "source_digest"), "ab" * 31, "is not 64 hex digits"),
    (("parts", 0, "proof"), {"status": "trust me"}, "proof status 'trust me'"),
    (("parts", 0, "golden", "sizes", "height"), 10**9, "legal is from 1 to 65536"),
    (("files", "unet/model.onnx", "size"), -1, "legal is from 0"),
    (("files", "unet/model.onnx", "size"), 2**70, "legal is from 0"),
    (("files", "unet/model.onnx", "sha256"), "A" * 64, "is not 64 hex digits"),
    (("history",), {}, "must be a list"),
    (("sampler",), None, "must be a table"),
]


@pytest.mark.parametrize(("where", "value", "message"), WRONG, ids=lambda entry: str(entry)[:40])
def test_wrong_types_and_values_are_named(where: tuple[str | int, ...], value: object, message: str) -> None:
    table = sample()
    place = table
    for key in where[:-1]:
        place = place[key]  # type: ignore[index]
    place[where[-1]] = value  # type: ignore[index]
    assert message in refusal(table)


def test_every_missing_key_is_named_or_has_a_default() -> None:
    for key in ("target", "family", "parts"):
        assert f"the key {key!r} is missing" in refusal(
            {name: value for name, value in sample().items() if name != key}
        )


RAW = {
    "nan": b'{"schema": 1, "sampler": {"x": NaN}}',
    "infinity": b'{"schema": 1, "sampler": {"x": -Infinity}}',
    "overflow": b'{"schema": 1, "sampler": {"x": 1e999}}',
    "huge_int": b'{"schema": ' + b"1" * 10_000 + b"}",
    "duplicate": b'{"schema": 1, "schema": 1}',
    "deep": b'{"schema": 1, "recipe": ' + b"[" * 200_000,
    "deep_closed": b'{"schema": 1, "recipe": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "surrogate": b'{"schema": 1, "target": "\\ud800"}',
    "not_utf8": b'{"schema": 1, "target": "\xff"}',
    "byte_order_mark": b"\xef\xbb\xbf{}",
    "empty": b"",
    "list": b"[]",
    "null": b"null",
    "too_long": b" " * (LIMITS.manifest_bytes + 1),
}


@pytest.mark.parametrize("name", RAW)
def test_bytes_that_are_no_manifest(name: str) -> None:
    with pytest.raises(BundleError, match=r"diffship\.json"):
        parse_manifest(RAW[name])


def test_too_many_files_or_parts() -> None:
    record = {"size": 0, "sha256": "0" * 64}
    assert "files has 5000 entries" in refusal({**sample(), "files": {f"f{index}": record for index in range(5000)}})
    assert "parts has 300 entries" in refusal({**sample(), "parts": [{}] * 300})
    assert "two of one name" in refusal({**sample(), "parts": sample()["parts"] * 2})


def test_a_manifest_that_json_cannot_hold_is_not_written(manifest: Manifest) -> None:
    for value in (float("nan"), object(), {1, 2}, "\ud800"):
        with pytest.raises(BundleError, match="not JSON"):
            replace(manifest, recipe={"x": value}).to_bytes()


@pytest.mark.parametrize(
    "name", ["unet/model.onnx", "unet/model.onnx_data", "README.md", "a b/c.d", "Data/com.apple.CoreML/w@2x+1.bin"]
)
def test_names_that_targets_use_are_legal(name: str) -> None:
    assert check_path(name) == name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def only_bundle_errors(data: bytes) -> None:
    begin = time.perf_counter()
    try:
        parse_manifest(data).to_bytes()
    except BundleError as fault:
        str(fault).encode()
    assert time.perf_counter() - begin < 1


@settings(max_examples=100, deadline=None)
@given(JSON)
def test_fuzz_any_json(value: object) -> None:
    only_bundle_errors(json.dumps(value).encode())


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_fuzz_a_sound_manifest_with_one_value_replaced(data: st.DataObject) -> None:
    table = sample()
    place: Any = table
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else list(range(len(place)))))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.booleans()):
            break
        place = inner
    place[key] = data.draw(JSON)
    only_bundle_errors(json.dumps(table).encode())


@pytest.mark.slow
def test_fuzz_2000_mutated_files_stay_small_and_fast() -> None:
    generator = np.random.default_rng(0)
    source = np.frombuffer(SAMPLE_BYTES, np.uint8)
    slowest = 0.0
    tracemalloc.start()
    for _ in range(2000):
        mutated = source.copy()
        for place in generator.integers(0, len(mutated), generator.integers(1, 5)):
            mutated[place] = generator.integers(0, 256)
        begin = time.process_time()
        only_bundle_errors(mutated.tobytes())
        slowest = max(slowest, time.process_time() - begin)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 50_000_000
    assert slowest < 0.05
