"""LoRA files of the lcm pass: stock diffusers, peft and the lora pass add the same change from each of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import peft
import pytest
import torch
from safetensors.numpy import load_file

from diffship.compress import compress
from diffship.compression.lora import LoraPass
from diffship.compression.lora_file import with_deltas
from diffship.compression.lora_write import TrainedLora, write_lora
from diffship.core.weights import MemoryWeights
from diffship.models.parts.unet import condition_names
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.training.adapters import UP, add_lora

SOURCES = ("arch:tiny-sd", "arch:tiny-sdxl")


@pytest.fixture(scope="module", params=SOURCES)
def written(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pipeline, Pipeline, Path]:
    """(source, source with a LoRA, folder of that LoRA): the layers of the lcm pass, random, alpha twice the rank."""
    folder = tmp_path_factory.mktemp("lora")
    source = open_source(request.param)
    unet = source.components["unet"]
    network = unet.module().get_submodule("inner")
    add_lora(network, 4, 8.0, seed=0)
    draw = torch.Generator().manual_seed(1)
    values = {name: value.detach() for name, value in network.named_parameters() if value.requires_grad}
    drawn = {name: torch.randn(value.shape, generator=draw) if UP in name else value for name, value in values.items()}
    lora = TrainedLora(MemoryWeights({name: 0.1 * value.numpy() for name, value in drawn.items()}), 4, 8.0)
    write_lora(lora, folder / "out", "float32", request.param)
    changed = replace(unet, weights=with_deltas(unet.weights, lora.deltas()))
    return source, replace(source, components={**source.components, "unet": changed}), folder / "out"


def answer(network: Any, pipeline: Pipeline) -> np.ndarray[Any, Any]:
    """What diffusers' own U-Net gives for a fixed input."""
    feeds = {name: torch.from_numpy(value) for name, value in pipeline.components["unet"].example(4).items()}
    more = {name: feeds[name] for name in condition_names(pipeline.components["unet"].config)}
    with torch.no_grad():
        out = network(
            feeds["sample"], feeds["timestep"], feeds["encoder_hidden_states"], added_cond_kwargs=more or None
        )
    made: np.ndarray[Any, Any] = out.sample.numpy()
    return made


def of_ours(pipeline: Pipeline) -> np.ndarray[Any, Any]:
    return np.asarray(pipeline.components["unet"].load().run(pipeline.components["unet"].example(4))["out_sample"])


def by_pipeline(stock: Any, folder: Path, file: str) -> Any:
    stock.load_lora_weights(folder, weight_name=file)
    return stock.unet


def by_peft(stock: Any, folder: Path) -> Any:
    return peft.PeftModel.from_pretrained(stock.unet, folder / "peft")


LOADERS: dict[str, Callable[[Any, Path], Any]] = {
    "diffusers": lambda stock, folder: by_pipeline(stock, folder, "pytorch_lora_weights.safetensors"),
    "kohya": lambda stock, folder: by_pipeline(stock, folder / "kohya", "kohya.safetensors"),
    "peft": by_peft,
}


@pytest.mark.slow
def test_stock_clients_add_the_same_change(written: tuple[Pipeline, Pipeline, Path], tmp_path: Path) -> None:
    source, made, folder = written
    saved = save(source, tmp_path / "base")
    wanted, plain = of_ours(made), of_ours(source)
    assert np.abs(wanted - plain).max() > 0.01
    for name, load in LOADERS.items():
        stock = diffusers.DiffusionPipeline.from_pretrained(saved)
        np.testing.assert_allclose(answer(stock.unet, source), plain, atol=1e-4)
        np.testing.assert_allclose(answer(load(stock, folder), source), wanted, atol=2e-4, err_msg=name)


@pytest.mark.slow
def test_the_lora_pass_adds_the_same_change(written: tuple[Pipeline, Pipeline, Path]) -> None:
    source, made, folder = written
    for name in ("pytorch_lora_weights.safetensors", "kohya/kohya.safetensors", "peft/adapter_model.safetensors"):
        fused = compress(source, [LoraPass((str(folder / name),), sampler="lcm")])
        assert fused.history[-1]["layers"] == {"unet": len(layers_of(folder))}, name
        np.testing.assert_allclose(of_ours(fused), of_ours(made), atol=1e-4, err_msg=name)


def layers_of(folder: Path) -> set[str]:
    tensors = load_file(folder / "pytorch_lora_weights.safetensors")
    return {name.removeprefix("unet.").partition(".lora_")[0] for name in tensors}


def test_the_layers_are_those_of_lcm_lora(written: tuple[Pipeline, Pipeline, Path]) -> None:
    """Every linear layer and convolution but the first and the last one and those of the time embeddings."""
    source, _, folder = written
    network = source.components["unet"].meta.get_submodule("inner")
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    every = {name for name, module in network.named_modules() if isinstance(module, kinds)}
    outer = {name for name in every if name.split(".")[0] in ("conv_in", "conv_out", "time_embedding", "add_embedding")}
    assert layers_of(folder) == every - outer and len(outer) in (4, 6)


def test_the_three_files_hold_the_same_tensors(written: tuple[Pipeline, Pipeline, Path]) -> None:
    _, _, folder = written
    first, second, third = (
        load_file(folder / name)
        for name in ("pytorch_lora_weights.safetensors", "peft/adapter_model.safetensors", "kohya/kohya.safetensors")
    )
    assert len(first) == len(second) == 2 * len(layers_of(folder)) and len(third) == 3 * len(first) // 2
    for name, value in first.items():
        layer, _, role = name.removeprefix("unet.").rpartition(".lora_")
        np.testing.assert_array_equal(value, second[f"base_model.model.{layer}.lora_{role}"])
        flat = f"lora_unet_{layer.replace('.', '_')}"
        end = {"A.weight": "lora_down.weight", "B.weight": "lora_up.weight"}[role]
        np.testing.assert_array_equal(value, third[f"{flat}.{end}"])
        assert third[f"{flat}.alpha"] == 4
    config = json.loads((folder / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (4, 4, "LORA")
