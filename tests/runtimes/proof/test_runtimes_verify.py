from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from handmade import MakeBundle, unet_like

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError, ConfigError, UnsupportedError
from diffship.runtimes.proof.verify import read_golden, verify


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_sound_bundle_passes_with_figures(bundle: Bundle, engine: str) -> None:
    seen = []
    report = verify(bundle, engine, progress=lambda *step: seen.append(step))
    assert report.passed and report.named("passed") == ("unet",)
    output = report.checks[0].report.outputs[0]  # type: ignore[union-attr]
    assert output.name == "out_sample" and output.max_abs < 1e-5 and output.psnr_db > 100
    assert seen == [("verify unet", 0, 1)]
    assert report.files == 2 and report.bytes > 0 and report.version
    assert f"{engine} {report.version}: passed" in report.text()


def test_the_report_is_json(make_bundle: MakeBundle) -> None:
    document = json.loads(json.dumps(verify(make_bundle(unet_like(2.1))).to_json(), allow_nan=False))
    part = document["parts"][0]
    assert not document["passed"] and part["status"] == "failed" and part["reason"] == ""
    assert part["report"]["outputs"][0]["needed_atol"] > 0.01


def test_a_wrong_part_fails_with_the_tolerance_that_would_pass(make_bundle: MakeBundle) -> None:
    report = verify(make_bundle(unet_like(weight=2.001)))
    assert not report.passed and report.named("failed") == ("unet",)
    assert "would pass" in report.text() and "FAILED: unet" in report.text()


def test_without_golden_vectors_is_unproven_not_passed(make_bundle: MakeBundle) -> None:
    report = verify(make_bundle(unet_like(), golden=False))
    assert not report.passed and report.named("unproven") == ("unet",)
    assert "UNPROVEN: unet" in report.text() and "no golden vectors" in report.text()


def test_nonsense_is_a_failed_check_with_the_engines_words(make_bundle: MakeBundle) -> None:
    report = verify(make_bundle(unet_like(weight=float("nan"))))
    assert report.named("failed") == ("unet",)
    assert "512 NaN of 512 values" in report.checks[0].reason


@pytest.mark.parametrize("name", ["unet/model.onnx", "golden/unet.safetensors"])
def test_a_flipped_byte_is_damage(bundle: Bundle, name: str) -> None:
    path = bundle.path / name
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    report = verify(bundle)
    assert not report.passed and name in report.damage and report.checks == ()
    assert "DAMAGED" in report.text()


def test_a_file_of_another_size_does_not_open(bundle: Bundle) -> None:
    with (bundle.path / "unet" / "model.onnx").open("ab") as file:
        file.write(b"\0")
    with pytest.raises(BundleError, match=r"unet/model\.onnx has"):
        verify(bundle.path)


@pytest.mark.slow
def test_only_chosen_parts_and_unknown_ones(tiny_bundle: Path) -> None:
    report = verify(tiny_bundle, parts=["vae_decoder"], threads=1)
    assert report.passed and [check.part for check in report.checks] == ["vae_decoder"]
    assert verify(tiny_bundle, parts=iter(["vae_decoder"]), threads=1).named("passed") == ("vae_decoder",)
    with pytest.raises(ConfigError, match="unknown part 'vae'"):
        verify(tiny_bundle, parts=["vae"])


def test_wrong_requests(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        verify(tmp_path / "nothing")
    with pytest.raises(UnsupportedError, match="torch does not read onnx bundles"):
        verify(bundle, "torch")
    with pytest.raises(ConfigError, match="unknown key 'thread'"):
        verify(bundle, thread=1)


@pytest.mark.slow
def test_parts_beyond_the_budget_run_in_stages_with_the_same_figures(tiny_bundle: Path) -> None:
    from diffship.runtimes.engines.onnxruntime import OnnxRuntimeRunner

    bundle = Bundle.open(tiny_bundle)
    budget = OnnxRuntimeRunner().gate_bytes(600_000, "fp32")
    whole = verify(bundle, parts=["unet"], threads=1)
    staged = verify(bundle, parts=["unet"], threads=1, max_bytes=budget)
    assert whole.passed and staged.passed
    assert whole.checks[0].stages == 1 and staged.checks[0].stages >= 4
    assert f"in {staged.checks[0].stages} stages" in staged.text()
    figures = [report.checks[0].report.outputs[0].max_abs for report in (whole, staged)]  # type: ignore[union-attr]
    assert max(figures) < 1e-4


@pytest.mark.slow
def test_a_budget_that_no_stage_fits_is_a_failed_check(tiny_bundle: Path) -> None:
    report = verify(tiny_bundle, parts=["unet"], max_bytes=1000)
    assert not report.passed and "needs at least" in report.checks[0].reason


@pytest.mark.slow
def test_reduce_blames_the_graph_where_engines_agree(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    part = bundle.part("vae_decoder")
    path = tmp_path / "copy"
    shutil.copytree(tiny_bundle, path)
    data = bytearray((path / part.files[1]).read_bytes())
    weights = np.frombuffer(data, np.float32)
    weights[: len(weights) // 2] *= np.float32(1.5)
    (path / part.files[1]).write_bytes(data)
    from diffship.runtimes.engines.engine import make_engine
    from diffship.runtimes.proof.suspects import look_into
    from diffship.runtimes.proof.verify import check_part

    check = check_part(Bundle(path, bundle.manifest), part, make_engine("onnxruntime", {"threads": 1}), look=look_into)
    assert check.status == "failed"
    assert "the graph or its weights are wrong" in check.suspects[0] and "first suspect:" in check.text()


def test_golden_files_hold_nothing_else(bundle: Bundle) -> None:
    from diffship.core.dtype import meta_of
    from diffship.core.safetensors_file import write_safetensors

    golden = bundle.part("unet").golden
    assert golden is not None
    ((inputs, outputs),) = read_golden(bundle, golden)
    assert set(inputs) == {"sample", "timestep", "encoder_hidden_states"} and set(outputs) == {"out_sample"}
    for arrays, message in (
        ({"x.y": np.zeros(1)}, "neither in.NAME nor out.NAME"),
        ({"in.x": np.zeros(1)}, "no outputs"),
    ):
        write_safetensors(bundle.path / golden.file, {n: meta_of(a) for n, a in arrays.items()}, arrays.__getitem__)
        with pytest.raises(BundleError, match=message):
            read_golden(bundle, golden)


def test_where_free_memory_is_unknown_parts_are_taken_whole(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """macOS and Windows: nothing there says how much is free."""
    monkeypatch.setattr("diffship.runtimes.proof.verify.available_memory", lambda: None)
    assert verify(bundle).passed


def test_no_part_at_all_is_no_pass(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="no part is chosen; this bundle has unet"):
        verify(bundle, parts=[])
