"""The gate: what it feeds, what it measures, and what it must refuse. (`benchmarks.mutation` gives its score.)"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from diffship.benchmarks.studies.mutation.random_source import random_pipeline
from diffship.cli.inspect import inspect_bundle
from diffship.core.bundle import Bundle
from diffship.core.bundle_check import digest_file
from diffship.core.compare import compare
from diffship.core.errors import ParityError, UnsupportedError
from diffship.core.job import Job
from diffship.core.precision import BF16, FP16, Precision, precision_of
from diffship.core.weights import Weights
from diffship.export import export
from diffship.exporters.formats import COARSE_BITS, coarse, constants, rounding, simulated_forward
from diffship.exporters.golden_feeds import GoldenFeeds
from diffship.exporters.onnx import Onnx
from diffship.exporters.tolerances import conditioned, exact, measured
from diffship.models.parts.clip import TextEncoder
from diffship.models.parts.component import Component
from diffship.models.parts.unet import UNet
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.runtimes.proof.verify import verify

PRECISIONS = ["fp32", "fp16", "bf16"]


class Deaf(UNet):
    """A U-Net that cannot hear its prompt."""

    def forward(self, sample: Any, timestep: Any, encoder_hidden_states: Any, *rest: Any) -> Any:
        return super().forward(sample, timestep, encoder_hidden_states * 0, *rest)


def without(path: str, component: Component) -> torch.nn.Module:
    """The part with the output of one module set to zero."""
    module = component.build()
    module.get_submodule(f"inner.{path}").register_forward_hook(lambda _, inputs, output: output * 0)
    return module


def mutant(pipeline: Pipeline, part: str, build: Callable[[], torch.nn.Module]) -> Pipeline:
    component = replace(pipeline.components[part], build=build)
    return replace(pipeline, components={part: component})


def test_golden_feeds_see_everything(tiny_sd: Pipeline) -> None:
    unet = tiny_sd.components["unet"]
    sizes = Onnx().golden_sizes(unet, tiny_sd.family, 2)
    assert sizes["height"] == 2 * unet.smallest["height"] and sizes["width"] == 3 * unet.smallest["width"]
    deepest = 2 ** (len(unet.config["block_out_channels"]) - 1)
    assert (sizes["height"] // deepest) * (sizes["width"] // deepest) > 1
    first, second = GoldenFeeds(tiny_sd, 1 << 30).calls(unet, sizes)
    times = [*first["timestep"], *second["timestep"]]
    assert len(set(times)) == 4 and min(first["timestep"]) > max(second["timestep"])
    text = tiny_sd.components["text_encoder"].load()
    calls = GoldenFeeds(tiny_sd, 1 << 30).calls(tiny_sd.components["text_encoder"], {"batch_size": 2})
    expected = text.run(calls[0])["last_hidden_state"]
    assert np.allclose(first["encoder_hidden_states"], expected, atol=1e-5)
    noisy = [float(np.std(np.diff(call["sample"], axis=3))) for call in (first, second)]
    assert noisy[0] > 1.5 * noisy[1]


def test_blocks_of_text_read_the_whole_table(tiny_sd: Pipeline) -> None:
    text, feeds = tiny_sd.components["text_encoder"], GoldenFeeds(tiny_sd, 1 << 30)
    found = feeds.inside(text, {"batch_size": 2})["input_ids"]
    assert found.shape == (4, 77) and found.dtype == np.int64
    assert np.array_equal(found[:2], feeds.calls(text, {"batch_size": 2})[0]["input_ids"])
    ids, words = np.sort(found[2:].ravel()), text.config["vocab_size"]
    assert (ids[0], ids[-1]) == (0, words - 1) and np.diff(ids).max() <= words / 153 + 1


class Counting(TextEncoder):
    """Computes right for two samples and more, as many as the references have."""

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(output * (min(len(input_ids), 2) / 2) for output in super().forward(input_ids))


@pytest.mark.slow
def test_a_part_whose_samples_depend_on_their_number_is_refused(tiny_sd: Pipeline, tmp_path: Path) -> None:
    text = tiny_sd.components["text_encoder"]
    wrong = mutant(tiny_sd, "text_encoder", lambda: Counting(text.config, False, False))
    with pytest.raises(UnsupportedError, match=r"torch gives a sample another .* alone than among others"):
        export(wrong, "onnx", tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("part", ["text_encoder", "vae_decoder"])
def test_the_simulation_costs_what_torch_costs_in_the_format(tiny_sd: Pipeline, part: str, precision: str) -> None:
    component = tiny_sd.components[part]
    feeds = component.example(3, {"batch_size": 2})
    true = component.load().run(feeds)
    actual = component.load(dtype=precision_of(precision).activations).run(feeds)
    simulated = simulated_forward(component, feeds, 1 << 30, precision_of(precision))
    for name, array in true.items():
        limit = measured(array, simulated[name])
        found, wanted = (compare({"": array}, {"": x[name]}, limit).outputs[0] for x in (actual, simulated))
        assert found.passed and abs(found.psnr_db - wanted.psnr_db) < 4, name


def test_rounding_follows_writes_in_place_and_leaves_views_alone() -> None:
    module = torch.nn.Identity()
    with rounding(module, FP16):
        values = torch.full((2, 2), 1 / 3) + 0
        row = values[0]
        row.mul_(1 / 3)
    third = torch.tensor(1 / 3, dtype=torch.float16)
    assert values[1, 0] == third.float() and values[0, 0] == (third.float() * third.float()).half().float()


def test_coarse_results_are_the_nearest_with_fewer_bits() -> None:
    values = torch.randn(4096, generator=torch.Generator().manual_seed(0)) * 1e3
    with coarse():
        found = (values * 1.0).numpy()
    sizes = np.abs(values.numpy().astype(np.float64))
    step = 2.0 ** (np.floor(np.log2(sizes)) - 23 + COARSE_BITS)  # float32 has 23 bits behind the first
    assert np.array_equal(np.abs(found), np.floor(sizes / step + 0.5) * step)
    assert np.array_equal(np.sign(found), np.sign(values.numpy()))


def test_a_float32_tolerance_is_never_tighter_and_loosens_by_what_rounding_costs() -> None:
    reference = np.linspace(-1, 1, 1001, dtype=np.float32)
    plain = exact(reference)
    assert conditioned(reference, reference + np.float32(1e-6)) == plain
    loose = conditioned(reference, reference + np.float32(2e-3))
    assert loose.psnr_db is not None and plain.psnr_db is not None and loose.atol is not None
    assert loose.psnr_db == pytest.approx(20 * np.log10(1 / 2e-3), abs=0.02) and loose.psnr_db < plain.psnr_db
    assert 2e-3 <= loose.atol < 2.1e-3
    wild = conditioned(reference, -reference)
    assert (wild.psnr_db, wild.atol) == (40.0, pytest.approx(0.1, rel=1e-3))


@pytest.mark.slow
def test_a_sound_part_that_enlarges_rounding_errors_is_proved_and_a_spoilt_one_is_not(tmp_path: Path) -> None:
    """Layers of four channels, nearly equal ones among them, are normalised: two float32 engines agree to 70 dB."""
    pipeline = random_pipeline(135)
    unet = pipeline.components["unet"]
    part = export(pipeline, "onnx", tmp_path / "sound", parts=["unet"]).part("unet")
    assert part.golden is not None and part.golden.tolerance.psnr_db is not None
    assert "enlarges rounding errors" in str(part.golden.method) and 40 < part.golden.tolerance.psnr_db < 80
    path = "down_blocks.1.attentions.0.transformer_blocks.1.attn2"
    wrong = mutant(pipeline, "unet", lambda: without(path, unet))
    with pytest.raises(ParityError, match=path):
        export(wrong, "onnx", tmp_path / "wrong", parts=["unet"], against=pipeline)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_missing_attention_is_refused_and_named(
    tiny_sd: Pipeline, graphs: Job, tmp_path: Path, precision: str
) -> None:
    sound = tiny_sd.components["vae_decoder"]
    wrong = mutant(tiny_sd, "vae_decoder", partial(without, "decoder.mid_block.attentions.0.to_out.0", sound))
    with pytest.raises(ParityError, match=r"float32 arithmetic: decoder\.mid_block\.attentions\.0\.out"):
        export(wrong, out=tmp_path / "b", precision=precision, against=tiny_sd)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_unet_that_is_deaf_to_its_text_is_refused(tmp_path: Path, precision: str) -> None:
    emoji = open_source("emoji")
    deaf = mutant(emoji, "unet", partial(Deaf, dict(emoji.components["unet"].config)))
    with pytest.raises(ParityError, match=r"attn2\.out"):
        export(deaf, out=tmp_path / "b", precision=precision, against=emoji)


class Noisy:
    """Weights with other values under some names."""

    def __init__(self, inner: Weights, others: Mapping[str, np.ndarray]) -> None:
        self._inner, self._others = inner, others

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def read(self, name: str) -> Any:
        return self._others[name] if name in self._others else self._inner.read(name)


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
def test_noise_for_queries_and_keys_of_the_mid_block_is_refused(tmp_path: Path, precision: str) -> None:
    """At one token in the mid block they had no say at all: softmax over one key is 1."""
    tiny = open_source("arch:tiny-sd")
    sound = tiny.components["unet"]
    rng = np.random.default_rng(0)
    names = [f"mid_block.attentions.0.transformer_blocks.0.attn1.to_{kind}.weight" for kind in "qk"]
    noise = {n: rng.standard_normal(sound.weights.meta(n).shape).astype(np.float32) for n in names}
    wrong = replace(sound, weights=Noisy(sound.weights, noise))  # type: ignore[arg-type]
    with pytest.raises(ParityError, match=r"mid_block\.attentions\.0\.transformer_blocks\.0\.attn1\.out"):
        export(replace(tiny, components={"unet": wrong}), out=tmp_path / "b", precision=precision, against=tiny)


def edit(bundle: Bundle, name: str, part: str, folder: Path) -> Path:
    """A copy of `bundle` with one tensor of a part's data file zeroed, and the hash renewed."""
    copy = folder / "edited"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(bundle.path, copy)
    model = onnx.load(str(copy / part / "model.onnx"), load_external_data=False)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == name)
    claims = {entry.key: entry.value for entry in tensor.external_data}
    data = copy / part / "model.onnx_data"
    with data.open("r+b") as file:
        file.seek(int(claims["offset"]))
        file.write(b"\0" * int(claims["length"]))
    manifest = json.loads((copy / "diffship.json").read_text())
    manifest["files"][f"{part}/model.onnx_data"]["sha256"] = digest_file(data)
    (copy / "diffship.json").write_text(json.dumps(manifest))
    return copy


@pytest.mark.slow
def test_a_zeroed_attention_matrix_of_a_proved_bundle_is_found(tiny_sd_fp16: Bundle, tmp_path: Path) -> None:
    model = onnx.load(str(tiny_sd_fp16.file("text_encoder/model.onnx")), load_external_data=False)
    names = [t.name for t in model.graph.initializer if "out_proj.weight" in t.name]
    assert names and verify(tiny_sd_fp16, parts=["text_encoder"]).passed
    for name in names:
        report = verify(edit(tiny_sd_fp16, name, "text_encoder", tmp_path), parts=["text_encoder"])
        assert not report.passed and not report.damage
        assert report.checks[0].blocks[0].failed[0].startswith(name.partition(".out_proj")[0])


@pytest.mark.slow
def test_every_zeroed_attention_matrix_of_an_fp16_emoji_is_found(tmp_path: Path) -> None:
    bundle = export("emoji", out=tmp_path / "sound", precision="fp16", parts=["unet"])
    assert verify(bundle).passed
    model = onnx.load(str(bundle.file("unet/model.onnx")), load_external_data=False)
    names = [t.name for t in model.graph.initializer if "to_out.0.weight" in t.name]
    assert len(names) == 32
    missed = [name for name in names if verify(edit(bundle, name, "unet", tmp_path)).passed]
    assert not missed


@pytest.mark.slow
def test_what_overflows_float16_is_refused_with_its_place(tiny_sd: Pipeline, tmp_path: Path) -> None:
    sound = tiny_sd.components["vae_decoder"]
    name = "decoder.conv_in.weight"
    huge = {name: np.full(sound.weights.meta(name).shape, 3e4, np.float32)}
    loud = replace(sound, weights=Noisy(sound.weights, huge))  # type: ignore[arg-type]
    pipeline = replace(tiny_sd, components={"vae_decoder": loud})
    with pytest.raises(UnsupportedError, match=r"vae_decoder overflows float16 .*export it with --precision fp32"):
        export(pipeline, out=tmp_path / "b", precision="fp16")


def test_blocks_are_small_whatever_the_part(tiny_sd_bundle: Bundle) -> None:
    for part in tiny_sd_bundle.manifest.parts:
        assert part.golden is not None and part.golden.blocks is not None
        points = len(part.golden.blocks.graph)
        assert points >= 8 and set(part.golden.blocks.cut) <= set(part.golden.blocks.graph)
        model = onnx.load(str(tiny_sd_bundle.file(part.files[0])), load_external_data=False)
        made = {name for node in model.graph.node for name in node.output}
        assert set(part.golden.blocks.graph) <= made
        described = {info.name for info in (*model.graph.value_info, *model.graph.output)}
        assert made <= described, "an edge device without the onnx package cannot infer types"
        assert all(numpy_helper.to_array(t).size < 1 << 12 for t in model.graph.initializer if not t.external_data)


@pytest.mark.slow
def test_a_bundle_of_the_first_form_is_told_that_its_proof_is_weaker(tiny_sd_bundle: Bundle, tmp_path: Path) -> None:
    """Whole parts at the smallest square, with the tolerance that was assumed then."""
    from diffship.core.dtype import meta_of
    from diffship.core.safetensors_file import write_safetensors

    copy = tmp_path / "old"
    shutil.copytree(tiny_sd_bundle.path, copy)
    manifest = json.loads((copy / "diffship.json").read_text())
    part = next(part for part in manifest["parts"] if part["name"] == "vae_decoder")
    component = open_source("arch:tiny-sd").components["vae_decoder"]
    feeds = component.example(20, {"batch_size": 2})
    tensors = {f"in.{name}": array for name, array in feeds.items()}
    tensors |= {f"out.{name}": np.asarray(array) for name, array in component.load().run(feeds).items()}
    file = "golden/vae_decoder.safetensors"
    write_safetensors(copy / file, {name: meta_of(array) for name, array in tensors.items()}, tensors.__getitem__)
    (copy / "golden" / "vae_decoder.blocks.safetensors").unlink()
    del manifest["files"]["golden/vae_decoder.blocks.safetensors"]
    manifest["files"][file] = {"size": (copy / file).stat().st_size, "sha256": digest_file(copy / file)}
    tolerance = {"atol": 1e-4, "rtol": 1e-3, "psnr_db": 60.0}
    part["golden"] = {"file": file, "sizes": {"batch_size": 2}, "tolerance": tolerance}
    (copy / "diffship.json").write_text(json.dumps({**manifest, "schema": 1}))
    report = verify(copy, parts=["vae_decoder"])
    assert report.passed and report.checks[0].blocks == ()
    assert "weaker proof" in report.text() and "Export again" in report.text()
    assert "vae_decoder: weaker proof" in inspect_bundle(copy).text
    assert "weaker" not in inspect_bundle(tiny_sd_bundle.path).text


@pytest.mark.parametrize("precision", [FP16, BF16], ids=str)
@pytest.mark.parametrize("simulate", [constants, rounding])
def test_what_is_made_of_integers_alone_is_exact(simulate: Any, precision: Precision) -> None:
    """T5's buckets of relative positions: log(distance / 8) / log(16) * 8 is whole at 16 and 32, and one less below."""
    distances = torch.tensor([8, 16, 32, 64])
    with simulate(torch.nn.Identity(), precision):
        buckets = (torch.log(distances.float() / 8) / math.log(128 / 8) * 8).long()
        bent = torch.full((1,), 2.0) / 3.0 if simulate is rounding else None
    assert buckets.tolist() == [0, 2, 4, 6]
    assert bent is None or float(bent) != float(np.float32(2) / np.float32(3))
