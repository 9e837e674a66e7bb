from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from diffship.core.errors import RunnerError, SourceError, UnsupportedError
from diffship.core.runner import Runner
from diffship.core.spec import TensorSpec
from diffship.core.weights import MemoryWeights, SeededWeights, renamed, subset
from diffship.models.assemble import assemble
from diffship.models.parts.autoencoder import KL, autoencoder
from diffship.models.parts.clip import clip_text_config, text_encoder
from diffship.models.parts.clip_names import end_id
from diffship.models.parts.component import Component, read_tensor, unexpected, unused, weight_metas
from diffship.models.parts.unet import unet
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import find_material, open_source, with_base
from diffship.models.walks.stages import cut
from diffship.runtimes.engines.model import open_model


@cache
def pipeline(name: str) -> Pipeline:
    return open_source(f"arch:{name}")


def part(name: str, which: str) -> Component:
    return pipeline(name).components[which]


def state(*components: Component) -> dict[str, torch.Tensor]:
    return {name: read_tensor(c.weights, name) for c in components for name in c.weights.names()}


def difference(a: Any, b: torch.Tensor) -> float:
    return float(np.abs(np.asarray(a) - b.numpy()).max())


def stock_unet(component: Component) -> UNet2DConditionModel:
    model = UNet2DConditionModel.from_config(dict(component.config)).eval()
    model.load_state_dict(state(component))
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-inpaint", "tiny-lcm", "tiny-sdxl", "tiny-sdxl+lcm", "tiny-refiner"])
def test_unet_equals_diffusers(name: str) -> None:
    component = part(name, "unet")
    feeds = component.example(1, {"batch_size": 2})
    tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
    added = {key: tensors[key] for key in ("text_embeds", "time_ids") if key in tensors}
    with torch.no_grad():
        expected = stock_unet(component)(
            tensors["sample"],
            tensors["timestep"],
            tensors["encoder_hidden_states"],
            timestep_cond=tensors.get("timestep_cond"),
            added_cond_kwargs=added or None,
        ).sample
    assert difference(component.load().run(feeds)["out_sample"], expected) < 1e-5  # kernels differ with alignment


@pytest.mark.parametrize(("name", "which"), [("tiny-sd", "text_encoder"), ("tiny-sdxl", "text_encoder")])
def test_text_encoder_equals_transformers(name: str, which: str) -> None:
    component = part(name, which)
    model = CLIPTextModel(clip_text_config(component.config)).eval()
    model.load_state_dict({key.removeprefix("text_model."): value for key, value in state(component).items()})
    check_text(component, model, "pooler_output")


def test_projected_text_encoder_equals_transformers() -> None:
    component = part("tiny-sdxl", "text_encoder_2")
    assert component.config["eos_token_id"] == 999
    model = CLIPTextModelWithProjection(clip_text_config(component.config)).eval()
    model.load_state_dict(state(component))
    check_text(component, model, "text_embeds")


def check_text(component: Component, model: torch.nn.Module, pooled: str) -> None:
    feeds = component.example(2, {"batch_size": 3})
    outputs = component.load().run(feeds)
    with torch.no_grad():
        expected = model(torch.from_numpy(feeds["input_ids"]), output_hidden_states=True)
    assert difference(outputs["last_hidden_state"], expected.last_hidden_state) < 1e-6
    assert difference(outputs[pooled], expected[pooled]) < 1e-6
    states = [name for name in outputs if name.startswith("hidden_states.")]
    assert len(states) in (0, len(expected.hidden_states))
    for i in range(len(states)):
        assert difference(outputs[f"hidden_states.{i}"], expected.hidden_states[i]) < 1e-6


def test_order_of_text_outputs() -> None:
    names = [[spec.name for spec in part("tiny-sdxl", which).outputs] for which in ("text_encoder", "text_encoder_2")]
    assert names[0] == ["last_hidden_state", "pooler_output", *(f"hidden_states.{i}" for i in range(3))]
    assert names[1] == ["text_embeds", "last_hidden_state", *(f"hidden_states.{i}" for i in range(4))]


def test_kl_auto_encoder_equals_diffusers() -> None:
    encoder, decoder = part("tiny-sd", "vae_encoder"), part("tiny-sd", "vae_decoder")
    model = AutoencoderKL.from_config(dict(encoder.config)).eval()
    model.load_state_dict(state(encoder, decoder))
    image, latent = encoder.example(3), decoder.example(3)
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(image["sample"])).latent_dist
        picture = model.decode(torch.from_numpy(latent["latent_sample"])).sample
    assert difference(encoder.load().run(image)["latent_parameters"], posterior.parameters) == 0
    assert difference(decoder.load().run(latent)["sample"], picture) == 0
    assert np.abs(image["sample"]).max() <= 1


def test_tiny_auto_encoder_equals_diffusers() -> None:
    encoder, decoder = part("tiny-sd+taesd", "vae_encoder"), part("tiny-sd+taesd", "vae_decoder")
    model = AutoencoderTiny.from_config(dict(encoder.config)).eval()
    model.load_state_dict(state(encoder, decoder))
    image, latent = encoder.example(3), decoder.example(3)
    with torch.no_grad():
        latents = model.encode(torch.from_numpy(image["sample"])).latents
        picture = model.decode(torch.from_numpy(latent["latent_sample"])).sample
    assert difference(encoder.load().run(image)["latent_parameters"], latents) == 0
    assert difference(decoder.load().run(latent)["sample"], picture) == 0


def test_auto_encoder_without_quant_convolutions_and_with_old_attention_names() -> None:
    config = {**part("tiny-sd", "vae_encoder").config, "use_quant_conv": False, "use_post_quant_conv": False}
    model = AutoencoderKL.from_config(config).eval()
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    arrays = {}
    for name, tensor in model.state_dict().items():
        for new, was in old.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{was}.")
        arrays[name] = tensor.numpy()
    assert any(".query." in name for name in arrays)
    encoder, decoder = autoencoder(KL, config, MemoryWeights(arrays))
    latent = decoder.example(1)
    with torch.no_grad():
        expected = model.decode(torch.from_numpy(latent["latent_sample"])).sample
    assert difference(decoder.load().run(latent)["sample"], expected) == 0
    assert not [name for name in encoder.weights.names() if "query" in name or "quant_conv" in name]


def test_reduced_unet_without_mid_block_and_with_nested_layers() -> None:
    config = {
        **part("tiny-sdxl", "unet").config,
        "mid_block_type": None,
        "layers_per_block": 1,
        "transformer_layers_per_block": [1, [2], [3]],
        "reverse_transformer_layers_per_block": [[3, 1], [2, 1], 1],
    }
    empty = UNet2DConditionModel.from_config(config).eval()
    assert empty.mid_block is None
    arrays = {name: tensor.numpy() for name, tensor in empty.state_dict().items()}
    component = unet(config, MemoryWeights(arrays))
    feeds = component.example(1)
    tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
    with torch.no_grad():
        expected = empty(
            tensors["sample"], tensors["timestep"], tensors["encoder_hidden_states"], added_cond_kwargs=tensors
        ).sample
    assert difference(component.load().run(feeds)["out_sample"], expected) < 1e-5  # kernels differ with alignment


def test_text_encoder_reads_both_name_forms() -> None:
    component = part("tiny-sd", "text_encoder")
    bare = {name.removeprefix("text_model."): name for name in component.weights.names()}
    new_form = renamed(component.weights, bare)
    arrays = {name: new_form.read(name) for name in new_form.names()}
    arrays["embeddings.position_ids"] = np.arange(77)[None]
    again = text_encoder("text_encoder", "CLIPTextModel", component.config, MemoryWeights(arrays), False)
    assert again.digest == component.digest
    assert all(name.startswith("text_model.") for name in again.weights.names())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl", "tiny-lcm", "tiny-inpaint", "tiny-refiner", "tiny-sd+taesd"])
def test_half_precision_is_finite_and_near(name: str) -> None:
    for component in pipeline(name).components.values():
        feeds = component.example(4)
        single, half = component.load().run(feeds), component.load(dtype="float16").run(feeds)
        for key, value in single.items():
            assert half[key].dtype == np.float16
            assert 0.01 < value.std() < 10, key
            assert np.abs(half[key] - value).max() < 0.02 * max(np.abs(value).max(), 1), key


def test_weights_names_are_the_state_dict_of_the_meta_module() -> None:
    for component in pipeline("tiny-sdxl").components.values():
        module = component.meta
        assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
        assert list(weight_metas(module)) == list(component.weights.names())
        assert all(name.startswith("inner.") for name in module.state_dict())


@pytest.mark.slow
def test_test_sizes_are_small_and_shaped_like_the_big_ones() -> None:
    small, big = pipeline("tiny-sd"), pipeline("sd15")
    assert sum(w.meta(n).count for w in (c.weights for c in small.components.values()) for n in w.names()) < 1_000_000
    assert list(part("tiny-sd", "unet").weights.names()) == list(part("sd15", "unet").weights.names())
    assert (
        list(part("tiny-sd", "vae_decoder").weights.names())[:3]
        == list(part("sd15", "vae_decoder").weights.names())[:3]
    )
    assert small.family.size_step == big.family.size_step == 64


def test_feeds_are_checked_before_the_engine() -> None:
    component = part("tiny-sd", "unet")
    runner = component.load()
    feeds = component.example(0, {"batch_size": 2})
    with pytest.raises(RunnerError, match="missing timestep"):
        runner.run({key: value for key, value in feeds.items() if key != "timestep"})
    with pytest.raises(RunnerError, match="unknown steps"):
        runner.run({**feeds, "steps": feeds["timestep"]})
    with pytest.raises(RunnerError, match="encoder_hidden_states"):
        runner.run({**feeds, "encoder_hidden_states": feeds["encoder_hidden_states"][:, :, :8]})
    with pytest.raises(RunnerError, match="timestep"):
        runner.run({**feeds, "timestep": np.ones(3, np.float32)})
    with pytest.raises(RunnerError, match="int64"):
        part("tiny-sd", "text_encoder").load().run({"input_ids": np.ones((1, 77), np.float32)})
    runner.close()
    with pytest.raises(RunnerError, match="closed"):
        runner.run(feeds)


def test_runner_keeps_the_kind_of_array_and_takes_one_timestep_for_all() -> None:
    component = part("tiny-sd", "unet")
    runner = component.load()
    assert isinstance(runner, Runner)
    feeds = component.example(0, {"batch_size": 2})
    feeds["timestep"] = np.full(2, 500, np.float32)
    expected = runner.run(feeds)["out_sample"]
    text = runner.put(feeds["encoder_hidden_states"])
    for timestep in (np.float32(500), np.array([500], np.float32), np.array(500, np.int64)):
        got = runner.run({**feeds, "timestep": timestep, "encoder_hidden_states": text})["out_sample"]
        assert isinstance(got, np.ndarray)
        assert np.array_equal(got, expected)
    tensors = {key: torch.from_numpy(value) for key, value in feeds.items()}
    got = runner.run(tensors)["out_sample"]
    assert isinstance(got, torch.Tensor)
    assert difference(expected, got) == 0


def test_loading_names_what_is_wrong_with_the_weights() -> None:
    component = part("tiny-sd", "unet")
    short = unet(component.config, subset(component.weights, component.weights.names()[:-1]))
    with pytest.raises(SourceError, match="1 tensors are missing"):
        short.load()
    metas = weight_metas(component.meta)
    name = next(iter(metas))
    metas[name] = type(metas[name])("float32", (1, *metas[name].shape[1:]))
    with pytest.raises(SourceError, match="its config asks for"):
        unet(component.config, SeededWeights(metas, 0)).load()


@pytest.mark.parametrize(
    "change",
    [
        {"class_embed_type": "timestep"},
        {"addition_embed_type": "image"},
        {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
        {"down_block_types": ["KDownBlock2D"] * 4},
    ],
)
def test_foreign_unets_are_refused(change: dict[str, Any]) -> None:
    component = part("tiny-sd", "unet")
    with pytest.raises(UnsupportedError, match="unet: "):
        unet({**component.config, **change}, component.weights)


def test_widths_of_another_version_are_refused() -> None:
    component = part("tiny-sd", "unet")
    with pytest.raises(SourceError, match="unknown key 'layout'"):
        unet({**component.config, "diffship": {"layout": {}}}, component.weights)


def test_examples_are_equal_for_equal_seeds() -> None:
    component = part("tiny-sdxl", "unet")
    first, second = component.example(5, {"batch_size": 2}), component.example(5, {"batch_size": 2})
    assert all(np.array_equal(first[key], second[key]) for key in first)
    assert list(first["timestep"]) == [999, 500]
    assert first["time_ids"].shape == (2, 6)
    ids = part("tiny-sd", "text_encoder").example(0, {"batch_size": 8})["input_ids"]
    assert ids.min() >= 0 and ids.max() == 999 and (ids[:, 0] == 998).all() and (ids[:, -1] == 999).all()


@pytest.mark.parametrize("which", ["text_encoder", "text_encoder_2"])
@pytest.mark.parametrize("end", [None, 2, 990])
def test_whole_and_stages_and_transformers_agree_on_the_end_token(which: str, end: int | None) -> None:
    given = part("tiny-sdxl", which)
    config = {key: value for key, value in given.config.items() if key != "eos_token_id"}
    config |= {"vocab_size": 49410 if end is None else given.config["vocab_size"]}
    if end is not None:
        config["eos_token_id"] = end
    empty = text_encoder(which, given.class_name, config, given.weights, True)
    component = text_encoder(which, given.class_name, config, SeededWeights(weight_metas(empty.meta), 3), True)
    feeds = component.example(0, {"batch_size": 2})
    whole, values = component.load().run(feeds), dict(feeds)
    for stage in cut(component, ["text_model.encoder.layers.0"]):
        values.update(stage.load().run({spec.name: values[spec.name] for spec in stage.inputs}))
    kind = CLIPTextModelWithProjection if which == "text_encoder_2" else CLIPTextModel
    stock = kind(CLIPTextConfig(**config)).eval()
    stock.load_state_dict(stock_names(state(component), stock))
    with torch.no_grad():
        expected = stock(torch.from_numpy(feeds["input_ids"]))
    name = "text_embeds" if which == "text_encoder_2" else "pooler_output"
    assert difference(whole[name], getattr(expected, name)) < 1e-5
    assert np.abs(whole[name] - values[name]).max() < 1e-5


def stock_names(tensors: dict[str, torch.Tensor], stock: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Classic names as this version of transformers has them."""
    known = stock.state_dict()
    return {name if name in known else name.removeprefix("text_model."): value for name, value in tensors.items()}


def test_the_end_token_of_a_config_without_one_is_that_of_transformers() -> None:
    assert end_id({}) == CLIPTextConfig().eos_token_id == end_id({"eos_token_id": None})


class _Computed(torch.nn.Module):
    """A part with a table that is computed when it is made, and lies in no file."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = torch.nn.Linear(2, 2)
        self.register_buffer("table", torch.full((2,), 3.0), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.inner(x) * self.table,)


def _linear(build: Any, **more: np.ndarray) -> Component:
    arrays = {"weight": np.eye(2, dtype=np.float32), "bias": np.zeros(2, np.float32), **more}
    ports = [(TensorSpec(name, "float32", ("b", 2)),) for name in ("x", "y")]
    return Component("part", "Part", {}, build, MemoryWeights(arrays), *ports, {"b": 1})


def test_a_buffer_that_no_file_holds_is_computed_from_the_config() -> None:
    with _linear(_Computed).load() as runner:
        out = runner.run({"x": np.array([[1, 2]], np.float32)})["y"]
    assert np.array_equal(out, np.array([[3, 6]], np.float32))


def test_training_a_part_leaves_its_source_alone() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = torch.nn.Linear(2, 2)

    component = _linear(Plain, extra=np.ones(3, np.float32))
    module = component.module()
    with torch.no_grad():
        module.inner.weight.add_(5)
    assert np.array_equal(component.weights.read("weight"), np.eye(2))
    assert unexpected(component.meta, component.weights) == ["extra"]
    assert unused([component]) == ["part does not take 1 tensors of its weight files: extra"]


@pytest.mark.slow
def test_a_model_on_torch_tells_of_tensors_that_no_part_takes(tmp_path: Path) -> None:
    whole = pipeline("tiny-sd")
    text = whole.components["text_encoder"]
    extra = MemoryWeights({**{n: text.weights.read(n) for n in text.weights.names()}, "stray": np.ones(1, np.float32)})
    save(replace(whole, components={**whole.components, "text_encoder": replace(text, weights=extra)}), tmp_path / "m")
    with open_model(tmp_path / "m") as model:
        assert model.notes == ("text_encoder does not take 1 tensors of its weight files: stray",)
    with open_model("arch:tiny-sd") as model:
        assert model.notes == ()


def test_a_base_fits_a_unet_that_lists_its_text_width_by_block() -> None:
    whole = find_material("arch:tiny-sd", None)
    unet_module = whole.modules["unet"]
    listed = replace(unet_module, config={**unet_module.config, "cross_attention_dim": [32] * 4})
    alone = replace(whole, modules={"unet": listed}, tokenizers={}, scheduler=None, index={})
    made = assemble(with_base(alone, whole))
    assert made.family.text_width == 32 and set(made.components) >= {"text_encoder", "unet", "vae_decoder"}
