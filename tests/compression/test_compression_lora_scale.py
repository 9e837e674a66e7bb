"""How strongly files without alphas change a model, against peft's own merging and diffusers' own loading."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffship.compress import compress
from diffship.compression.lora import LoraPass
from diffship.compression.lora_file import LoraFile
from diffship.compression.lora_names import Names
from diffship.compression.lora_scale import ADAPTER, METADATA, read_notes
from diffship.compression.stored import options_key
from diffship.core.errors import SourceError
from diffship.core.weights import SafetensorsWeights
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
# alpha is not the rank, as by default in LCM-LoRA's training; one layer has its own alpha, another its own rank
CONFIG: dict[str, Any] = {
    "r": 4,
    "lora_alpha": 1,
    "target_modules": ["to_q", "to_k", "conv1"],
    "alpha_pattern": {f"{LAYER}.to_k": 6, "resnets.0.conv1": 3},
    "rank_pattern": {f"{LAYER}.to_k": 2},
    "init_lora_weights": False,  # both matrices random: the change is not zero
}


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return open_source("arch:tiny-sd")


@pytest.fixture(scope="module")
def saved(base: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(base, tmp_path_factory.mktemp("base") / "model")


def unet_of(saved: Path) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_pretrained(saved / "unet")


def differences(fused: Pipeline, base: Pipeline, theirs: dict[str, torch.Tensor]) -> tuple[float, int]:
    """(largest relative difference to their change, number of tensors that they change)."""
    mine, before = (pipeline.components["unet"].weights for pipeline in (fused, base))
    worst, changed = 0.0, 0
    for name, value in theirs.items():
        change = value.numpy() - before.read(name)
        changed += bool(np.abs(change).max() > 0)
        worst = max(worst, float(np.abs(mine.read(name) - value.numpy()).max() / max(1.0, np.abs(change).max())))
    return worst, changed


@pytest.mark.slow
@pytest.mark.parametrize("root", [False, True])
def test_peft_s_own_file_is_fused_as_peft_merges_it(root: bool, base: Pipeline, saved: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = get_peft_model(unet_of(saved), LoraConfig(**CONFIG, use_rslora=root))
    model.save_pretrained(tmp_path)
    fused = compress(base, [LoraPass((str(tmp_path / "adapter_model.safetensors"),))])
    worst, changed = differences(fused, base, model.merge_and_unload().state_dict())
    assert worst < 1e-5 and changed > 20
    (entry,) = fused.history
    assert entry["scaled_by"] == ["adapter_config.json beside adapter_model.safetensors"]


@pytest.mark.slow
@pytest.mark.parametrize("alone", [False, True])
def test_diffusers_notes_in_the_header_are_read(alone: bool, base: Pipeline, saved: Path, tmp_path: Path) -> None:
    """`save_lora_adapter` of a U-Net alone, and `save_lora_weights` of a pipeline, which puts the part first."""
    torch.manual_seed(0)
    unet = unet_of(saved)
    unet.add_adapter(LoraConfig(**CONFIG), adapter_name="default")
    unet.save_lora_adapter(tmp_path)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    if not alone:
        notes = unet.peft_config["default"].to_dict()
        notes["target_modules"] = sorted(notes["target_modules"])
        tensors = load_file(file)
        StableDiffusionPipeline.save_lora_weights(tmp_path, tensors, unet_lora_adapter_metadata=notes)
    unet.fuse_lora()
    unet.unload_lora()
    fused = compress(base, [LoraPass((str(file),))])
    worst, changed = differences(fused, base, unet.state_dict())
    assert worst < 1e-5 and changed > 20
    (entry,) = fused.history
    assert "lora_adapter_metadata" in entry["scaled_by"][0]


def test_without_notes_alpha_is_the_rank(base: Pipeline, tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "lora.safetensors")
    (tmp_path / ADAPTER).write_text('{"lora_alpha": 999}')  # of another file: this one's keys are not peft's
    fused = compress(base, [LoraPass((str(tmp_path / "lora.safetensors"),))])
    name = f"{LAYER}.to_q.weight"
    before, after = (pipeline.components["unet"].weights.read(name) for pipeline in (base, fused))
    np.testing.assert_allclose(after - before, 2 * 0.01, rtol=1e-3)
    (entry,) = fused.history
    assert entry["scaled_by"] == ["nothing: alpha is the rank"]


def tensors(prefix: str = "unet.") -> dict[str, torch.Tensor]:
    return {
        f"{prefix}{LAYER}.to_q.lora_A.weight": torch.full((2, 16), 0.1),
        f"{prefix}{LAYER}.to_q.lora_B.weight": torch.full((16, 2), 0.1),
    }


def test_peft_s_file_without_its_config_is_refused(base: Pipeline, tmp_path: Path) -> None:
    save_file(tensors("base_model.model."), tmp_path / "adapter_model.safetensors")
    with pytest.raises(SourceError, match=r"keeps alpha in adapter_config\.json; put that file beside it"):
        compress(base, [LoraPass((str(tmp_path / "adapter_model.safetensors"),))], tmp_path / "out")


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        ({}, "lora_alpha is None, and not a number"),
        ({"lora_alpha": True}, "lora_alpha is True"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_alpha": 8, "peft_type": "LOHA"}, "of the kind LOHA"),
        ({"lora_alpha": 8, "use_dora": True}, "of the kind DORA"),
        ({"lora_alpha": 8, "init_lora_weights": "pissa_niter_16"}, "belongs to other weights"),
        *(
            ({"lora_alpha": 8, "init_lora_weights": start}, "belongs to other weights")
            for start in ("lora_ga", "olora", "corda", "loftq", "a beginning of tomorrow")
        ),
        ({"lora_alpha": 8, "kasa_config": {"beta": 1e-4}}, "kasa_config: plain LoRA alone"),
        ({"lora_alpha": 8, "fan_in_fan_out": True}, "fan_in_fan_out: plain LoRA alone"),
        ({"lora_alpha": 8, "alpha_pattern": {"down.*": 4}}, "no regular expressions"),
        ({"lora_alpha": 8, "alpha_pattern": [4]}, "alpha_pattern is to name layers"),
        ({"lora_alpha": 8, "alpha_pattern": {"to_q": "4"}}, "alpha of to_q is '4'"),
    ],
)
def test_notes_that_cannot_be_are_refused(notes: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / ADAPTER).write_text(json.dumps(notes))
    with pytest.raises(SourceError, match=message):
        read_notes(tmp_path / "adapter_model.safetensors", ("base_model.model.conv_in.lora_A.weight",), {})


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_beginnings_that_leave_the_base_alone_are_fused(start: Any, base: Pipeline, tmp_path: Path) -> None:
    save_file(tensors("base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / ADAPTER).write_text(json.dumps({"lora_alpha": 2, "r": 2, "init_lora_weights": start}))
    assert LoraPass((str(tmp_path / "adapter_model.safetensors"),)).check(base) == []


@pytest.mark.slow
def test_files_of_mixed_ranks_that_diffusers_saved_again_are_fused(base: Pipeline, saved: Path, tmp_path: Path) -> None:
    """diffusers 0.42 names their layers in full behind a `^`; it reads such a file back itself."""
    draw = torch.Generator().manual_seed(0)
    file = {}
    for name, rank in (("to_q", 4), ("to_k", 4), ("to_v", 8)):
        file[f"{LAYER}.{name}.lora_A.weight"] = torch.randn(rank, 16, generator=draw) * 0.1
        file[f"{LAYER}.{name}.lora_B.weight"] = torch.randn(16, rank, generator=draw) * 0.1
    unet = unet_of(saved)
    unet.load_lora_adapter(file, adapter_name="a", prefix=None)
    unet.save_lora_adapter(tmp_path, adapter_name="a")
    unet.fuse_lora()
    unet.unload_lora()
    fused = compress(base, [LoraPass((str(tmp_path / "pytorch_lora_weights.safetensors"),))])
    worst, changed = differences(fused, base, unet.state_dict())
    assert worst < 1e-5 and changed == 3


@pytest.mark.parametrize(
    ("notes", "message"),
    [
        (
            {"alpha_pattern": {f"{LAYER}.processor.to_q_lora.down.weight": 8}},
            r"1 names \(.*\) of alpha_pattern are of no",
        ),
        ({"alpha_pattern": {"^to_q": 8}}, r"1 names \(\^to_q\) of alpha_pattern are of no layer"),
        ({"r": 4}, "says rank 4 for .*to_q, whose tensors have rank 2"),
        ({"r": 2, "rank_pattern": {f"^{LAYER}.to_q": 8}}, "says rank 8 for .*to_q, whose tensors have rank 2"),
    ],
)
def test_notes_that_are_of_another_file_are_refused(
    notes: dict[str, Any], message: str, base: Pipeline, tmp_path: Path
) -> None:
    save_file(tensors("base_model.model."), tmp_path / "adapter_model.safetensors")
    (tmp_path / ADAPTER).write_text(json.dumps({"lora_alpha": 8, **notes}))
    (problem,) = LoraPass((str(tmp_path / "adapter_model.safetensors"),)).check(base)
    assert re.search(message, str(problem))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_peft_s_files_of_text_encoders_are_fused_as_peft_merges_them(part: str, tmp_path: Path) -> None:
    """transformers 5 leaves a level of the names out, and nothing in the file says which of two encoders it is of: here
    shapes do."""
    base = open_source("arch:tiny-sdxl")
    kind = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
    config = kind.config_class(**{k: v for k, v in base.components[part].config.items() if k != "architectures"})
    torch.manual_seed(0)
    model = kind(config)
    weights = base.components[part].weights
    names = {name.removeprefix("text_model."): name for name in weights.names()}
    state = {key: torch.from_numpy(weights.read(names[key.removeprefix("text_model.")])) for key in model.state_dict()}
    model.load_state_dict(state)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "fc1"], init_lora_weights=False)
    )
    wrapped.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    fused = compress(base, [LoraPass((str(file),))])
    for key, value in wrapped.merge_and_unload().state_dict().items():
        mine = fused.components[part].weights.read(names[key.removeprefix("text_model.")])
        np.testing.assert_allclose(mine, value.numpy(), atol=1e-6)


def test_an_encoder_that_neither_names_nor_shapes_tell_is_told_by_its_folder(tmp_path: Path) -> None:
    layer = "encoder.layers.0.self_attn.q_proj"
    save_file({f"text_model.{layer}.weight": torch.zeros(8, 8)}, tmp_path / "model.safetensors")
    model = dict.fromkeys(("text_encoder", "text_encoder_2"), SafetensorsWeights(tmp_path / "model.safetensors"))
    names = Names({part: held.names() for part, held in model.items()}, {})
    file = {f"base_model.model.{layer}.lora_{side}.weight": torch.ones(shape) for side, shape in _SIDES.items()}
    for folder in ("text_encoder_2", "elsewhere"):
        (tmp_path / folder).mkdir()
        save_file(file, tmp_path / folder / "adapter_model.safetensors")
        (tmp_path / folder / ADAPTER).write_text(json.dumps({"lora_alpha": 2}))
    found = LoraFile(tmp_path / "text_encoder_2" / "adapter_model.safetensors", names, model).deltas(1.0)
    assert list(found) == [("text_encoder_2", f"text_model.{layer}")]
    with pytest.raises(SourceError, match="name no part, and text_encoder and text_encoder_2 have such layers"):
        LoraFile(tmp_path / "elsewhere" / "adapter_model.safetensors", names, model)


_SIDES = {"A": (2, 8), "B": (8, 2)}


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, " " * (1 << 21)])
def test_a_damaged_header_is_refused(text: str, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="is no JSON object of at most"):
        read_notes(tmp_path / "lora.safetensors", (), {METADATA: text})


def test_another_config_is_another_result(tmp_path: Path) -> None:
    file = tmp_path / "adapter_model.safetensors"
    save_file(tensors("base_model.model."), file)
    keys = []
    for alpha in (1, 2):
        (tmp_path / ADAPTER).write_text(json.dumps({"lora_alpha": alpha}))
        keys.append(options_key(LoraPass((str(file),))))
    assert keys[0] != keys[1] and keys[0]["files"] == keys[1]["files"]
