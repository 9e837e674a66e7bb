"""Checkpoints in one file: the same model as the diffusers folder, by names that an independent writer gives them."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ldm_writer as writer
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs

from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.load_options import LoadOptions
from diffship.core.registry import kinds
from diffship.core.weights import TensorMeta, Weights
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources import arch_configs as configs
from diffship.models.sources.ldm.checkpoint import Checkpoint
from diffship.models.sources.opening import find_material, open_source
from diffship.models.sources.single_file import _left

Tensors = dict[str, Any]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
KINDS = ("tiny-sd", "tiny-sdxl", "tiny-refiner", "tiny-inpaint", "tiny-lcm")


@cache
def arch(name: str) -> Pipeline:
    return open_source(f"arch:{name}")


@cache
def tensors(name: str) -> Tensors:
    return writer.checkpoint(arch(name))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("files")


def file_of(folder: Path, name: str, **kwargs: Any) -> Path:
    path = folder / f"{name}.safetensors"
    return path if path.exists() else writer.write(path, tensors(name), **kwargs)


def changed(tmp_path: Path, more: Mapping[str, Any], without: str = "\0", metadata: Any = None) -> Path:
    """tiny-sd as one file with other tensors beside its own, or without those of a prefix."""
    kept = {name: array for name, array in tensors("tiny-sd").items() if not name.startswith(without)}
    return writer.write(tmp_path / "changed.safetensors", {**kept, **more}, metadata)


def digests(pipeline: Pipeline) -> dict[str, str]:
    return {name: part.digest for name, part in pipeline.components.items()}


@cache
def drawn(name: str) -> dict[str, str]:
    """The digests of an architecture, whose weights are drawn anew each time."""
    return digests(arch(name))


# ---- the same model


@pytest.mark.parametrize("name", [*KINDS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in KINDS[2:])])
def test_a_file_is_the_model_that_its_folder_is(name: str, folder: Path) -> None:
    made, expected = open_source(str(file_of(folder, name))), arch(name)
    assert digests(made) == drawn(name)
    assert (made.family, made.model_index, made.tokenizers) == (
        expected.family,
        expected.model_index,
        expected.tokenizers,
    )
    for part in expected.components:
        assert made.components[part].config == expected.components[part].config
    assert made.scheduler["_class_name"] == expected.scheduler["_class_name"]
    assert made.source == {"id": name, "revision": None, "kind": "file"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
def test_both_export_to_the_same_bytes(name: str, folder: Path, tmp_path: Path) -> None:
    from diffship.core.job import Job
    from diffship.export import export

    job = Job(tmp_path / "cache")
    saved = save(arch(name), tmp_path / name)
    kept = {"verify": False, "job": job}
    ours = export(str(file_of(folder, name)), out=tmp_path / "file", **kept)  # type: ignore[arg-type]
    wanted = export(str(saved), out=tmp_path / "folder", **kept)  # type: ignore[arg-type]
    found = sorted(path.relative_to(wanted.path) for path in wanted.path.rglob("*.onnx*"))
    assert sum(path.suffix == ".onnx_data" for path in found) == len(arch(name).components)
    for path in found:
        assert (ours.path / path).read_bytes() == (wanted.path / path).read_bytes(), path


# ---- names, against diffusers' own loader


def converted(name: str) -> dict[str, dict[str, Any]]:
    """What diffusers' converters make of the file, by part."""
    whole = {key: torch.from_numpy(np.array(value)) for key, value in tensors(name).items()}
    parts = arch(name).components
    second = {"tiny-sdxl": "conditioner.embedders.1.model.", "tiny-refiner": "conditioner.embedders.0.model."}
    made = {
        "unet": theirs.convert_ldm_unet_checkpoint(dict(whole), dict(parts["unet"].config)),
        "vae": theirs.convert_ldm_vae_checkpoint(dict(whole), dict(parts["vae_decoder"].config)),
    }
    if "text_encoder" in parts:
        made["text_encoder"] = theirs.convert_ldm_clip_checkpoint(dict(whole))
    if name in second:
        made["text_encoder_2"] = theirs.convert_open_clip_checkpoint(
            SimpleNamespace(config=SimpleNamespace()), dict(whole), second[name]
        )
    return made


@pytest.mark.parametrize("name", ["tiny-sd", "tiny-refiner"])
def test_names_and_values_are_those_of_diffusers_converters(name: str, folder: Path) -> None:
    modules = find_material(str(file_of(folder, name))).modules
    for part, wanted in converted(name).items():
        wanted = {key: value for key, value in wanted.items() if not key.endswith("position_ids")}
        weights = modules[part].weights
        assert set(weights.names()) == set(wanted)
        for key in wanted:
            assert np.array_equal(weights.read(key), wanted[key].numpy()), key


class Shapes:
    """Weights of which only names and shapes are known; what is read is zeros."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.shapes = dict(shapes)

    @property
    def nbytes(self) -> int:
        return 0

    def names(self) -> tuple[str, ...]:
        return tuple(self.shapes)

    def meta(self, name: str) -> TensorMeta:
        return TensorMeta("float32", self.shapes[name])

    def read(self, name: str) -> Any:
        return np.zeros(self.shapes[name], np.float32)


def blank(weights: Weights) -> Any:
    """A `read` whose arrays take no memory."""
    return lambda name: np.broadcast_to(np.float32(0), weights.meta(name).shape)


# tensors of the U-Net in the state dict of diffusers, from the published config
FULL = {"sd15": 686, "sd21": 686, "sdxl": 1680, "sdxl-refiner": 1220, "sd15-inpaint": 686}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_no_tensor_of_a_published_checkpoint_is_left_or_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = arch(name)
    for part in pipeline.components.values():
        monkeypatch.setattr(type(part.weights), "read", lambda self, name: blank(self)(name))
    whole = {key: value.shape for key, value in writer.checkpoint(pipeline, dtype=None).items()}
    assert sum(key.startswith(UNET) for key in whole) == FULL[name]
    config = pipeline.denoiser.config
    metas = {key: torch.empty(shape, device="meta") for key, shape in whole.items()}
    unet = {name: tuple(t.shape) for name, t in theirs.convert_ldm_unet_checkpoint(metas, dict(config)).items()}
    checkpoint = Checkpoint(Path("full.safetensors"), Shapes(whole))
    material = next(found for kind in kinds().values() if (found := kind.of_checkpoint(checkpoint)))
    weights = material.modules["unet"].weights
    assert {key: weights.meta(key).shape for key in weights.names()} == unet
    expected = find_material(f"arch:{name}")
    assert set(material.modules) == set(expected.modules)
    for part, module in expected.modules.items():
        ours = material.modules[part].weights
        wanted = {key: module.weights.meta(key).shape for key in module.weights.names()}
        assert {key: ours.meta(key).shape for key in ours.names()} == wanted, part
    ours, wanted = material.modules["unet"].config, expected.modules["unet"].config
    assert {key for key in wanted if ours[key] != wanted[key]} <= _BY_PREDICTION
    assert _left(checkpoint, material, tuple(pipeline.family.kind.file_texts.values())) == []


_BY_PREDICTION = {"sample_size", "upcast_attention"}  # zeros do not spread, so SD 2 is taken for its base model


# ---- half and quarter precision, one tensor at a time


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
def test_narrow_tensors_stay_as_they_are(dtype: torch.dtype, tmp_path: Path) -> None:
    import safetensors.torch

    texts = {key: torch.from_numpy(a) for key, a in tensors("tiny-sdxl").items() if a.dtype.kind == "f"}
    stored = {key: value.to(dtype) for key, value in texts.items()}
    safetensors.torch.save_file(stored, tmp_path / "narrow.safetensors")
    made = open_source(str(tmp_path / "narrow.safetensors"))
    weights = made.components["text_encoder_2"].weights
    assert {weights.meta(name).dtype for name in weights.names()} == {str(dtype).removeprefix("torch.")}
    fused = stored["conditioner.embedders.1.model.transformer.resblocks.1.attn.in_proj_weight"]
    width = fused.shape[1]
    key = weights.read("text_model.encoder.layers.1.self_attn.k_proj.weight")
    assert key.tobytes() == fused[width : 2 * width].contiguous().view(torch.uint8).numpy().tobytes()
    assert key.base is None or key.base.nbytes == key.nbytes  # the fused matrix is not kept alive
    assert made.components["text_encoder_2"].load().run(made.components["text_encoder_2"].example(0))


def test_opening_reads_no_tensor(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffship.core import weights

    path = file_of(folder, "tiny-sdxl")
    monkeypatch.setattr(weights, "read_tensor", lambda *_: pytest.fail("a tensor was read"))
    assert open_source(str(path)).components["unet"].parameters > 0


# ---- averaged weights


def test_averaged_weights_are_taken_if_they_are_asked_for(tmp_path: Path) -> None:
    unet = {key: value for key, value in tensors("tiny-sd").items() if key.startswith(UNET)}
    flat = {f"model_ema.{'diffusion_model.' + key.removeprefix(UNET)}": value * 2 for key, value in unet.items()}
    averaged = {f"model_ema.{key.removeprefix('model_ema.').replace('.', '')}": value for key, value in flat.items()}
    path = changed(tmp_path, {**averaged, "model_ema.decay": np.array(0.9999, np.float32)})
    plain, ema = open_source(str(path)), open_source(str(path), loading=LoadOptions(ema=True))
    assert any("--ema takes them" in note for note in plain.source["notes"]) and "notes" not in ema.source
    assert plain.denoiser.digest == drawn("tiny-sd")["unet"]
    for name in ("conv_in.weight", "up_blocks.3.resnets.0.conv1.bias"):
        assert np.array_equal(ema.denoiser.weights.read(name), 2 * plain.denoiser.weights.read(name))
    with pytest.raises(DiffshipError, match=r"686 of 686 averaged \(EMA\) weights are not in it"):
        open_source(str(changed(tmp_path, {})), loading=LoadOptions(ema=True))
    with pytest.raises(ConfigError, match="--ema is for a checkpoint in one file"):
        open_source("arch:tiny-sd", loading=LoadOptions(ema=True))


# ---- what is predicted


SD2_UNET = {
    **configs.UNETS["sd21-base"], "block_out_channels": [64, 64, 128, 128], "attention_head_dim": [1, 1, 2, 2],
    "layers_per_block": 1, "cross_attention_dim": 64,
}  # fmt: skip
SD2_TEXT = {**configs.TEXTS["sd21"]["text_encoder"][1], "hidden_size": 64, "intermediate_size": 256}
SD2_TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 1, "vocab_size": 1000, "projection_dim": 64}
SHIFT = f"{UNET}output_blocks.7.1.transformer_blocks.0.norm1.bias"


@pytest.fixture(scope="module")
def sd2() -> tuple[Pipeline, Tensors]:
    """A small Stable Diffusion 2, of shapes that no built-in config has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(configs.UNETS, "tiny-sd", SD2_UNET)
        patch.setitem(configs.TEXTS, "tiny-sd", {"text_encoder": ("CLIPTextModel", SD2_TEXT)})
        pipeline = open_source("arch:tiny-sd")
        return pipeline, writer.checkpoint(pipeline)


def test_configs_that_are_not_built_in_follow_from_shapes(sd2: tuple[Pipeline, Tensors], tmp_path: Path) -> None:
    made = open_source(str(writer.write(tmp_path / "sd2.safetensors", sd2[1])))
    for name, part in sd2[0].components.items():
        assert made.components[name].digest == part.digest, name
    unet, text = made.components["unet"].config, made.components["text_encoder"].config
    told = {key: value for key, value in SD2_UNET.items() if key != "upcast_attention"}
    assert {key: unet[key] for key in told} == told and not unet["upcast_attention"]
    assert (text["num_attention_heads"], text["hidden_act"], text["num_hidden_layers"]) == (1, "gelu", 2)
    pad = made.tokenizers["tokenizer"]["tokenizer_config.json"].decode()
    assert '"pad_token": "!"' in pad


@pytest.mark.parametrize(
    ("change", "metadata", "prediction", "told"),
    [
        ({SHIFT: np.linspace(-0.3, 0.3, 64, dtype=np.float32)}, None, "v_prediction", "spreads by 0.17"),
        ({SHIFT: np.linspace(-0.1, 0.1, 64, dtype=np.float32)}, None, "epsilon", "at most 0.09"),
        ({}, {"modelspec.prediction_type": "v"}, "v_prediction", "its header says"),
        (
            {SHIFT: np.linspace(-1, 1, 64, dtype=np.float32)},
            {"modelspec.prediction_type": "epsilon"},
            "epsilon",
            "header",
        ),
        ({"v_pred": np.zeros(0, np.float32)}, None, "v_prediction", "the mark v_pred"),
    ],
)
def test_what_sd2_predicts_is_told(
    change: Tensors, metadata: Any, prediction: str, told: str, sd2: tuple[Pipeline, Tensors], tmp_path: Path
) -> None:
    path = str(writer.write(tmp_path / "sd2.safetensors", {**sd2[1], **change}, metadata))
    made = open_source(path)
    assert made.family.prediction_type == prediction and told in made.source["notes"][0]
    other = next(name for name in ("epsilon", "v_prediction") if name != prediction)
    asked = open_source(path, loading=LoadOptions(prediction=other))
    assert asked.family.prediction_type == other and "notes" not in asked.source


def test_zero_terminal_snr_is_marked(tmp_path: Path) -> None:
    marks = {name: np.zeros(0, np.float32) for name in ("v_pred", "ztsnr")}
    made = open_source(str(changed(tmp_path, marks)))
    assert made.scheduler["rescale_betas_zero_snr"] and made.scheduler["prediction_type"] == "v_prediction"


# ---- parts of a model


@pytest.mark.slow
def test_a_file_without_text_encoders_takes_a_base(tmp_path: Path, folder: Path) -> None:
    whole, alone = tensors("tiny-sd"), changed(tmp_path, {}, without=TEXT)
    with pytest.raises(DiffshipError, match=r"has no text_encoder, tokenizer.*run take --base SOURCE"):
        open_source(str(alone))
    made = open_source(str(alone), base=str(file_of(folder, "tiny-sd")))
    assert digests(made) == drawn("tiny-sd")
    bare = {key.removeprefix(UNET): value for key, value in whole.items() if key.startswith(UNET)}
    bare["betas"] = np.zeros(3, np.float32)
    for kept in (
        bare,
        {name: arch("tiny-sd").denoiser.weights.read(name) for name in arch("tiny-sd").denoiser.weights.names()},
    ):
        path = writer.write(tmp_path / "unet.safetensors", kept)
        assert digests(open_source(str(path), base="arch:tiny-sd")) == drawn("tiny-sd")


def vae_of(name: str, scale: float = 1.0) -> Tensors:
    return {key.removeprefix(VAE): a * np.float32(scale) for key, a in tensors(name).items() if key.startswith(VAE)}


@pytest.mark.parametrize("prefix", ["", VAE, "vae."])
def test_a_separate_vae_takes_the_place_of_the_models(prefix: str, tmp_path: Path, folder: Path) -> None:
    own = {f"{prefix}{key}": value for key, value in vae_of("tiny-sd", 2).items()}
    path = writer.write(tmp_path / "vae.safetensors", {**own, f"{prefix}loss.logvar": np.zeros(1, np.float32)})
    for source in (str(file_of(folder, "tiny-sd")), "arch:tiny-sd"):
        made = open_source(source, loading=LoadOptions(vae=str(path)))
        read = made.decoder.weights.read("decoder.conv_in.weight")
        assert np.array_equal(read, 2 * arch("tiny-sd").decoder.weights.read("decoder.conv_in.weight"))
        assert made.family == arch("tiny-sd").family and made.source["vae"] == "vae"


def test_a_vae_file_gets_the_scale_of_the_model_that_it_is_for(tmp_path: Path) -> None:
    path = writer.write(tmp_path / "vae.safetensors", vae_of("tiny-sdxl"))
    assert open_source("arch:tiny-sdxl", loading=LoadOptions(vae=str(path))).family == arch("tiny-sdxl").family
    named = {name: arch("tiny-sd").decoder.weights.read(name) for name in arch("tiny-sd").decoder.weights.names()}
    named |= {name: arch("tiny-sd").encoder.weights.read(name) for name in arch("tiny-sd").encoder.weights.names()}
    path = writer.write(tmp_path / "diffusers.safetensors", named)
    assert digests(open_source("arch:tiny-sd", loading=LoadOptions(vae=str(path)))) == drawn("tiny-sd")


def test_a_wrong_vae_is_refused(tmp_path: Path, folder: Path) -> None:
    saved = save(arch("tiny-sdxl"), tmp_path / "xl")
    with pytest.raises(DiffshipError, match=r"scaling_factor is 0.13025, and that of the model 0.18215"):
        open_source("arch:tiny-sd", loading=LoadOptions(vae=str(saved)))
    wide = {key: a.repeat(4, axis=1) if key == "decoder.conv_in.weight" else a for key, a in vae_of("tiny-sd").items()}
    path = writer.write(tmp_path / "wide.safetensors", wide)
    with pytest.raises(DiffshipError, match=r"latent_channels is 16, and that of the model 4"):
        open_source("arch:tiny-sd", loading=LoadOptions(vae=str(path)))
    with pytest.raises(DiffshipError, match="has no VAE"):
        open_source("arch:tiny-sd", loading=LoadOptions(vae=str(changed(tmp_path, {}, without=VAE))))


def test_a_file_inside_a_folder_is_not_read_without_its_config(tmp_path: Path) -> None:
    saved = save(arch("tiny-sd"), tmp_path / "sd")
    with pytest.raises(DiffshipError, match=r"config.json says how that is built; pass the folder: .*/sd/vae"):
        open_source("arch:tiny-sd", loading=LoadOptions(vae=str(saved / "vae" / "diffusion_pytorch_model.safetensors")))


@pytest.mark.slow
def test_a_vae_of_other_latents_is_found_by_its_pictures(tmp_path: Path, folder: Path) -> None:
    """SD's and SDXL's have equal shapes, so only what they draw tells."""
    from diffship.compression.vae_beside import open_tried

    source = str(file_of(folder, "tiny-sd"))
    same = str(writer.write(tmp_path / "same.safetensors", vae_of("tiny-sd")))
    assert open_tried(source, None, None, LoadOptions(vae=same)).source["vae"] == "same"
    rolled = {
        key: np.roll(a, 1, axis=1) if key.startswith("post_quant") and a.ndim == 4 else a
        for key, a in vae_of("tiny-sd").items()
    }
    other = str(writer.write(tmp_path / "other.safetensors", rolled))
    with pytest.raises(ConfigError, match="does not fit the model's latents"):
        open_tried(source, None, None, LoadOptions(vae=other))


# ---- what is no such file


HALF = np.zeros((4, 4), np.float16)
FOREIGN: dict[str, tuple[Tensors, str]] = {
    "kohya's LoRA": ({"lora_unet_down_blocks_0_attn1_to_q.lora_down.weight": HALF}, "is a LoRA.*--pass lora"),
    "diffusers' LoRA": ({"unet.down_blocks.0.attentions.0.to_q.lora_A.weight": HALF}, "is a LoRA"),
    "a textual inversion": ({"emb_params": HALF}, "is a textual inversion"),
    "a ControlNet": ({"control_model.input_blocks.0.0.weight": HALF}, "is a ControlNet"),
    "SD 3": ({"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": HALF}, "Stable Diffusion 3.*folder"),
    "Flux": ({"double_blocks.0.img_attn.norm.key_norm.scale": HALF}, "Flux"),
    "something else": ({"layer.weight": HALF}, "those of no model that is read here"),
    "nothing": ({}, "holds no tensors"),
}


@pytest.mark.parametrize("what", FOREIGN)
def test_files_of_other_things_say_what_they_are(what: str, tmp_path: Path) -> None:
    made, told = FOREIGN[what]
    with pytest.raises(DiffshipError, match=told) as fault:
        open_source(str(writer.write(tmp_path / "it.safetensors", made)))
    assert fault.value.exit_code in (2, 3)


CHANGES: dict[str, tuple[Tensors, str]] = {
    "NF4": ({f"{UNET}x.weight.quant_state.bitsandbytes__nf4": HALF}, "bitsandbytes"),
    "scaled float8": ({"scaled_fp8": HALF}, "beside scales"),
    "a layer more": (
        {f"{UNET}input_blocks.1.2.norm.weight": HALF},
        "U-Net has 1 tensors that no U-Net.*input_blocks.1.2",
    ),
    "a VAE layer more": ({f"{VAE}decoder.extra.weight": HALF}, "VAE has 1 tensors"),
    "another family's text": ({"conditioner.embedders.1.model.ln_final.weight": HALF}, "of one family and its text"),
    "EDM": ({"edm_mean": HALF}, "EDM's noise"),
    "mixed layers": ({f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": HALF}, "two families"),
}


@pytest.mark.parametrize("what", CHANGES)
def test_what_a_model_may_not_have(what: str, tmp_path: Path) -> None:
    more, told = CHANGES[what]
    with pytest.raises(DiffshipError, match=told):
        open_source(str(changed(tmp_path, more)))


def test_tensors_of_no_part_are_counted_and_told(tmp_path: Path) -> None:
    made = open_source(str(changed(tmp_path, {"junk.weight": HALF, "more.bias": HALF})))
    assert made.source["notes"] == ["2 tensors of changed.safetensors belong to no part and are not read: "
                                    "junk.weight, more.bias"]  # fmt: skip
    assert digests(made) == drawn("tiny-sd")


def test_a_missing_or_cut_tensor_is_told(tmp_path: Path) -> None:
    path = changed(tmp_path, {}, without=f"{UNET}input_blocks.1.0.out_layers.3.bias")
    with pytest.raises(DiffshipError, match=r"1 tensors are missing.*down_blocks.0.resnets.0.conv2.bias"):
        open_source(str(path)).denoiser.module()
    whole = path.read_bytes()
    path.write_bytes(whole[:-100])
    with pytest.raises(DiffshipError, match="cut short"):
        open_source(str(path))


def test_the_licence_in_the_header_travels(tmp_path: Path) -> None:
    made = open_source(str(changed(tmp_path, {}, metadata={"modelspec.license": "CreativeML OpenRAIL-M"})))
    assert made.licence["id"] == "creativeml-openrail-m" and "Attachment A" in made.licence["restrictions"]


# ---- GGUF


def test_a_gguf_file_is_the_model_within_its_blocks(tmp_path: Path) -> None:
    """Matrices in Q8_0 where rows are whole blocks, as converters write them, and the rest as it is."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "core"))
    from test_core_gguf import F32, Q8_0, gguf, q8

    packed, scales = [], {}
    for name, array in tensors("tiny-sd").items():
        if array.dtype != np.float32:
            continue
        if array.ndim == 2 and array.shape[1] % 32 == 0:
            rows = array.reshape(-1, 32)
            scale = np.float16(np.abs(rows).max() / 127)
            scales[name] = float(scale)
            data = b"".join(q8(scale, np.rint(row / np.float32(scale)).clip(-127, 127).tolist()) for row in rows)
            packed.append((name, array.shape, Q8_0, data))
        else:
            packed.append((name, array.shape, F32, array.tobytes()))
    (tmp_path / "tiny.gguf").write_bytes(gguf(packed))
    made = open_source(str(tmp_path / "tiny.gguf"))
    assert len(scales) > 50 and made.family == arch("tiny-sd").family
    read = made.denoiser.weights.read("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight")
    exact = arch("tiny-sd").denoiser.weights.read("mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight")
    stored = f"{UNET}middle_block.1.transformer_blocks.0.attn1.to_q.weight"
    assert 0 < np.abs(read - exact).max() <= scales[stored] * 0.51
    assert made.decoder.digest == drawn("tiny-sd")["vae_decoder"]
