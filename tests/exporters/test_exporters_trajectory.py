"""The golden trajectory: what lies in a bundle, and what verify finds when an engine drifts from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from diffship.core.bundle import Bundle
from diffship.core.dtype import meta_of
from diffship.core.errors import BundleError, ConfigError
from diffship.core.job import Job
from diffship.core.manifest import parse_manifest
from diffship.core.precision import FP16
from diffship.core.safetensors_file import write_safetensors
from diffship.export import export
from diffship.exporters.gated import GatedModel
from diffship.exporters.golden_trajectory import why_not, write_trajectory
from diffship.exporters.tensorrt import TensorRt
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.runtimes.engines.engine import make_engine
from diffship.runtimes.proof.verify import verify
from diffship.runtimes.proof.verify_trajectory import check_trajectory, read_trajectory
from diffship.sampling.generate import Request, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.wire import unpack

STEPS = 3
ROOM = 1 << 34


@pytest.fixture(scope="module")
def tiny() -> Pipeline:
    return open_source("arch:tiny-sd")


@pytest.fixture(scope="module")
def bundle(tiny: Pipeline, tmp_path_factory: pytest.TempPathFactory, graphs_folder: Path) -> Bundle:
    out = tmp_path_factory.mktemp("drawn") / "bundle"
    return export(tiny, out=out, parts=["unet"], trajectory=STEPS, job=Job(graphs_folder))


@pytest.mark.slow
def test_verify_draws_it_again_and_tells_each_step(bundle: Bundle) -> None:
    report = verify(bundle.path, threads=1)
    assert report.passed and report.trajectory is not None and report.trajectory.report is not None
    steps = report.trajectory.report.outputs
    assert [step.name for step in steps] == [f"step.{i + 1}" for i in range(len(steps))] and len(steps) >= STEPS
    assert all(step.psnr_db > 90 for step in steps)
    assert "PSNR of the latents by step, dB: " in report.text() and report.text().endswith("passed")
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["trajectory"]["status"] == "passed"


@pytest.mark.slow
def test_it_is_what_torch_draws_whole(bundle: Bundle, tiny: Pipeline) -> None:
    golden = bundle.manifest.trajectory
    assert golden is not None
    trajectory, expected = read_trajectory(bundle, golden)
    assert trajectory.guidance > 1 and trajectory.negative is not None, "guidance is part of what is proved"
    with PipelineModel(tiny) as model:
        words = (trajectory.prompt, trajectory.negative_prompt)
        request = Request(*words, STEPS, size=trajectory.size, seed=20, rng="philox")
        (last,) = denoise(start(model, request), denoiser_of(model))
    np.testing.assert_array_equal(last.latents, expected[f"step.{last.calls}"])


@pytest.mark.slow
def test_a_large_model_is_drawn_in_stages(tiny: Pipeline) -> None:
    with PipelineModel(tiny) as model, GatedModel(tiny, 400_000) as staged:
        assert type(staged.use("unet")) is not type(model.use("unet")), "the U-Net is too large to be loaded whole"
        request = Request("a pear", None, steps=2, size=(64, 64), seed=1)
        drawn = [denoise(start(each, request), denoiser_of(each))[0].latents for each in (model, staged)]
    np.testing.assert_allclose(drawn[1], drawn[0], atol=1e-5)


def changed(bundle: Bundle, folder: Path, names: dict[str, Any]) -> Bundle:
    """A copy whose golden latents are others; not hashed again."""
    golden = bundle.manifest.trajectory
    assert golden is not None
    shutil.copytree(bundle.path, folder)
    write_safetensors(folder / golden.latents, {n: meta_of(a) for n, a in names.items()}, names.__getitem__)
    return Bundle(folder, bundle.manifest)


@pytest.mark.slow
def test_the_first_step_that_misses_is_named(bundle: Bundle, tmp_path: Path) -> None:
    golden = bundle.manifest.trajectory
    assert golden is not None
    _, latents = read_trajectory(bundle, golden)
    latents["step.2"] = latents["step.2"] + np.float32(0.1)
    check = check_trajectory(changed(bundle, tmp_path / "b", latents), golden, make_engine("onnxruntime"), ROOM)
    assert check.status == "failed" and check.reason.startswith("step.2: PSNR ") and check.reason in check.text()


@pytest.mark.slow
def test_an_engine_that_fails_and_too_little_memory(bundle: Bundle) -> None:
    golden = bundle.manifest.trajectory
    assert golden is not None
    check = check_trajectory(bundle, golden, make_engine("onnxruntime", {"sizes": {"batch_size": 1}}), ROOM)
    assert check.status == "failed" and "onnxruntime stopped" in check.reason
    check = check_trajectory(bundle, golden, make_engine("onnxruntime"), 1000)
    assert check.status == "skipped" and "does not fit memory whole" in check.text()


def test_a_unet_that_no_engine_here_computes_is_not_drawn(bundle: Bundle) -> None:
    """An export in bf16 with a trajectory used to end in "does not draw the same"."""
    golden, part = bundle.manifest.trajectory, bundle.part("unet")
    assert golden is not None
    narrow = replace(bundle.manifest, parts=(replace(part, precision="bf16", golden=None),))
    check = check_trajectory(Bundle(bundle.path, narrow), golden, make_engine("onnxruntime"), ROOM)
    assert check.status == "skipped" and "no engine here computes bf16" in check.text()


def test_what_is_no_golden_trajectory_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    golden = bundle.manifest.trajectory
    assert golden is not None
    _, latents = read_trajectory(bundle, golden)
    latents.pop("step.1")
    with pytest.raises(BundleError, match="are not a start and the latents after each step"):
        read_trajectory(changed(bundle, tmp_path / "b", latents), golden)
    with pytest.raises(BundleError, match="trajectory"):
        read_trajectory(bundle, replace(golden, start="unet/config.json"))
    other = replace(bundle.manifest, family=replace(bundle.manifest.family, text_width=7))
    with pytest.raises(BundleError, match="encoder_hidden_states is"):
        read_trajectory(Bundle(bundle.path, other), golden)


def test_its_files_must_be_listed_and_legal(bundle: Bundle) -> None:
    document = bundle.manifest.to_json()
    assert parse_manifest(json.dumps(document).encode()) == bundle.manifest
    document["trajectory"]["start"] = "../start"
    with pytest.raises(BundleError, match=r"\.\./start"):
        parse_manifest(json.dumps(document).encode())


@pytest.mark.slow
def test_where_there_can_be_none(tiny: Pipeline, tmp_path: Path) -> None:
    texts = replace(tiny, components={"unet": tiny.components["unet"]})
    refused = [
        ({"verify": False}, "the proof is skipped"),
        ({"parts": ["vae_decoder"]}, "unet is not exported"),
        ({"trajectory": 151}, "legal is a whole number from 0 to 150"),
    ]
    for options, message in refused:
        with pytest.raises(ConfigError, match=message):
            export(tiny, out=tmp_path / "out", **{"trajectory": 2, **options})
    with pytest.raises(ConfigError, match="the source has no vae_decoder; --base can supply it"):
        export(texts, out=tmp_path / "out", trajectory=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_engine_gets_golden_inputs_that_its_profile_takes() -> None:
    for name in ("emoji", "arch:sd15", "arch:sdxl"):
        pipeline = open_source(name)
        made = TensorRt()
        for component in pipeline.components.values():
            sizes = made.golden_sizes(component, pipeline.family, 2)
            ranges = made.ranges(component, pipeline.family)
            for spec in component.inputs:
                shape = spec.resolve(sizes)
                low, high = ranges[spec.name].min, ranges[spec.name].max
                assert all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)), (name, spec.name)
        assert why_not(pipeline, made.golden_sizes(pipeline.components["unet"], pipeline.family, 2)) == ""


@pytest.mark.slow
def test_an_engine_of_one_row_is_drawn_without_guidance(tmp_path: Path) -> None:
    emoji = open_source("emoji")
    made = TensorRt(max_shapes=("unet.sample:1x4x16x16",), opt_shapes=("unet.sample:1x4x16x16",))
    sizes = made.golden_sizes(emoji.components["unet"], emoji.family, 2)
    assert sizes["batch_size"] == 1
    golden = write_trajectory(emoji, sizes, tmp_path, 1, FP16, ROOM)
    trajectory = unpack((tmp_path / golden.start).read_bytes())
    assert trajectory.guidance == 1.0 and trajectory.negative is None and 40 < (golden.tolerance.psnr_db or 0) < 100
    eight = TensorRt(**{f"{kind}_shapes": ("unet.sample:8x4x16x16",) for kind in ("min", "opt", "max")})
    assert why_not(emoji, eight.golden_sizes(emoji.components["unet"], emoji.family, 2)) == (
        "unet takes neither one row nor two"
    )


@pytest.mark.parametrize("steps", [None, 4])
def test_a_scheduler_that_is_not_built_is_told_before_any_engine_is(steps: int | None) -> None:
    """A trajectory takes the model's own scheduler: with another one, engines were built first and then lost."""
    from diffship.export import _steps

    tiny = open_source("arch:tiny-sd")
    strange = replace(tiny, scheduler={**tiny.scheduler, "_class_name": "LMSDiscreteScheduler"})
    made, told = TensorRt(), list[str]()
    sizes = made.golden_sizes(strange.components["unet"], strange.family, 2)
    job = Job(progress=lambda label, *_: told.append(label))
    if steps is None:
        assert _steps(made, strange, sizes, True, None, job) == 0
        assert len(told) == 1 and "no golden trajectory: the model's own scheduler" in told[0]
    else:
        with pytest.raises(ConfigError, match="there can be no golden trajectory: the model's own scheduler"):
            _steps(made, strange, sizes, True, steps, job)
    assert _steps(made, tiny, sizes, True, None, job) == 4
