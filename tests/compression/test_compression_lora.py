"""LoRA files against peft's and diffusers' own arithmetic, and every way a file can be wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffship.cli.main import main
from diffship.compress import compress
from diffship.compression.lora import LoraPass
from diffship.compression.lora_names import Names, Place, original_names
from diffship.core.errors import ConfigError, SourceError
from diffship.models.parts.unet import UNet
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources import arch_configs as configs
from diffship.models.sources.opening import open_source

Tensors = dict[str, torch.Tensor]
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
CONV = "down_blocks.1.resnets.0.conv1"
TEXT = "text_model.encoder.layers.1.self_attn.q_proj"
# the published target list of LCM-LoRA training
TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"),
    *("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return open_source("arch:tiny-sd")


def pair(pipeline: Pipeline, part: str, layer: str, rank: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    shape = pipeline.components[part].weights.meta(f"{layer}.weight").shape
    draw = torch.Generator().manual_seed(seed)
    tail = (1, 1) if len(shape) == 4 else ()
    down = torch.randn((rank, *shape[1:]), generator=draw) * 0.1
    return down, torch.randn((shape[0], rank, *tail), generator=draw) * 0.1


def by_hand(weight: np.ndarray, down: torch.Tensor, up: torch.Tensor, scale: float) -> np.ndarray:
    """The change as a loop over ranks in float64: a second way to compute it."""
    total = torch.from_numpy(weight.copy()).double()
    for rank in range(down.shape[0]):
        outer = torch.einsum("o,i->oi", up[:, rank].flatten().double(), down[rank].flatten().double())
        total += scale * outer.reshape(total.shape)
    return total.numpy()


# names in the original checkpoints, for one layer a level
ORIGINAL = {
    ATTENTION: "input_blocks.1.1.transformer_blocks.0.attn1.to_q",
    CONV: "input_blocks.4.0.in_layers.2",
}
COMFYUI = {"unet": "diffusion_model", "text_encoder": "clip_l.transformer"}
KOHYA: Callable[[str], str] = lambda layer: layer.replace(".", "_")  # noqa: E731
STYLES: dict[str, Callable[[str, str, torch.Tensor, torch.Tensor], Tensors]] = {
    "kohya": lambda part, layer, down, up: {
        f"lora_{'unet' if part == 'unet' else 'te'}_{KOHYA(layer)}.lora_down.weight": down,
        f"lora_{'unet' if part == 'unet' else 'te'}_{KOHYA(layer)}.lora_up.weight": up,
        f"lora_{'unet' if part == 'unet' else 'te'}_{KOHYA(layer)}.alpha": torch.tensor(float(down.shape[0])),
    },
    "peft": lambda part, layer, down, up: {
        f"{part}.{layer}.lora_A.weight": down,
        f"{part}.{layer}.lora_B.weight": up,
    },
    "peft adapter": lambda part, layer, down, up: {
        f"base_model.model.{part}.{layer}.lora_A.default.weight": down,
        f"base_model.model.{part}.{layer}.lora_B.default.weight": up,
    },
    "diffusers": lambda part, layer, down, up: {
        f"{part}.{layer}.lora.down.weight": down,
        f"{part}.{layer}.lora.up.weight": up,
    },
    "lcm script": lambda part, layer, down, up: {
        f"{part}.base_model.model.{layer}.lora_A.weight": down,
        f"{part}.base_model.model.{layer}.lora_B.weight": up,
    },
    "onetrainer": lambda part, layer, down, up: {
        f"lora_{'unet' if part == 'unet' else 'te1'}.{layer}.lora_down.weight": down,
        f"lora_{'unet' if part == 'unet' else 'te1'}.{layer}.lora_up.weight": up,
    },
    "comfyui": lambda part, layer, down, up: {
        f"{COMFYUI[part]}.{ORIGINAL.get(layer, layer)}.lora_A.weight": down,
        f"{COMFYUI[part]}.{ORIGINAL.get(layer, layer)}.lora_B.weight": up,
    },
    "text encoder": lambda part, layer, down, up: {
        f"{part}.{layer.removeprefix('text_model.')}.lora_linear_layer.down.weight": down,
        f"{part}.{layer.removeprefix('text_model.')}.lora_linear_layer.up.weight": up,
    },
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(("part", "layer"), [("unet", ATTENTION), ("unet", CONV), ("text_encoder", TEXT)])
def test_every_way_of_writing_gives_the_same_change(
    base: Pipeline, style: str, part: str, layer: str, tmp_path: Path
) -> None:
    down, up = pair(base, part, layer)
    save_file(STYLES[style](part, layer, down, up), tmp_path / "lora.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 3}')  # read of peft's
    fused = compress(base, [LoraPass((str(tmp_path / "lora.safetensors"),), (0.7,))])
    before, after = (p.components[part].weights.read(f"{layer}.weight") for p in (base, fused))
    np.testing.assert_allclose(after, by_hand(before, down, up, 0.7), atol=1e-6)
    assert np.abs(after - before).max() > 1e-3
    untouched = [name for name in base.components[part].weights.names() if name != f"{layer}.weight"]
    for name in untouched[::40]:
        assert np.array_equal(fused.components[part].weights.read(name), base.components[part].weights.read(name))


def test_the_old_attention_processors_names(base: Pipeline, tmp_path: Path) -> None:
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    down, up = pair(base, "unet", f"{layer}.to_out.0")
    names = {f"unet.{layer}.processor.to_out_lora.{role}.weight": t for role, t in (("down", down), ("up", up))}
    save_file(names, tmp_path / "old.safetensors")
    fused = compress(base, [LoraPass((str(tmp_path / "old.safetensors"),))]).components["unet"].weights
    before = base.components["unet"].weights.read(f"{layer}.to_out.0.weight")
    np.testing.assert_allclose(fused.read(f"{layer}.to_out.0.weight"), by_hand(before, down, up, 1.0), atol=1e-6)


def test_alpha_scales_and_a_negative_weight_takes_it_back(base: Pipeline, tmp_path: Path) -> None:
    down, up = pair(base, "unet", CONV)
    tensors = STYLES["kohya"]("unet", CONV, down, up)
    tensors[f"lora_unet_{KOHYA(CONV)}.alpha"] = torch.tensor(1.5)
    save_file(tensors, tmp_path / "a.safetensors")
    file, name = str(tmp_path / "a.safetensors"), f"{CONV}.weight"
    before = base.components["unet"].weights.read(name)
    once = compress(base, [LoraPass((file,))]).components["unet"].weights.read(name)
    np.testing.assert_allclose(once, by_hand(before, down, up, 1.5 / 3), atol=1e-6)
    none = compress(base, [LoraPass((file, file), (1.0, -1.0))]).components["unet"].weights.read(name)
    np.testing.assert_allclose(none, before, atol=1e-6)
    zero = compress(base, [LoraPass((file,), (0.0,))]).components["unet"].weights.read(name)
    assert np.array_equal(zero, before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a .peft_config.")  # two adapters are what is asked for
def test_fused_equals_diffusers_with_the_adapter_beside(base: Pipeline, tmp_path: Path) -> None:
    """The oracle: stock diffusers runs two unfused adapters (peft) at once, text encoder and convolution included."""
    from diffusers import StableDiffusionPipeline

    layers = [("unet", ATTENTION), ("unet", CONV), ("text_encoder", TEXT)]
    for number, file in enumerate(("style.safetensors", "lcm.safetensors")):
        tensors: Tensors = {}
        for part, layer in layers:
            tensors |= STYLES["peft"](part, layer, *pair(base, part, layer, rank=4, seed=number))
        save_file(tensors, tmp_path / file)
    theirs = StableDiffusionPipeline.from_pretrained(save(base, tmp_path / "base"))
    for file in ("style", "lcm"):
        theirs.load_lora_weights(tmp_path, weight_name=f"{file}.safetensors", adapter_name=file)
    theirs.set_adapters(["style", "lcm"], [0.8, 1.0])
    files = tuple(str(tmp_path / f"{name}.safetensors") for name in ("style", "lcm"))
    fused = compress(base, [LoraPass(files, (0.8, 1.0))])
    ids = torch.arange(77)[None] % 900
    with torch.no_grad():
        text = theirs.text_encoder(ids)[0]
        feeds = fused.components["unet"].example(0)
        given = {**feeds, "encoder_hidden_states": text.numpy()}
        order = ("sample", "timestep", "encoder_hidden_states")
        (expected,) = theirs.unet(*(torch.from_numpy(np.asarray(given[name])) for name in order), return_dict=False)
    own_text = fused.components["text_encoder"].load().run({"input_ids": ids.numpy()})["last_hidden_state"]
    np.testing.assert_allclose(np.asarray(own_text), text.numpy(), rtol=1e-5, atol=1e-6)
    found = np.asarray(fused.components["unet"].load().run(given)["out_sample"])
    assert np.linalg.norm(found - expected.numpy()) <= 1e-6 * np.linalg.norm(expected.numpy())


def test_kohyas_names_for_sdxl_are_those_of_the_original_checkpoint() -> None:
    with torch.device("meta"):
        module = UNet(dict(configs.UNETS["sdxl"])).inner
    layers = [name.removesuffix(".weight") for name in module.state_dict() if name.endswith(".weight")]
    found = original_names(layers, configs.UNETS["sdxl"])
    by_layer = {layer: name for name, layer in found.items()}
    assert len(by_layer) == len(found)
    # as they stand in published SDXL LoRA files
    for layer, name in {
        "down_blocks.1.attentions.0.transformer_blocks.1.norm1": "input_blocks_4_1_transformer_blocks_1_norm1",
        "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
        "mid_block.attentions.0.transformer_blocks.9.ff.net.2": "middle_block_1_transformer_blocks_9_ff_net_2",
        "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.2": "output_blocks_2_1_transformer_blocks_0_ff_net_2",
        "up_blocks.1.attentions.2.proj_out": "output_blocks_5_1_proj_out",
        "up_blocks.0.upsamplers.0.conv": "output_blocks_2_2_conv",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "down_blocks.0.resnets.0.conv1": "input_blocks_1_0_in_layers_2",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
        "mid_block.resnets.1.time_emb_proj": "middle_block_2_emb_layers_1",
        "add_embedding.linear_1": "label_emb_0_0",
    }.items():
        assert by_layer[layer] == name
    names = Names({"unet": [f"{layer}.weight" for layer in layers]}, configs.UNETS["sdxl"])
    place = names.find("lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_k.lora_down.weight")
    assert place == Place("unet", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k", "down")


@pytest.mark.parametrize(("name", "millions"), [("sd15", 67.25), ("sdxl", 196.75)])
def test_rank_64_on_the_published_targets_has_the_published_size(name: str, millions: float) -> None:
    with torch.device("meta"):
        module = UNet(dict(configs.UNETS[name])).inner
    layers = {
        k.removesuffix(".weight"): tuple(v.shape) for k, v in module.state_dict().items() if k.endswith(".weight")
    }
    chosen = {layer: shape for layer, shape in layers.items() if layer.endswith(tuple(f".{t}" for t in TARGETS))}
    names = Names({"unet": [f"{layer}.weight" for layer in layers]}, configs.UNETS[name])
    assert all(names.find(f"lora_unet_{KOHYA(layer)}.lora_up.weight") for layer in chosen)
    total = sum(64 * (int(np.prod(shape[1:])) + shape[0]) for shape in chosen.values())
    assert total / 1e6 == pytest.approx(millions, abs=0.005)


def test_lcm_lora_records_sampler_steps_and_guidance(base: Pipeline, tmp_path: Path) -> None:
    save_file(STYLES["kohya"]("unet", CONV, *pair(base, "unet", CONV)), tmp_path / "lcm.safetensors")
    step = LoraPass((str(tmp_path / "lcm.safetensors"),), sampler="lcm", steps=6)
    folder = tmp_path / "out"
    compress(base, [step], folder)
    again = open_source(str(folder))
    assert again.scheduler["_class_name"] == "LCMScheduler"
    assert again.scheduler["beta_start"] == base.scheduler["beta_start"]
    assert (again.family.steps_default, again.family.guidance_default) == (6, 1.0)
    (entry,) = again.history
    assert (entry["pass"], entry["files"], entry["layers"]) == ("lora", ["lcm.safetensors"], {"unet": 1})
    assert json.loads((folder / "model_index.json").read_text())["scheduler"] == ["diffusers", "LCMScheduler"]


def _wrong(base: Pipeline) -> dict[str, tuple[Tensors, str]]:
    down, up = pair(base, "unet", ATTENTION)
    kohya = STYLES["kohya"]("unet", ATTENTION, down, up)
    key = f"lora_unet_{KOHYA(ATTENTION)}"
    return {
        "another family": (
            {**kohya, "lora_unet_joint_blocks_0.lora_up.weight": up.clone()},
            r"1 keys \(lora_unet_joint_blocks_0",
        ),
        "dora": ({**kohya, f"{key}.dora_scale": up.clone()}, r"1 keys \(.*dora_scale\) change layers in another way"),
        "bias": (
            {**STYLES["peft"]("unet", ATTENTION, down, up), f"unet.{ATTENTION}.lora_B.bias": up[:, 0].clone()},
            r"1 keys \(.*lora_B.bias\) change layers in another way",
        ),
        "never trained": (STYLES["kohya"]("unet", ATTENTION, down, torch.zeros_like(up)), "changes nothing"),
        "other widths": (STYLES["kohya"]("unet", ATTENTION, down[:, :5].contiguous(), up), "another family"),
        "ranks": (STYLES["kohya"]("unet", ATTENTION, down[:2].contiguous(), up), "ranks differ: down"),
        "half a pair": ({k: v for k, v in kohya.items() if "up" not in k}, "no up matrix"),
        "twice": ({**kohya, f"unet.{ATTENTION}.lora_A.weight": down.clone()}, "are the same tensor of one layer"),
        "textual inversions": (
            {**kohya, "bundle_emb.toy.clip_l": up.clone()},
            r"1 keys \(bundle_emb.*textual inversions that OneTrainer packs",
        ),
        "no tensors": ({}, "has no tensors: its rank is 0, or"),
        "sharded": (
            {f"{key}.lora_down.weight": torch.zeros(0), f"{key}.lora_up.weight": torch.zeros(0)},
            r"2 tensors \(.*\) of no elements",
        ),
        "rank 0": (
            STYLES["kohya"]("unet", ATTENTION, down[:0].contiguous(), up[:, :0].contiguous()),
            r"2 tensors \(.*\) of no elements.*rank is 0",
        ),
        "alpha": ({**kohya, f"{key}.alpha": torch.tensor([float("nan")])}, "is not one number"),
    }


@pytest.mark.parametrize(
    "case",
    [
        *("another family", "dora", "bias", "never trained", "other widths"),
        *("ranks", "half a pair", "twice", "alpha"),
        *("textual inversions", "no tensors", "sharded", "rank 0"),
    ],
)
def test_a_wrong_file_is_refused_before_work(base: Pipeline, case: str, tmp_path: Path) -> None:
    tensors, message = _wrong(base)[case]
    save_file(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(SourceError, match=message):
        compress(base, [LoraPass((str(tmp_path / "lora.safetensors"),))], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_no_file_and_pickles_are_refused(base: Pipeline, tmp_path: Path) -> None:
    for place in (tmp_path / "none.safetensors", tmp_path):
        with pytest.raises(ConfigError, match="is not a file"):
            compress(base, [LoraPass((str(place),))])
    (tmp_path / "lora.safetensors").write_bytes(b"\x80\x02}q\x00.")
    with pytest.raises(SourceError, match="pickle"):
        compress(base, [LoraPass((str(tmp_path / "lora.safetensors"),))])


def test_a_refusal_shortens_its_list_and_ends_its_sentence(base: Pipeline, tmp_path: Path) -> None:
    down, up = pair(base, "unet", ATTENTION)
    layer = f"lora_unet_{KOHYA(ATTENTION)}"
    file = tmp_path / "lora.safetensors"
    marks = {f"{layer}.{'x' * 80}{number}": up.clone() for number in range(9)}
    save_file({**STYLES["kohya"]("unet", ATTENTION, down, up), **marks}, file)
    with pytest.raises(SourceError, match=r"9 keys \(.* and [678] more\) change .* biases and norms cannot be fused\Z"):
        compress(base, [LoraPass((str(file),))])
    save_file({f"{'y' * 400}.lora_up.weight": up.clone()}, file)
    with pytest.raises(SourceError, match=r"1 keys \(y+\.\.\.y+\.lora_up\.weight\) belong to no layer of this model\Z"):
        compress(base, [LoraPass((str(file),))])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"files": ()}, "no LoRA file is given"), ({"files": ("a",), "weights": (1.0, 2.0)}, "2 weights for 1 files")],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraPass(**options)


def test_half_precision_weights_are_changed_in_float32(tmp_path: Path) -> None:
    """2,048 and 1/4 in half precision is 2,048: the change must survive until someone chooses to round it."""
    base = open_source(str(save(open_source("arch:tiny-sd"), tmp_path / "half", dtype="float16")))
    down, up = (torch.full_like(t, 1e-3) for t in pair(base, "unet", ATTENTION, rank=1))
    save_file(STYLES["peft"]("unet", ATTENTION, down, up), tmp_path / "small.safetensors")
    fused = compress(base, [LoraPass((str(tmp_path / "small.safetensors"),))]).components["unet"].weights
    name = f"{ATTENTION}.weight"
    assert fused.meta(name).dtype == "float32"
    change = fused.read(name) - base.components["unet"].weights.read(name).astype(np.float32)
    np.testing.assert_allclose(change, 1e-6, rtol=0.1)


@pytest.mark.slow
def test_the_verb_takes_files_and_weights(base: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "lora.safetensors"
    save_file(STYLES["peft"]("unet", "conv_in", *pair(base, "unet", "conv_in")), file)
    words = ["compress", "arch:tiny-sd", "--pass", "lora", "--set", f"files={file},{file}", "--set", "weights=1,-0.5"]
    assert main([*words, "--dry-run", "--json", "--quiet"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["history"]
    assert (entry["weights"], entry["layers"]) == ([1.0, -0.5], {"unet": 1})


@pytest.mark.slow
def test_layout_and_lora_chain_in_a_recipe(base: Pipeline, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file(STYLES["peft"]("unet", "conv_in", *pair(base, "unet", "conv_in")), tmp_path / "lora.safetensors")
    recipe = tmp_path / "fast.toml"
    recipe.write_text(
        'schema = 1\nsource = "arch:tiny-sd"\n\n[[pass]]\ntype = "layout"\nname = "bk-base"\n\n'
        f'[[pass]]\ntype = "lora"\nfiles = ["{tmp_path / "lora.safetensors"}"]\nsampler = "lcm"\n'
    )
    assert main(["compress", "--recipe", str(recipe), "-o", str(tmp_path / "out"), "--quiet"]) == 0
    capsys.readouterr()
    assert [entry["pass"] for entry in open_source(str(tmp_path / "out")).history] == ["layout", "lora"]


@pytest.mark.parametrize("style", STYLES)
def test_files_without_values_are_refused_by_name(base: Pipeline, style: str, tmp_path: Path) -> None:
    """What a rank of 0 gives, and parameters that lay on several GPUs when they were saved."""
    down, up = torch.zeros(0, 16), torch.zeros(16, 0)
    flat = (torch.zeros(0), torch.zeros(0))
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 3, "lora_alpha": 3}')
    for matrices in ((down, up), flat):
        save_file(STYLES[style]("unet", ATTENTION, *matrices), tmp_path / "empty.safetensors")
        with pytest.raises(SourceError, match=r"empty\.safetensors has 2 tensors \(.*\) of no elements: its rank is 0"):
            compress(base, [LoraPass((str(tmp_path / "empty.safetensors"),))])
    save_file({}, tmp_path / "none.safetensors")
    with pytest.raises(SourceError, match=r"none\.safetensors has no tensors: .* save it again"):
        compress(base, [LoraPass((str(tmp_path / "none.safetensors"),))])
