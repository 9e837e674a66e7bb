"""Cases 15, 16 and 23: parts equal torch, in fp32 and fp16, at batches and sizes that were never traced."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from diffship.core.bundle import Bundle
from diffship.core.compare import Tolerance, compare
from diffship.core.job import Job
from diffship.core.weights import SeededWeights
from diffship.exporters.onnx import Onnx
from diffship.models.parts.component import Component, weight_metas
from diffship.models.parts.unet import UNet, unet
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source

FP32 = Tolerance(atol=1e-4, rtol=1e-3, psnr_db=60.0)
FP16 = Tolerance(psnr_db=65.0)
SIZES_PX = (64, 128, 192)
Arrays = dict[str, Any]


class Whole:
    """A part's file in ONNX Runtime, fed by canonical names."""

    def __init__(self, path: Path, component: Component) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options)
        self.component = component
        self.torch = component.load()

    def run(self, feeds: Arrays) -> Arrays:
        names = [spec.name for spec in self.component.outputs]
        return dict(zip(names, self.session.run(names, feeds), strict=True))

    def check(self, sizes: dict[str, int], seed: int = 0) -> None:
        feeds = self.component.example(seed, sizes)
        compare(self.torch.run(feeds), self.run(feeds), FP32).require(f"{self.component.name} at {sizes}")


@pytest.fixture(scope="module")
def tiny_unet(tiny_sd: Pipeline, tiny_sd_bundle: Bundle) -> Iterator[Whole]:
    yield Whole(tiny_sd_bundle.file("unet/model.onnx"), tiny_sd.components["unet"])


@pytest.mark.parametrize(("batch", "height", "width"), [(1, 64, 64), (2, 128, 64), (3, 64, 192), (4, 192, 128)])
def test_unet_equals_torch_at_any_batch_and_size(tiny_unet: Whole, batch: int, height: int, width: int) -> None:
    tiny_unet.check({"batch_size": batch, "height": height // 8, "width": width // 8, "sequence_length": 77})


@pytest.mark.parametrize("length", [1, 9, 154])
def test_unet_takes_any_text_length(tiny_unet: Whole, length: int) -> None:
    tiny_unet.check({"batch_size": 2, "sequence_length": length})


def test_one_timestep_serves_the_whole_batch(tiny_unet: Whole) -> None:
    feeds = tiny_unet.component.example(1, {"batch_size": 3})
    feeds["timestep"] = np.full(3, 500, np.float32)
    each = tiny_unet.run(feeds)
    feeds["timestep"] = np.full(1, 500, np.float32)
    assert np.array_equal(tiny_unet.run(feeds)["out_sample"], each["out_sample"])


def test_samples_may_stand_at_different_timesteps(tiny_unet: Whole) -> None:
    feeds = tiny_unet.component.example(2, {"batch_size": 2})
    feeds["timestep"] = np.array([999, 1], np.float32)
    both = tiny_unet.run(feeds)["out_sample"]
    for i in range(2):
        alone = tiny_unet.run({name: array[i : i + 1] for name, array in feeds.items()})["out_sample"]
        assert np.abs(alone - both[i : i + 1]).max() < 1e-4


@pytest.mark.parametrize("part", ["vae_encoder", "vae_decoder"])
def test_vae_equals_torch_at_any_batch_and_size(tiny_sd: Pipeline, tiny_sd_bundle: Bundle, part: str) -> None:
    whole = Whole(tiny_sd_bundle.file(f"{part}/model.onnx"), tiny_sd.components[part])
    names = [axis for axis in whole.component.smallest_sizes() if axis != "batch_size"]
    divisor = 1 if part == "vae_encoder" else 8
    for batch, first, second in ((1, 64, 64), (4, 192, 128)):
        whole.check({"batch_size": batch, names[0]: first // divisor, names[1]: second // divisor})


def test_text_encoder_equals_torch_at_any_length(tiny_sd: Pipeline, tiny_sd_bundle: Bundle) -> None:
    whole = Whole(tiny_sd_bundle.file("text_encoder/model.onnx"), tiny_sd.components["text_encoder"])
    for batch, length in ((1, 77), (3, 2), (2, 40)):
        whole.check({"batch_size": batch, "sequence_length": length})


def test_golden_vectors_say_proved(tiny_sd_bundle: Bundle) -> None:
    for part in tiny_sd_bundle.manifest.parts:
        assert part.golden is not None and part.golden.tolerance.psnr_db == 100
        assert part.proof["status"] == "proved"
        assert part.proof["max_abs"] <= 1e-4
        assert part.proof["psnr_db"] >= 100


@pytest.mark.slow
def test_fp16_parts_keep_to_what_the_format_costs_and_their_types(tiny_sd_fp16: Bundle) -> None:
    for part in tiny_sd_fp16.manifest.parts:
        assert part.golden is not None and 50 < (part.golden.tolerance.psnr_db or 0) < 90
        assert part.proof["psnr_db"] >= (part.golden.tolerance.psnr_db or 0)
        assert {spec.dtype for spec in part.outputs} == {"float16"}
    half = tiny_sd_fp16.file("vae_decoder/model.onnx_data").stat().st_size
    assert half < 0.6 * 4 * sum(meta_count(tiny_sd_fp16))


def meta_count(bundle: Bundle) -> Iterator[int]:
    import onnx

    model = onnx.load(str(bundle.file("vae_decoder/model.onnx")), load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.external_data:
            yield int(np.prod(tensor.dims))


def small_unet(**changes: Any) -> Component:
    """Two levels; what the families add is switched on one by one."""
    config = {
        "block_out_channels": (16, 32),
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 24,
        "attention_head_dim": 2,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "in_channels": 4,
        "out_channels": 4,
        **changes,
    }
    with torch.device("meta"):
        full = {key: value for key, value in UNet2DConditionModel(**config).config.items() if key[0] != "_"}
        weights = SeededWeights(weight_metas(UNet(full)), 7)
    return unet(full, weights)


XL = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 6 * 8 + 20,
    "use_linear_projection": True,
    "transformer_layers_per_block": (1, 2),
}
KINDS: dict[str, tuple[dict[str, Any], str]] = {
    "no mid block": ({"mid_block_type": None}, "fp32"),
    "lcm inpaint": ({"time_cond_proj_dim": 12, "in_channels": 9}, "fp32"),
    "sdxl": (XL, "fp32"),
    "sdxl lcm": ({**XL, "time_cond_proj_dim": 12}, "fp16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_reduced_and_extended_unets(kind: str, tmp_path: Path, graphs: Job) -> None:
    changes, precision = KINDS[kind]
    component = small_unet(**changes)
    Onnx(precision=precision).export(component, tmp_path, graphs)
    whole = Whole(tmp_path / "unet" / "model.onnx", component)
    feeds = component.example(3, {"batch_size": 2, "height": 6, "width": 4})
    kinds = {port.name: port.type for port in whole.session.get_inputs()}
    assert kinds["timestep"] == "tensor(float)"
    cast = {n: a.astype(np.float16) if kinds[n] == "tensor(float16)" else a for n, a in feeds.items()}
    if precision == "fp16":
        feeds = {name: array.astype(np.float32) for name, array in cast.items()}
    compare(whole.torch.run(feeds), whole.run(cast), FP32 if precision == "fp32" else FP16).require(kind)


@pytest.mark.slow
def test_plain_opset_equals_torch(tiny_sd: Pipeline, tmp_path: Path, graphs: Job) -> None:
    for part in ("text_encoder", "vae_decoder"):
        component = replace(tiny_sd.components[part])
        Onnx(opset=18).export(component, tmp_path, graphs)
        Whole(tmp_path / part / "model.onnx", component).check({"batch_size": 2})


@pytest.mark.slow
@pytest.mark.parametrize("source", ["arch:tiny-sd+taesd"])
def test_tiny_autoencoders(source: str, tmp_path: Path, graphs: Job) -> None:
    for part in ("vae_encoder", "vae_decoder"):
        component = open_source(source).components[part]
        Onnx().export(component, tmp_path, graphs)
        whole = Whole(tmp_path / part / "model.onnx", component)
        axes = [axis for axis in component.smallest_sizes() if axis != "batch_size"]
        least = component.smallest_sizes()
        whole.check({"batch_size": 3, axes[0]: 2 * least[axes[0]], axes[1]: 3 * least[axes[1]]})


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    "source", ["arch:tiny-sdxl+lcm", "arch:tiny-lcm", "arch:tiny-inpaint", "arch:tiny-sd+lcm+taesd"]
)
def test_every_tiny_architecture_is_proved(source: str, precision: str, tmp_path: Path) -> None:
    from diffship.export import export

    bundle = export(source, out=tmp_path / "bundle", precision=precision)
    assert {part.proof["status"] for part in bundle.manifest.parts} == {"proved"}
