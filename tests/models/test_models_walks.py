"""The walk of a part: layer by layer it computes, bit for bit, what the library's own module computes as a whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, Flux2Transformer2DModel, SD3Transformer2DModel
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from diffship.core.errors import ConfigError, SourceError
from diffship.core.weights import MemoryWeights
from diffship.kinds.flux2 import image_places, rope_angles, text_places
from diffship.models.parts.autoencoder import KL, autoencoder
from diffship.models.parts.clip import PROJECTED, text_encoder
from diffship.models.parts.component import Component
from diffship.models.parts.flux2 import flux2_transformer
from diffship.models.parts.program import Tree
from diffship.models.parts.qwen3 import qwen3_encoder
from diffship.models.parts.sd3 import sd3_transformer
from diffship.models.parts.t5 import t5_encoder
from diffship.models.walks.blocks import layers
from diffship.models.walks.cost import cost, layer_costs
from diffship.models.walks.stages import cut, memory_stages

Arrays = dict[str, np.ndarray]
SD3 = {
    "sample_size": 8, "patch_size": 2, "in_channels": 16, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "joint_attention_dim": 32, "caption_projection_dim": 32, "pooled_projection_dim": 24,
    "out_channels": 16, "pos_embed_max_size": 12,
}  # fmt: skip
SD35 = {**SD3, "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"}
FLUX2 = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 24, "axes_dims_rope": [4, 4, 4, 4], "guidance_embeds": False,
    "timestep_guidance_channels": 16,
}  # fmt: skip
QWEN3 = {"vocab_size": 99, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 5, "head_dim": 8,
         "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}  # fmt: skip
T5 = {"vocab_size": 99, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4,
      "relative_attention_num_buckets": 8, "feed_forward_proj": "gated-gelu"}  # fmt: skip
CLIP = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "projection_dim": 24, "hidden_act": "quick_gelu", "eos_token_id": 98}  # fmt: skip
VAE = {"block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2, "latent_channels": 16,
       "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "norm_num_groups": 4, "shift_factor": 0.0609,
       "use_quant_conv": False, "use_post_quant_conv": False}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A part, feeds for it, and what the library's own class gives for them."""

    part: Component
    feeds: Arrays
    expected: dict[str, torch.Tensor]


def case(part: Component, sizes: dict[str, int], stock: Callable[..., Any], names: dict[str, str]) -> Case:
    feeds = part.example(1, sizes)
    with torch.no_grad():
        given = stock(*(torch.from_numpy(array) for array in feeds.values()))
    return Case(part, feeds, {name: eval_path(given, path) for name, path in names.items()})


def eval_path(value: Any, path: str) -> torch.Tensor:
    for step in path.split("."):
        value = value[int(step)] if step.isdigit() else getattr(value, step)
    assert isinstance(value, torch.Tensor)
    return value


def arrays(module: torch.nn.Module) -> MemoryWeights:
    return MemoryWeights({name: tensor.numpy() for name, tensor in module.state_dict().items()})


def transformer(config: dict[str, Any]) -> Case:
    stock = SD3Transformer2DModel.from_config(config).eval()
    part = sd3_transformer(config, arrays(stock))
    return case(part, {"batch_size": 2, "height": 8, "width": 12}, stock, {"out_hidden_states": "sample"})


def t5() -> Case:
    stock = T5EncoderModel(T5Config(**T5)).eval()
    with torch.no_grad():  # initialised with such small values that all positions weigh alike
        stock.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.normal_()
    part = t5_encoder("text_encoder_3", T5, arrays(stock))
    return case(part, {"batch_size": 2, "sequence_length": 21}, stock, {"last_hidden_state": "last_hidden_state"})


def flux2() -> Case:
    stock = Flux2Transformer2DModel.from_config(FLUX2).eval()
    part = flux2_transformer("transformer", FLUX2, arrays(stock))
    feeds = part.example(1, {"batch_size": 2, "image_tokens": 15, "sequence_length": 9})
    sides = {"image": image_places((16, 3, 5)), "text": text_places(9)}
    for side, places in sides.items():
        for wave, turn in (("cos", np.cos), ("sin", np.sin)):
            feeds[f"{side}_rope_{wave}"] = turn(rope_angles(places, 16)).astype(np.float32)
    feeds["timestep"] = np.array([500, 250], np.float32)  # thousands of these are exact in float32
    ids = [torch.from_numpy(sides[side]) for side in ("image", "text")]
    latents, text, times = (torch.from_numpy(feeds[spec.name]) for spec in part.inputs[:3])
    with torch.no_grad():
        (given,) = stock(latents, text, times / 1000, *ids, return_dict=False)
    return Case(part, feeds, {"out_hidden_states": given})


def qwen3() -> Case:
    stock = Qwen3ForCausalLM(Qwen3Config(**QWEN3)).eval()
    read = ("model.embed_tokens.", *(f"model.layers.{i}." for i in range(4)))
    state = {name: tensor.numpy() for name, tensor in stock.state_dict().items() if name.startswith(read)}
    part = qwen3_encoder("text_encoder", {**QWEN3, "diffship": {"layers": [1, 2, 4]}}, MemoryWeights(state))
    feeds = part.example(1, {"batch_size": 2, "sequence_length": 21})
    feeds["attention_mask"] = (np.arange(21) < np.array([[21], [6]])).astype(np.int64)
    ids, mask = (torch.from_numpy(array) for array in feeds.values())
    with torch.no_grad():
        states = stock(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    return Case(part, feeds, {"prompt_embeds": torch.cat([states[i] for i in (1, 2, 4)], -1)})


def clip() -> Case:
    stock = CLIPTextModelWithProjection(CLIPTextConfig(**CLIP)).eval()
    part = text_encoder("text_encoder", PROJECTED, CLIP, arrays(stock), True)
    states = {f"hidden_states.{i}": f"hidden_states.{i}" for i in range(4)}
    names = {"text_embeds": "text_embeds", "last_hidden_state": "last_hidden_state", **states}
    return case(part, {"batch_size": 2}, lambda ids: stock(ids, output_hidden_states=True), names)


def vae(half: int) -> Case:
    stock = AutoencoderKL.from_config(VAE).eval()
    part = autoencoder(KL, VAE, arrays(stock), 16)[half]
    if half == 0:
        return case(
            part, {"batch_size": 2, "sample_width": 24}, stock.encode, {"latent_parameters": "latent_dist.parameters"}
        )
    return case(part, {"batch_size": 2, "latent_width": 12}, stock.decode, {"sample": "sample"})


CASES: dict[str, Callable[[], Case]] = {
    "sd3": lambda: transformer(SD3),
    "sd3.5": lambda: transformer(SD35),
    "t5": t5,
    "flux.2": flux2,
    "qwen3": qwen3,
    "clip with projection": clip,
    "16 channel encoder": lambda: vae(0),
    "16 channel decoder": lambda: vae(1),
}


@cache
def made(name: str) -> Case:
    torch.manual_seed(7)
    return CASES[name]()


def tensors(one: Case) -> dict[str, Any]:
    """The feeds as torch has them: an array may lie at another alignment, and convolutions then round otherwise."""
    return {name: torch.from_numpy(array) for name, array in one.feeds.items()}


def differing(got: dict[str, Any], one: Case) -> list[str]:
    """Outputs that are not bit for bit what the library's own module gave."""
    return [name for name, value in one.expected.items() if not torch.equal(got[name], value)]


@pytest.mark.parametrize("name", CASES)
def test_whole_and_all_cuts_equal_the_librarys_own_module(name: str) -> None:
    one = made(name)
    assert list(one.expected) == [spec.name for spec in one.part.outputs]
    assert all(float(value.std()) > 0.01 for value in one.expected.values())
    assert not differing(one.part.load().run(tensors(one)), one)
    values = tensors(one)
    stages = cut(one.part, layers(one.part)[:-1])
    for stage in stages:
        values.update(stage.load().run({spec.name: values[spec.name] for spec in stage.inputs}))
    assert len(stages) == len(layers(one.part)) > 3
    assert not differing(values, one)


@pytest.mark.parametrize("name", CASES)
def test_every_single_cut_composes(name: str) -> None:
    one = made(name)
    inner = one.part.module().get_submodule("inner")
    for at in layers(one.part)[:-1]:
        values = tensors(one)
        for stage in cut(one.part, [at], embed="recompute"):
            assert stage.over is not None
            with torch.no_grad():
                written = stage.over(inner)(*(values[spec.name] for spec in stage.inputs))
            values.update(zip((spec.name for spec in stage.outputs), written, strict=True))
        assert not differing(values, one), at


@pytest.mark.parametrize("name", CASES)
def test_specs_between_layers_and_costs_of_layers_are_those_of_the_whole(name: str) -> None:
    one = made(name)
    program = one.part.program()
    tree = Tree(one.part.module().get_submodule("inner"))
    bound: dict[str, int] = {}
    for spec in one.part.inputs:
        bound = spec.bind(one.feeds[spec.name].shape, bound)
    values = tensors(one)
    for layer in program.layers:
        with torch.no_grad():
            written = layer.apply(tree, *(values[key] for key in layer.reads))
        values.update(zip(layer.writes, written, strict=True))
    assert {key: tuple(value.shape) for key, value in values.items()} == {
        key: program.specs[key].resolve(bound) for key in values
    }
    whole, parts = cost(one.part), layer_costs(one.part).values()
    assert whole.macs == sum(part.macs for part in parts) > 0
    assert whole.params == sum(part.params for part in parts)
    assert whole.bytes == sum(part.bytes for part in parts) == 4 * one.part.parameters


def test_a_table_of_positions_counts_where_memory_is_bounded() -> None:
    part = made("sd3").part
    table = 4 * 12 * 12 * 32
    assert cost(part).bytes - 4 * cost(part).params == table
    with pytest.raises(ConfigError, match=r"pos_embed alone takes \d+ bytes"):
        memory_stages(part, table)


@pytest.mark.parametrize("stored", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_has_one_table_of_tokens_whichever_name_a_file_has(stored: str) -> None:
    part = made("t5").part
    named = {name: part.weights.read(name) for name in part.weights.names()}
    named[stored] = named.pop("shared.weight")
    again = t5_encoder("text_encoder_3", T5, MemoryWeights({**named, "decoder.final_layer_norm.weight": np.ones(32)}))
    assert again.digest == part.digest
    assert set(again.weights.names()) == {name.removeprefix("inner.") for name in again.meta.state_dict()}


def test_a_config_that_is_none_of_an_mmdit_is_refused() -> None:
    weights = made("sd3").part.weights
    with pytest.raises(SourceError, match="no number for joint_attention_dim, pos_embed_max_size"):
        sd3_transformer({"in_channels": 16, "pooled_projection_dim": 24, "pos_embed_max_size": None}, weights)
