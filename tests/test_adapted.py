"""Textual inversions and LoRAs given at run time: against diffusers' own loaders, and every way a file can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffship.adapted import adapted, lora_of, open_adapted
from diffship.compression.lora import LoraPass
from diffship.core.errors import ConfigError, DiffshipError, SourceError, UnsupportedError
from diffship.core.job import Job
from diffship.core.reading import Reading
from diffship.models.clip_skip import with_clip_skip
from diffship.models.inversions import read_inversion, with_inversions
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.opening import open_source
from diffship.sampling.encode import encode

pytestmark = pytest.mark.filterwarnings("ignore")
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return open_source("arch:tiny-sd")


@pytest.fixture(scope="module")
def width(base: Pipeline) -> int:
    return base.family.text_width


def states(pipeline: Pipeline, prompt: str, reading: Reading | None = None) -> Any:
    with PipelineModel(pipeline) as model:
        return encode(model, prompt, None, (64, 64), 1.0, reading or Reading()).positive["encoder_hidden_states"]


def vectors(count: int, width: int) -> torch.Tensor:
    return torch.randn((count, width), generator=torch.Generator().manual_seed(count)) * 0.05


@pytest.mark.slow
def test_words_mean_what_they_mean_to_diffusers(base: Pipeline, width: int, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    save_file({"<toy>": vectors(1, width)[0]}, tmp_path / "learned_embeds.safetensors")
    save_file({"emb_params": vectors(3, width)}, tmp_path / "moss-style.safetensors")
    theirs = StableDiffusionPipeline.from_pretrained(save(base, tmp_path / "base"))
    theirs.load_textual_inversion(str(tmp_path), weight_name="learned_embeds.safetensors")
    theirs.load_textual_inversion(str(tmp_path), weight_name="moss-style.safetensors", token="moss-style")
    files = [str(tmp_path / name) for name in ("learned_embeds.safetensors", "moss-style.safetensors")]
    made = adapted(base, embeddings=files)
    prompt = "a red <toy> in moss-style, moss"
    with torch.no_grad():
        wanted, _ = theirs.encode_prompt(prompt, "cpu", 1, False)
    np.testing.assert_allclose(states(made, prompt), wanted[0].numpy(), atol=2e-6)
    assert np.abs(states(made, prompt) - states(base, prompt)).max() > 1e-3
    assert np.array_equal(states(made, "a cat"), states(base, "a cat"))
    assert made.source["id"] == "arch:tiny-sd + <toy> + moss-style"
    # weights and breaks see one word; a picture of other words has other digests
    assert states(made, "(moss-style:1.2) BREAK <toy>", Reading("a1111")).shape[0] == 154
    digests = [PipelineModel(pipeline).digests for pipeline in (made, base)]
    assert digests[0]["text_encoder"] != digests[1]["text_encoder"] and digests[0]["unet"] == digests[1]["unet"]
    assert made.history[-1] == {"pass": "embedding", "words": ["<toy>", "moss-style"]}


def test_a_file_for_both_encoders_of_sdxl(tmp_path: Path, width: int) -> None:
    xl = open_source("arch:tiny-sdxl")
    sides = {
        name: int(next(spec.shape[-1] for spec in part.outputs if spec.name == "last_hidden_state"))
        for name, part in xl.texts.items()
    }
    tensors = {"clip_l": vectors(2, sides["text_encoder"]), "clip_g": vectors(2, sides["text_encoder_2"])}
    if len(set(sides.values())) == 1:
        pytest.fail("this model cannot tell its two encoders apart by width")
    save_file(tensors, tmp_path / "toy.safetensors")
    made = with_inversions(xl, [read_inversion(str(tmp_path / "toy.safetensors"))])
    with PipelineModel(made) as model:
        found = encode(model, "a toy", None, (64, 64), 1.0).positive
        ids = [model.tokenizers[name](["a toy"]).ids[0, 2:4].tolist() for name in ("tokenizer", "tokenizer_2")]
    assert ids[0] == ids[1] and np.isfinite(found["encoder_hidden_states"]).all()
    save_file({"emb_params": vectors(1, sides["text_encoder"])}, tmp_path / "one.safetensors")
    with pytest.raises(ConfigError, match="text_encoder_2 needs"):
        with_inversions(xl, [read_inversion(str(tmp_path / "one.safetensors"))])


def _wrong(width: int) -> dict[str, tuple[dict[str, torch.Tensor], str, str]]:
    return {
        "other width": ({"emb_params": vectors(1, width + 1)}, "f.safetensors", "another kind of model"),
        "a known word": ({"a": vectors(1, width)}, "f.safetensors", "has this word"),
        "several tensors": ({"a": vectors(1, width), "b": vectors(1, width)}, "f.safetensors", "emb_params"),
        "too many vectors": ({"emb_params": vectors(76, width)}, "f.safetensors", "1 to 75"),
        "NaN": ({"emb_params": vectors(1, width) * float("nan")}, "f.safetensors", "NaN"),
        "no such file": ({}, "g.safetensors", "is not a file"),
    }


@pytest.mark.parametrize("case", _wrong(1))
def test_a_wrong_embedding_is_one_line(base: Pipeline, width: int, case: str, tmp_path: Path) -> None:
    tensors, name, said = _wrong(width)[case]
    if tensors:
        save_file(tensors, tmp_path / "f.safetensors")
    with pytest.raises((ConfigError, SourceError)) as fault:
        adapted(base, embeddings=[str(tmp_path / name)])
    assert said in str(fault.value)


def test_pickles_are_refused(base: Pipeline, tmp_path: Path) -> None:
    torch.save({"emb_params": torch.zeros(1, 4)}, tmp_path / "toy.pt")
    with pytest.raises(SourceError, match="safetensors"):
        adapted(base, embeddings=[str(tmp_path / "toy.pt")])


@pytest.fixture(scope="module")
def lora(base: Pipeline, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = base.denoiser.weights.meta(f"{LAYER}.weight").shape
    draw = torch.Generator().manual_seed(0)
    pair = {"down": torch.randn((2, shape[1]), generator=draw), "up": torch.randn((shape[0], 2), generator=draw)}
    file = tmp_path_factory.mktemp("lora") / "moss.safetensors"
    names = {"down": f"unet.{LAYER}.lora_A.weight", "up": f"unet.{LAYER}.lora_B.weight"}
    save_file({names[side]: tensor for side, tensor in pair.items()}, file)
    return file


@pytest.mark.slow
def test_a_lora_at_run_time_is_the_pass(base: Pipeline, lora: Path) -> None:
    made = adapted(base, [(str(lora), 0.8)])
    wanted = LoraPass(files=(str(lora),), weights=(0.8,)).run(base, Job())
    feeds = base.denoiser.example(0)
    ours, theirs, plain = (
        np.asarray(pipeline.denoiser.load().run(feeds)["out_sample"]) for pipeline in (made, wanted, base)
    )
    assert np.array_equal(ours, theirs) and np.abs(ours - plain).max() > 1e-4
    assert made.source["id"] == "arch:tiny-sd + moss:0.8"


def test_flags_of_loras(tmp_path: Path) -> None:
    assert lora_of("a/moss.safetensors:0.8") == ("a/moss.safetensors", 0.8)
    assert lora_of("a/moss.safetensors:-1") == ("a/moss.safetensors", -1.0)
    assert lora_of("moss.safetensors") == ("moss.safetensors", 1.0)
    assert lora_of("C:/moss.safetensors") == ("C:/moss.safetensors", 1.0)
    for wrong in ("moss.safetensors:x", "moss.safetensors:11", "moss.safetensors:nan"):
        with pytest.raises(ConfigError, match="from -10 to 10"):
            lora_of(wrong)


def test_a_bundle_is_refused_with_the_commands_that_make_one(tmp_path: Path) -> None:
    (tmp_path / "diffship.json").write_text("{}")
    with pytest.raises(UnsupportedError) as fault, open_adapted(tmp_path, [("m.safetensors", 0.8)], ["t.safetensors"]):
        pass
    for words in ("--pass lora --set files=m.safetensors --set weights=0.8", "--embedding t.safetensors"):
        assert words in str(fault.value)
    with pytest.raises(DiffshipError), open_adapted("arch:tiny-sd", engine="openvino"):
        pass


@pytest.mark.slow
def test_the_verb_draws_with_both(command: Any, base: Pipeline, width: int, lora: Path, tmp_path: Path) -> None:
    save_file({"emb_params": vectors(2, width)}, tmp_path / "toy.safetensors")
    words = ["run", "arch:tiny-sd", "a toy", "--steps", 1, "--size", 64, "-o", tmp_path / "a.png"]
    made = command(*words, "--lora", f"{lora}:0.5", "--embedding", tmp_path / "toy.safetensors", "--clip-skip", 1)
    assert made["exit_code"] == 0, made["stderr"]
    settings = made["pictures"][0]["settings"]
    assert settings["model"] == "arch:tiny-sd + moss:0.5 + toy" and settings["clip_skip"] == 1
    json.dumps(made)


def test_clip_skip_of_the_torch_encoder_is_the_final_norm_of_an_earlier_state(base: Pipeline) -> None:
    """transformers' own hidden states and norm are the oracle, of every number of layers."""
    import transformers

    part = with_clip_skip(base).components["text_encoder"]
    config = transformers.CLIPTextConfig(**dict(part.config))
    theirs = transformers.CLIPTextModel(config).eval()
    held = {name: torch.from_numpy(part.weights.read(name).copy()) for name in part.weights.names()}
    theirs.load_state_dict({name.removeprefix("text_model."): tensor for name, tensor in held.items()}, strict=False)
    ids = np.arange(77)[None] % 900
    with torch.no_grad():
        hidden = theirs(torch.from_numpy(ids), output_hidden_states=True).hidden_states
        made = part.load().run({"input_ids": ids})
        for skip in range(1, config.num_hidden_layers + 1):
            wanted = theirs.final_layer_norm(hidden[-1 - skip]).numpy()
            np.testing.assert_allclose(made[f"last_hidden_state.{skip}"], wanted, atol=1e-5)
    plain = base.components["text_encoder"].load().run({"input_ids": ids})
    assert np.array_equal(plain["last_hidden_state"], made["last_hidden_state"])
    with pytest.raises(ConfigError, match="clip_skip is 99"):
        with_clip_skip(base, 99)
