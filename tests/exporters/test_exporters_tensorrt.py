"""TensorRT engines: what is refused before work, what a plan's key depends on, and real builds without a GPU."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.cli.main import main
from diffship.core.bundle import Bundle
from diffship.core.errors import Cancelled, ConfigError, DeadlineError, UnsupportedError
from diffship.core.job import Job
from diffship.core.manifest import Part
from diffship.core.strict import load
from diffship.exporters.tensorrt import TensorRt, build, exporter, process
from diffship.exporters.tensorrt.shapes import Range, check_names, parse_shapes, profile
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.targets.tensorrt.gpus import GPUS, LEGEND, RTX_SM, check_sm, markdown
from diffship.targets.tensorrt.plan import PlanFacts

pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def emoji() -> Pipeline:
    return open_source("emoji")


# --- flags ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sm": (80,)}, r"--sm 80 \(A100\).*--engine onnxruntime --device cuda"),
        ({"sm": (89, 90)}, r"--sm 90 \(H100, H200\)"),
        ({"sm": (100,)}, "--flavour trt on that GPU"),
        ({"sm": (87,)}, "--sm 87 is unknown; legal: 75, 86, 89, 120, 121"),
        ({"flavour": "trt", "sm": (89,)}, "leave it out"),
        ({"strip": True}, "give both"),
        ({"opset": 30}, "opset is 30; legal is from 18 to 23"),
        ({"min_shapes": ("sample:2xy",)}, "is not NAME:AxBx"),
        ({"opt_shapes": ("sample",)}, "is not NAME:AxBx"),
        ({"max_shapes": ("sample:1x4x8x8", "sample:2x4x8x8")}, "names sample twice"),
        ({"max_shapes": ("sample:0x4x8x8",)}, "is not NAME:AxBx"),
    ],
)
def test_flags_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TensorRt(**options)


def test_the_table_of_gpus_is_what_the_flags_allow() -> None:
    for gpu in GPUS:
        if gpu.rtx == "no":
            with pytest.raises(ConfigError, match=f"--sm {gpu.sm}"):
                check_sm("rtx", (gpu.sm,))
        else:
            assert check_sm("rtx", (gpu.sm,)) == (gpu.sm,)
        assert gpu.name in markdown() and gpu.trt == "unproven"
    assert {gpu.sm for gpu in GPUS if gpu.rtx != "no"} == set(RTX_SM)
    assert check_sm("rtx", (120, 89, 89)) == (89, 120) == check_sm("rtx", ())


def test_every_word_of_the_table_is_explained_where_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) in (0, 1)
    printed = capsys.readouterr().out
    for text in (printed, markdown()):
        assert {word for gpu in GPUS for word in (gpu.rtx, gpu.trt)} == set(LEGEND)
        assert all(meaning in text for meaning in LEGEND.values())
        assert all(name in text for name in ("A10G", "L4", "A100", "H100", "4090"))


def test_the_page_has_the_table() -> None:
    page = (Path(__file__).parents[2] / "docs" / "tensorrt.md").read_text(encoding="utf-8")
    assert page.split("<!-- gpus -->\n")[1].split("\n<!-- end gpus -->")[0] == markdown()


def test_the_command_line_names_the_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "emoji", "--to", "tensorrt", "--sm", "89,90", "-o", "nowhere"]) == 2
    assert "--sm 90" in capsys.readouterr().err
    assert main(["export", "emoji", "--to", "tensorrt", "--sm", "ada", "-o", "nowhere"]) == 2
    assert "such as 4,25" in capsys.readouterr().err


# --- profiles ---------------------------------------------------------------------------------------------------------


def shapes(pipeline: Pipeline, part: str, **asked: list[str]) -> dict[str, Range]:
    flags = {kind: parse_shapes(kind, entries) for kind, entries in asked.items()}
    return profile(pipeline.components[part], pipeline.family, flags)


def test_ranges_come_from_the_size_of_the_family(emoji: Pipeline) -> None:
    unet = shapes(emoji, "unet")
    assert unet["sample"] == Range((1, 4, 8, 8), (2, 4, 16, 16), (8, 4, 24, 24))
    assert unet["timestep"] == Range((1,), (2,), (8,))
    assert unet["encoder_hidden_states"] == Range((1, 77, 192), (2, 77, 192), (8, 77, 192))
    assert shapes(emoji, "vae_decoder")["latent_sample"] == Range((1, 4, 8, 8), (1, 4, 16, 16), (4, 4, 24, 24))
    assert shapes(emoji, "vae_encoder")["sample"] == Range((1, 3, 64, 64), (1, 3, 128, 128), (4, 3, 192, 192))
    assert shapes(emoji, "text_encoder")["input_ids"] == Range((1, 77), (2, 77), (8, 77))
    for made in (unet, shapes(open_source("arch:sdxl"), "unet")):
        assert all(np.all(np.array(r.min) <= r.opt) and np.all(np.array(r.opt) <= r.max) for r in made.values())
    assert shapes(open_source("arch:sdxl"), "unet")["sample"] == Range(
        (1, 4, 64, 64), (2, 4, 128, 128), (8, 4, 192, 192)
    )


def test_a_shape_sets_its_axes_in_all_inputs_of_its_part(emoji: Pipeline) -> None:
    asked = {"opt": ["unet.sample:4x4x8x16"], "max": ["timestep:4"]}
    unet = shapes(emoji, "unet", **asked)
    assert unet["sample"] == Range((1, 4, 8, 8), (4, 4, 8, 16), (4, 4, 24, 24))
    assert unet["encoder_hidden_states"].opt == (4, 77, 192)
    assert shapes(emoji, "vae_encoder", **asked) == shapes(emoji, "vae_encoder"), "its sample is another part's"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"min": ["sample:4x4x8x8"]}, "batch_size is min 4, opt 2"),
        ({"max": ["unet.sample:2x4x8x8"]}, "height is min 8, opt 16, max 8"),
        ({"opt": ["unet.sample:2x3x8x8"]}, r"--opt-shapes: unet: tensor sample: got shape \(2, 3, 8, 8\)"),
        ({"opt": ["unet.sample:2x4x8x8", "timestep:3"]}, "timestep: got shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(emoji: Pipeline, asked: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        shapes(emoji, "unet", **asked)


def test_an_unknown_input_is_named_with_the_nearest(emoji: Pipeline) -> None:
    with pytest.raises(ConfigError, match="unknown input 'sampel'; did you mean 'sample'"):
        check_names(emoji.components.values(), {"min": parse_shapes("min", ["sampel:1x4x8x8"])})


def test_a_decoder_that_overflows_stays_in_float32() -> None:
    sdxl = open_source("arch:sdxl").components
    made = TensorRt()
    assert {name: made.through(part).precision for name, part in sdxl.items()} == {
        "text_encoder": "fp16", "text_encoder_2": "fp16", "unet": "fp16", "vae_encoder": "fp32", "vae_decoder": "fp32",
    }  # fmt: skip


# --- before a build ---------------------------------------------------------------------------------------------------


def graph_part(folder: Path, op: str = "Relu") -> Part:
    """A graph of one operator where an exported part would lie."""
    x = onnx.helper.make_tensor_value_info("sample", onnx.TensorProto.FLOAT, ["batch_size", 4, "height", "width"])
    y = onnx.helper.make_tensor_value_info("out_sample", onnx.TensorProto.FLOAT, ["batch_size", 4, "height", "width"])
    domain = "" if onnx.defs.has(op) else "elsewhere"
    node = onnx.helper.make_node(op, ["sample"], ["out_sample"], domain=domain)
    imports = [onnx.helper.make_opsetid(name, 18) for name in {"", domain}]
    model = onnx.helper.make_model(onnx.helper.make_graph([node], "g", [x], [y]), opset_imports=imports)
    (folder / "unet").mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "unet" / "model.onnx"))
    unet = open_source("emoji").components["unet"]
    return Part("unet", ("unet/model.onnx",), unet.inputs[:1], unet.outputs, "fp32", "0" * 64)


def test_an_operator_that_tensorrt_lacks_is_named_before_the_build(rtx: Any, tmp_path: Path) -> None:
    graph_part(tmp_path, "Unfold")
    with pytest.raises(UnsupportedError, match=r"unet: this TensorRT \(rtx [\d.]+\) has no Unfold"):
        exporter.refuse_operators(rtx, "rtx", tmp_path / "unet" / "model.onnx")
    graph_part(tmp_path)
    exporter.refuse_operators(rtx, "rtx", tmp_path / "unet" / "model.onnx")


def test_too_little_memory_is_said_before_the_build(
    rtx: Any, emoji: Pipeline, tmp_path: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("diffship.core.job.available_memory", lambda: 100 << 20)
    monkeypatch.setattr(exporter, "run_build", lambda *_: pytest.fail("a build was started"))
    with pytest.raises(UnsupportedError, match=r"the engine of unet needs .* of memory, .* are available"):
        TensorRt(precision="fp32").build(
            emoji.components["unet"], emoji, graph_part(tmp_path / "g"), tmp_path / "g", tmp_path / "out", Job()
        )


def test_a_missing_library_is_one_line_with_its_extra(monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings", "tensorrt"):
        monkeypatch.setitem(sys.modules, name, None)
    for flavour, extra in (("rtx", "tensorrt-rtx"), ("trt", "tensorrt")):
        words = ["export", "emoji", "--to", "tensorrt", "--flavour", flavour, "--parts", "unet", "-o", "nowhere"]
        assert main(words) == 3
        assert f"pip install 'diffship[{extra}]'" in capsys.readouterr().err


CHANGES: Mapping[str, Any] = {
    "sm": (89,), "refit": True, "precision": "fp32", "max_shapes": ("sample:8x4x16x16",), "opt_shapes": ("timestep:4",),
}  # fmt: skip


def test_the_key_of_a_plan_changes_with_everything_it_depends_on(
    rtx: Any, emoji: Pipeline, tmp_path: Path, monkeypatch: Any
) -> None:
    def key(made: TensorRt, graph: Part, folder: Path = tmp_path / "a") -> str:
        asked = {kind: parse_shapes(kind, getattr(made, f"{kind}_shapes")) for kind in ("min", "opt", "max")}
        ranges = profile(emoji.components["unet"], emoji.family, asked)
        return made.key(replace(graph, precision=made.precision), folder / "unet" / "model.onnx", ranges)

    graph = graph_part(tmp_path / "a")
    plain = key(TensorRt(), graph)
    assert key(TensorRt(), graph) == plain and key(TensorRt(sm=(120, 89)), graph) == plain
    others = [key(TensorRt(**{name: value}), graph) for name, value in CHANGES.items()]
    others.append(key(TensorRt(refit=True, strip=True), graph))
    others.append(key(TensorRt(), replace(graph, source_digest="1" * 64)))
    graph_part(tmp_path / "b", "Sigmoid")
    others.append(key(TensorRt(), graph, tmp_path / "b"))
    monkeypatch.setattr(exporter, "library", lambda flavour: type("Other", (), {"__version__": "9"}))
    others.append(key(TensorRt(), graph))
    assert len({plain, *others}) == 1 + len(others)


# --- real builds ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_engine_is_built_once_and_then_taken_from_the_cache(
    rtx: Any, emoji: Pipeline, tmp_path: Path, monkeypatch: Any
) -> None:
    told: list[tuple[str, int, int]] = []
    graph, unet = graph_part(tmp_path / "g"), emoji.components["unet"]
    one = replace(unet, inputs=unet.inputs[:1])

    def made(out: str) -> Part:
        job = Job(tmp_path / "cache", lambda *step: told.append(step))
        return TensorRt(sm=(89,), precision="fp32").build(one, emoji, graph, tmp_path / "g", tmp_path / out, job)

    part = made("first")
    plan, facts = (tmp_path / "first" / name for name in part.files)
    assert part.files[0] == "unet/model_rtx_sm89_fp32.plan" and plan.stat().st_size > 1000
    read = load(PlanFacts, json.loads(facts.read_text(encoding="utf-8")), "plan")
    assert (read.flavour, read.sm, read.version) == ("rtx", (89,), rtx.__version__)
    assert read.inputs["sample"].profiles[0] == {"min": [1, 4, 8, 8], "opt": [2, 4, 16, 16], "max": [8, 4, 24, 24]}
    assert part.extra["build"]["seconds"] > 0 and any(label.startswith("build unet: ") for label, *_ in told)
    monkeypatch.setattr(exporter, "run_build", lambda *_: pytest.fail("it was built again"))
    again = made("second")
    assert (tmp_path / "second" / again.files[0]).read_bytes() == plan.read_bytes() and "build" not in again.extra


def order(tmp_path: Path, op: str = "Relu", shapes: Any = None) -> build.Order:
    graph_part(tmp_path, op)
    shapes = shapes or {"sample": {"min": [1, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [2, 4, 8, 8]}}
    return build.Order(str(tmp_path / "unet" / "model.onnx"), str(tmp_path / "plan"), "rtx", shapes, (89,))


@pytest.mark.slow
def test_what_the_library_refuses_is_its_own_reason(rtx: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"cannot read the graph: .*Unfold"):
        process.run_build(order(tmp_path, "Unfold"), "unet", Job())
    wrong = {"sample": {"min": [4, 4, 8, 8], "opt": [2, 4, 8, 8], "max": [2, 4, 8, 8]}}
    with pytest.raises(UnsupportedError, match="TensorRT"):
        process.run_build(order(tmp_path, shapes=wrong), "unet", Job())
    assert not (tmp_path / "plan").exists()


@pytest.mark.slow
def test_a_silent_build_hears_that_it_is_stopped_and_has_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = [sys.executable, "-c", "import time; time.sleep(60)"]
    monkeypatch.setattr(process.child, "command", lambda *_: silent)
    asked = iter([False, True])
    begin = time.monotonic()
    with pytest.raises(Cancelled):
        process.run_build(order(tmp_path), "unet", Job(cancel=lambda: next(asked)))
    monkeypatch.setattr(process, "SILENT_SECONDS", 0.3)
    with pytest.raises(DeadlineError, match=r"the build of unet said nothing for 0\.3 s"):
        process.run_build(order(tmp_path), "unet", Job())
    assert time.monotonic() - begin < 30


TALKS = "while True: print('x', flush=True)"
STAYS = """
import os, sys, time
print('{"made": {"seconds": 1}}', flush=True)
os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
os.dup2(1, 2)
time.sleep(60)
"""
LEAVES = """
import subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(20)"])  # it holds the pipe
print('{"phase": "a", "done": 0, "total": 1}', flush=True)
"""


@pytest.mark.slow
def test_no_build_outlives_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_END_SECONDS", 0.2)
    begin, asked = time.monotonic(), iter([False] * 3 + [True] * 9)
    monkeypatch.setattr(process.child, "command", lambda *_: [sys.executable, "-c", TALKS])
    with pytest.raises(Cancelled):  # one that talks all the time hears it too
        process.run_build(order(tmp_path), "unet", Job(cancel=lambda: next(asked)))
    monkeypatch.setattr(process.child, "command", lambda *_: [sys.executable, "-c", STAYS])
    assert process.run_build(order(tmp_path), "unet", Job()) == {"seconds": 1}
    monkeypatch.setattr(process.child, "command", lambda *_: [sys.executable, "-c", LEAVES])
    monkeypatch.setattr(process, "SILENT_SECONDS", 0.3)
    with pytest.raises(DeadlineError):
        process.run_build(order(tmp_path), "unet", Job())
    assert time.monotonic() - begin < 15


@pytest.mark.slow
def test_a_build_that_dies_or_is_stopped_is_told(rtx: Any, tmp_path: Path, monkeypatch: Any) -> None:
    with pytest.raises(Cancelled):
        process.run_build(order(tmp_path), "unet", Job(cancel=lambda: True))
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(UnsupportedError, match="the build of unet ended with code 1"):
        process.run_build(order(tmp_path), "unet", Job())


@pytest.mark.slow
def test_every_part_of_emoji_is_built_and_its_graph_proved(rtx: Any, tmp_path: Path, command: Any) -> None:
    made = command("export", "emoji", "--to", "tensorrt", "--sm", "89,120", "-o", tmp_path / "engines")
    assert made["exit_code"] == 0, made
    assert {part["name"]: (part["proof"], part["graph"]) for part in made["parts"]} == dict.fromkeys(
        ("text_encoder", "unet", "vae_encoder", "vae_decoder"), ("unproven", "proved")
    )
    bundle = Bundle.open(tmp_path / "engines")
    assert bundle.manifest.target == "tensorrt" and not list(tmp_path.rglob("*-graph-*"))
    for part in bundle.manifest.parts:
        assert part.files[0] == f"{part.name}/model_rtx_sm89-sm120_fp16.plan" and part.golden is not None
        assert part.proof["graph"]["psnr_db"] >= 35 and "diffship verify" in part.proof["reason"]
    assert sorted(path.name for path in (tmp_path / "engines" / "unet").iterdir()) == [
        "config.json", "model_rtx_sm89-sm120_fp16.json", "model_rtx_sm89-sm120_fp16.plan",
    ]  # fmt: skip


def test_weights_that_can_be_replaced_need_a_driver(rtx: Any, emoji: Pipeline, monkeypatch: Any) -> None:
    monkeypatch.setattr(exporter, "has_driver", lambda: False)
    for options in ({"refit": True}, {"refit": True, "strip": True}):
        with pytest.raises(UnsupportedError, match="with an NVIDIA driver only; leave them out, or export there"):
            TensorRt(**options).check(emoji)
    monkeypatch.setattr(exporter, "has_driver", lambda: True)
    assert TensorRt(refit=True).check(emoji) == []


@pytest.mark.gpu
def test_a_plan_with_weights_that_can_be_replaced_and_one_without_any(rtx: Any, tmp_path: Path, command: Any) -> None:
    sizes = {}
    for name, flags in {"whole": ["--refit"], "stripped": ["--refit", "--strip"]}.items():
        words = ["emoji", "--to", "tensorrt", "--sm", "89", "--parts", "text_encoder", *flags, "--no-verify"]
        made = command("export", *words, "-o", tmp_path / name)
        assert made["exit_code"] == 0, made
        sizes[name] = made["parts"][0]["bytes"]
    assert sizes["stripped"] < sizes["whole"] / 2
