from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorrt_double import Diagnostics
from tensorrt_rig import SMALL, VERSION, Rig, both, feeds, ok

from diffship.core.dtype import TensorMeta, meta_of
from diffship.core.errors import BundleError, ConfigError, MissingExtra, RunnerError, UnsupportedError
from diffship.core.safetensors_file import write_safetensors
from diffship.runtimes.engines.engine import choose_engine, engines_for
from diffship.runtimes.engines.tensorrt import TensorRtRunner
from diffship.runtimes.engines.tensorrt.library import flavour_here
from diffship.targets.tensorrt.plan import PlanFacts, PlanInput, PlanOutput, read_facts

# The file beside the plan


def test_metadata_comes_back(tmp_path: Path) -> None:
    shapes = {"min": [1, 4], "opt": [2, 4], "max": [8, 4]}
    for refit in (False, True):
        weights = {"conv.weight": TensorMeta("float16", (8, 4, 3, 3))} if refit else {}
        facts = PlanFacts(
            "rtx", VERSION, "fp16", {"x": PlanInput("float16", (shapes,))}, {"y": PlanOutput("float32")}, (89,), refit,
            weights=weights,
        )  # fmt: skip
        file = tmp_path / "model.json"
        file.write_text(json.dumps(facts.to_json()))
        assert read_facts(file) == facts and facts.profiles == 1
        assert ("weights" in facts.to_json()) == refit and next(iter(facts.to_json())) == "schema"


DAMAGE: list[tuple[Any, str]] = [
    (lambda t: t.update(schema=2), "schema is 2; legal is from 1 to 1"),
    (lambda t: t.update(flavour="lean"), "unknown value 'lean'"),
    (lambda t: t.update(extra=1), "unknown key 'extra'"),
    (lambda t: t.pop("version"), "'version' is missing"),
    (lambda t: t.update(sm=[89.5]), "must be a whole number"),
    (lambda t: t.update(inputs={}), "no inputs or no outputs"),
    (lambda t: t["inputs"]["sample"].update(profiles=[]), "there must be a profile"),
    (lambda t: t["inputs"]["sample"]["profiles"].pop(), "one range per profile"),
    (lambda t: t["inputs"]["sample"]["profiles"][0].update(min=[9, 4, 8, 8]), "does not rise"),
    (lambda t: t["inputs"]["sample"]["profiles"][0].update(min=[1, 4]), "does not rise"),
    (lambda t: t["inputs"]["sample"]["profiles"][0].pop("opt"), "it must have min, opt, max"),
    (lambda t: t["inputs"]["sample"]["profiles"][0].update(min=[0, 4, 8, 8]), "legal is from 1"),
    (lambda t: t["outputs"]["out_sample"].update(dtype="float8"), "unknown value 'float8'"),
    (lambda t: t.update(stripped=True), "can never run"),
    (lambda t: t.update(weights={"w": {"dtype": "float16", "shape": [1]}}), "only a plan that can be refitted"),
]


@pytest.mark.parametrize(("change", "words"), DAMAGE, ids=range(len(DAMAGE)))
def test_damaged_metadata(rig: Rig, change: Any, words: str) -> None:
    files = rig.plan()
    table = json.loads(files[1].read_text())
    change(table)
    files[1].write_text(json.dumps(table))
    with pytest.raises(BundleError, match=words):
        rig.open(files)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1', " " * (5 << 20)], ids=range(5))
def test_metadata_that_is_no_table(rig: Rig, text: str) -> None:
    files = rig.plan()
    files[1].write_text(text)
    with pytest.raises(BundleError, match=r"model\.json"):
        rig.open(files)


def test_a_part_has_two_files(rig: Rig) -> None:
    with pytest.raises(BundleError, match="this one has 1"):
        rig.open(rig.plan()[:1])
    with pytest.raises(BundleError, match="cannot be read"):
        rig.open([rig.plan()[0], Path("nowhere.json")])


# What does not fit this machine


@both
def test_a_missing_library_names_its_extra(rig: Rig, flavour: str, monkeypatch: pytest.MonkeyPatch) -> None:
    files = rig.plan(flavour)
    monkeypatch.setattr("diffship.targets.tensorrt.libraries.installed", lambda name: False)
    with pytest.raises(MissingExtra, match=rf"diffship\[tensorrt{'-rtx' if flavour == 'rtx' else ''}\]"):
        rig.open(files)


def test_the_bindings_do_without_the_meta_package(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", rig.rtx)
    monkeypatch.setattr(
        "diffship.targets.tensorrt.libraries.installed", lambda name: name in ("tensorrt_rtx_bindings", "cuda")
    )
    ok(rig.open(rig.plan("rtx")), feeds())


def test_missing_cuda_bindings(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(MissingExtra, match=r"cuda-bindings is not installed.*diffship\[tensorrt-rtx\]"):
        rig.open(rig.plan("rtx"))


@both
def test_another_version(rig: Rig, flavour: str) -> None:
    words = rf"1\.6\.0\.1; this is {rig.library(flavour).__version__}.*--to tensorrt --flavour {flavour}"
    with pytest.raises(UnsupportedError, match=words):
        rig.open(rig.plan(flavour, facts={"version": "1.6.0.1"}))


def test_another_gpu(rig: Rig) -> None:
    rig.cuda.capability = 90
    with pytest.raises(
        UnsupportedError, match=r"built for SM 8\.9 and 12\.0; GPU 0 \(NVIDIA Double\) is SM 9\.0\. Run:"
    ):
        rig.open()
    ok(rig.open(rig.plan(facts={"sm": []})), feeds())  # built for the builder's own GPU: the library decides


@pytest.mark.parametrize(("sm", "found"), [(89, ("rtx", (89,))), (90, ("trt", ())), (80, ("trt", ()))])
def test_the_library_of_this_gpu(rig: Rig, sm: int, found: tuple[str, tuple[int, ...]]) -> None:
    rig.cuda.capability = sm
    assert flavour_here() == found


@pytest.mark.parametrize(("gpus", "words"), [(-1, "cudaErrorInsufficientDriver"), (0, "the driver sees none")])
def test_no_gpu(rig: Rig, gpus: int, words: str) -> None:
    rig.cuda.gpus = gpus
    with pytest.raises(UnsupportedError, match=f"no NVIDIA GPU can be used: {words}. Run: diffship doctor"):
        rig.open()


def test_no_such_gpu(rig: Rig) -> None:
    with pytest.raises(UnsupportedError, match="there is no GPU 1; legal is device_id 0 to 0"):
        rig.open(device_id=1)


# The plan


@pytest.mark.parametrize(
    ("flavour", "data", "words"),
    [
        ("rtx", b"garbage" * 100, "is damaged, or no plan of"),
        ("rtx", b"", "cannot be read"),
        ("trt", b"garbage" * 100, "is refused: magic tag does not match"),
        ("trt", b"", "cannot be read"),
    ],
)
def test_a_damaged_plan(rig: Rig, flavour: str, data: bytes, words: str) -> None:
    files = rig.plan(flavour)
    files[0].write_bytes(data)
    with pytest.raises((BundleError, RunnerError), match=rf"unet/model\.plan {words}"):
        rig.open(files)


def test_rtx_says_why_a_plan_does_not_load(rig: Rig) -> None:
    rig.rtx.bad_header = Diagnostics.OLD_CUDA_DRIVER | Diagnostics.VERSION_MISMATCH
    with pytest.raises(UnsupportedError, match="does not load here: VERSION_MISMATCH, OLD_CUDA_DRIVER"):
        rig.open(rig.plan("rtx"))


def test_plan_and_metadata_of_two_exports(rig: Rig) -> None:
    one = rig.plan(profiles=(SMALL,))[1].read_text()
    half = rig.plan(dtype="float32")[1].read_text()
    files = rig.plan()
    table = json.loads(files[1].read_text())
    table["inputs"]["sample"]["profiles"][1]["opt"][0] = 3
    for text, words in (
        (one, "2 profiles, not 1"),
        (half, "of one export"),
        (json.dumps(table), "profile 1 of sample"),
    ):
        files[1].write_text(text)
        with pytest.raises(BundleError, match=words):
            rig.open(files)


def test_a_tensor_in_host_memory(rig: Rig) -> None:
    files = rig.plan()
    words = files[0].read_bytes().replace(b'"timestep": {', b'"timestep": {"host": true, ')
    files[0].write_bytes(words)
    with pytest.raises(UnsupportedError, match="timestep of the plan lies in host memory"):
        rig.open(files)


# Refit


def weights(scale: float, shift: float, dtype: Any = np.float16) -> dict[str, np.ndarray]:
    return {"scale": np.full((1, 4, 1, 1), scale, dtype), "shift": np.full((1, 4, 1, 1), shift, dtype)}


@both
def test_refit_changes_all_contexts_and_their_graphs(rig: Rig, flavour: str) -> None:
    session = rig.open(rig.plan(flavour, refit=True))
    for _ in range(3):
        ok(session, feeds(2, 16))
        ok(session, feeds(2, 64))
    for scale, shift in ((0.5, 0.25), (4.0, -1.0)):
        session.refit(weights(scale, shift, np.float32))
        for seed in range(3):
            ok(session, feeds(2, 16, seed), scale=scale, shift=shift)
            ok(session, feeds(2, 64, seed), scale=scale, shift=shift)
    assert rig.count("cudaStreamBeginCapture") == (0 if flavour == "rtx" else 6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scael": np.zeros(4, np.float16)}, "did you mean 'scale'"),
        ({"shift": None}, "1 weights are missing that go with those given: shift"),
        ({"shift": np.zeros((4, 1), np.float16)}, r"weight shift has shape \(4, 1\); the plan takes \(1, 4, 1, 1\)"),
        ({"shift": np.zeros((1, 4, 1, 1), np.int32)}, "weight shift: got int32"),
        ({"shift": np.full((1, 4, 1, 1), 1e6, np.float32)}, "weight shift: the value 1e"),
        ({"shift": None, "scale": None}, "no weights are given; the plan takes 2: scale, shift"),
    ],
)
def test_a_wrong_refit_changes_nothing(rig: Rig, change: dict[str, Any], words: str) -> None:
    session = rig.open(rig.plan(refit=True))
    ok(session, feeds())
    given = {name: array for name, array in {**weights(3, 1), **change}.items() if array is not None}
    with pytest.raises(RunnerError, match=words):
        session.refit(given)
    ok(session, feeds(seed=1))
    ok(session, feeds(seed=2))


def test_without_shapes_in_the_metadata_sizes_decide(rig: Rig) -> None:
    session = rig.open(rig.plan(refit=True, facts={"weights": {}}))
    with pytest.raises(RunnerError, match=r"weight shift has shape \(5,\); the plan takes 4 values"):
        session.refit({**weights(3, 1), "shift": np.zeros(5, np.float16)})
    session.refit(weights(3, 1))
    ok(session, feeds(), scale=3, shift=1)


def test_a_plan_with_fixed_weights(rig: Rig) -> None:
    with pytest.raises(UnsupportedError, match="--to tensorrt --refit"):
        rig.open().refit(weights(1, 1))


def test_a_refit_that_stops_half_way_ends_the_session(rig: Rig) -> None:
    session = rig.open(rig.plan(refit=True))
    rig.trt.refuse_refit = True
    with pytest.raises(RunnerError, match="did not take all weights; open the part again"):
        session.refit(weights(3, 1))
    with pytest.raises(RunnerError, match="a refit failed half-way"):
        session.run(feeds(), ["out_sample"])


@both
def test_a_stripped_plan_wants_weights(rig: Rig, tmp_path: Path, flavour: str) -> None:
    files = rig.plan(flavour, refit=True, stripped=True)
    with pytest.raises(
        UnsupportedError, match=r"holds no weights.*ONNX bundle.*unet\.safetensors.*--option weights=FOLDER"
    ):
        rig.open(files)
    arrays = weights(1.5, 0.5)
    metas = {name: meta_of(array) for name, array in arrays.items()}
    write_safetensors(tmp_path / "unet.safetensors", metas, arrays.__getitem__)
    session = rig.open(files, weights=str(tmp_path))
    for seed in range(3):
        ok(session, feeds(seed=seed), scale=1.5, shift=0.5)


def onnx_bundle(folder: Path, arrays: dict[str, np.ndarray]) -> Path:
    """A graph with these weights beside it, as an export writes them."""
    onnx = pytest.importorskip("onnx")
    tensors = [onnx.numpy_helper.from_array(array, name) for name, array in arrays.items()]
    model = onnx.helper.make_model(onnx.helper.make_graph([], "g", [], [], tensors))
    (folder / "unet").mkdir(parents=True)
    path = folder / "unet" / "model.onnx"
    onnx.save(model, str(path), save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    return folder


def test_weights_come_from_an_onnx_bundle_too(rig: Rig, tmp_path: Path) -> None:
    bundle = onnx_bundle(tmp_path / "tuned", {**weights(2.5, 0.25), "unknown": np.zeros(3, np.float32)})
    session = rig.open(rig.plan(refit=True, stripped=True), weights=str(bundle))
    ok(session, feeds(), scale=2.5, shift=0.25)


def test_an_onnx_bundle_of_another_precision_or_elsewhere(rig: Rig, tmp_path: Path) -> None:
    other = onnx_bundle(tmp_path / "fp32", weights(2.5, 0.25, np.float32))
    with pytest.raises(BundleError, match=r"scale takes 16 bytes; in the plan it is float16.*precision \(fp16\)"):
        rig.open(rig.plan(refit=True), weights=str(other))
    bundle = onnx_bundle(tmp_path / "cut", weights(2.5, 0.25))
    data = bundle / "unet" / "model.onnx_data"
    data.write_bytes(data.read_bytes()[:4])
    with pytest.raises(BundleError, match=r"model\.onnx_data"):
        rig.open(rig.plan(refit=True), weights=str(bundle))
    data.unlink()
    with pytest.raises(BundleError, match=r"model\.onnx_data"):
        rig.open(rig.plan(refit=True), weights=str(bundle))


def test_weights_that_do_not_fit_leave_nothing_open(rig: Rig, tmp_path: Path) -> None:
    arrays = {"scale": np.zeros((1, 4, 1, 1), np.float16)}
    write_safetensors(tmp_path / "unet.safetensors", {"scale": meta_of(arrays["scale"])}, arrays.__getitem__)
    with pytest.raises(RunnerError, match="missing that go with those given: shift"):
        rig.open(rig.plan(refit=True, stripped=True), weights=str(tmp_path))


# RTX's compiled kernels


def test_kernels_are_kept_in_a_file(rig: Rig, tmp_path: Path) -> None:
    files, folder = rig.plan("rtx"), tmp_path / "a" / "kernels"
    session = rig.open(files, runtime_cache=str(folder), contexts=2)
    ok(session, feeds(2, 16))
    (file,) = folder.iterdir()
    first = file.read_bytes()
    ok(session, feeds(2, 64))
    session.close()
    assert file.read_bytes() != first and list(folder.iterdir()) == [file]
    assert len(rig.rtx.compiled) == 2
    again = rig.open(files, runtime_cache=str(folder))
    ok(again, feeds(2, 16))
    ok(again, feeds(2, 64))
    again.close()
    assert len(rig.rtx.compiled) == 2


def test_without_a_folder_kernels_are_shared_within_the_session(rig: Rig, tmp_path: Path) -> None:
    session = rig.open(rig.plan("rtx"))
    for _ in range(2):
        ok(session, feeds(2, 16))
    session._pool._idle[0].forget()
    ok(session, feeds(2, 16))
    assert rig.rtx.created == 2 and len(rig.rtx.compiled) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["unet"]


@pytest.mark.parametrize("content", [b"", b"damaged", b"\0" * 4096], ids=range(3))
def test_a_damaged_cache_is_built_again(rig: Rig, tmp_path: Path, content: bytes) -> None:
    files, folder = rig.plan("rtx"), tmp_path / "kernels"
    rig.open(files, runtime_cache=str(folder)).close()
    session = rig.open(files, runtime_cache=str(folder))
    ok(session, feeds())
    session.close()
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(content)
    session = rig.open(files, runtime_cache=str(folder))
    ok(session, feeds())
    session.close()
    assert file.read_bytes() == whole


def test_two_plans_have_two_cache_files(rig: Rig, tmp_path: Path) -> None:
    folder = tmp_path / "kernels"
    for dtype in ("float16", "float32"):
        session = rig.open(rig.plan("rtx", dtype=dtype), runtime_cache=str(folder))
        ok(session, feeds(dtype=dtype))
        session.close()
    assert len(list(folder.iterdir())) == 2


def test_a_cache_that_cannot_be_written(rig: Rig, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"runtime_cache .*file is no folder"):
        rig.open(rig.plan("rtx"), runtime_cache=str(tmp_path / "file"))
    folder = tmp_path / "kernels"
    session = rig.open(rig.plan("rtx"), runtime_cache=str(folder))
    os.rmdir(folder)
    ok(session, feeds())


# doctor, choice of the engine


def test_the_registry_knows_it(rig: Rig) -> None:
    assert engines_for("tensorrt") == ("tensorrt",) and choose_engine("tensorrt") == "tensorrt"


def test_probe_with_a_gpu(rig: Rig) -> None:
    rig.cuda.gpus = 2
    probe = TensorRtRunner.probe()
    assert probe.available and probe.version == f"rtx {VERSION}, trt {rig.trt.__version__}" and not probe.reason
    assert probe.devices == tuple(f"cuda:{index} NVIDIA Double (SM 8.9)" for index in range(2))


def test_probe_without_a_driver_or_without_the_library(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.cuda.gpus = -1
    probe = TensorRtRunner.probe()
    assert not probe.available and probe.version and probe.reason.endswith("cudaErrorInsufficientDriver")
    monkeypatch.setattr("diffship.targets.tensorrt.libraries.installed", lambda name: False)
    probe = TensorRtRunner.probe()
    assert not probe.available and "not installed" in probe.reason and "diffship[tensorrt-rtx]" in probe.install
    monkeypatch.undo()
