"""What a bench prepares: one bundle for each target that its engines read, and why there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffship.benchmarks.measure import materials as module
from diffship.benchmarks.measure.case import Bench
from diffship.benchmarks.measure.materials import Order
from diffship.benchmarks.measure.session import _usable
from diffship.core.errors import UnsupportedError
from diffship.core.job import Job


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Exports are written down instead of made; TensorRT's fails where its precision is fp32."""
    found: list[dict[str, Any]] = []

    def export(source: str, *, to: str, out: Path, **options: Any) -> None:
        found.append({"to": to, **options})
        if to == "tensorrt" and options["precision"] == "fp32":
            raise UnsupportedError("too little memory")
        out.mkdir(parents=True)

    monkeypatch.setattr("diffship.export.export", export)
    monkeypatch.setattr("diffship.runtimes.engines.tensorrt.library.flavour_here", lambda: ("rtx", (89,)))
    return found


def order(tmp_path: Path, precision: str, *engines: str) -> Order:
    return Order("toy", str(tmp_path), 64, 4.0, precision, (1,), engines=engines)


def test_engines_of_one_target_share_a_bundle(exported: list[dict[str, Any]], tmp_path: Path) -> None:
    made = order(tmp_path, "fp16", "onnxruntime", "openvino", "tensorrt")
    bundles, refused = module._bundles(made, Job(tmp_path), "folder", "key")
    assert bundles["onnxruntime"] == bundles["openvino"] != bundles["tensorrt"] and not refused
    assert exported == [
        {"to": "onnx", "precision": "fp16"},
        {"to": "tensorrt", "precision": "fp16", "flavour": "rtx", "sm": (89,), "verify": False},
    ]


def test_an_engine_without_a_bundle_does_not_stop_the_others(exported: list[dict[str, Any]], tmp_path: Path) -> None:
    bundles, refused = module._bundles(order(tmp_path, "fp32", "onnxruntime", "tensorrt"), Job(tmp_path), "f", "key")
    assert list(bundles) == ["onnxruntime"] and refused == {"tensorrt": "too little memory"}


def test_engines_that_do_not_compute_there_get_no_bundle() -> None:
    pytest.importorskip("onnxruntime")
    device = Bench(("toy",)).device
    assert _usable("onnxruntime", device) and not _usable("tensorrt", device)
