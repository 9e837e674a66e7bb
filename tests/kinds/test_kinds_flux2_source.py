"""FLUX.2-klein: published counts, token ids, sizes that exports and benches ask for, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffship.core.errors import ConfigError, SourceError, UnsupportedError
from diffship.core.registry import kinds
from diffship.sampling.qwen_tokenizer import LENGTH, QwenTokenizer

pytest.importorskip("torch")
pytest.importorskip("diffusers")

from diffship.models.assemble import assemble
from diffship.models.pipeline import Pipeline
from diffship.models.sources.arch import arch_material
from diffship.models.sources.opening import open_source
from diffship.models.sources.qwen_files import qwen_files

pytestmark = pytest.mark.filterwarnings("ignore")
PARTS = ["text_encoder", "transformer", "vae_encoder", "vae_decoder"]


@pytest.mark.slow
def test_published_counts() -> None:
    pipeline = open_source("arch:flux2-klein-4b")
    counts = {name: part.parameters for name, part in pipeline.components.items()}
    assert counts["transformer"] == 3_875_544_576
    assert counts["text_encoder"] == 4_022_468_096
    buffers = 2 * 128 + 1  # mean, variance and count of the batch norm, in both halves
    assert counts["vae_encoder"] + counts["vae_decoder"] - 2 * buffers == 84_046_115
    assert pipeline.family.default_sides == (1024, 1024) and pipeline.family.text_width == 7680


def test_engines_with_profiles_take_the_sizes_of_pictures() -> None:
    """Tokens were those of the least picture, and the decoder's latents half as many a side as it takes."""
    from diffship.exporters.tensorrt.shapes import profile

    pipeline = open_source("arch:flux2-klein-4b")
    ranges = {name: profile(part, pipeline.family, {}) for name, part in pipeline.components.items()}
    drawn, places = ranges["transformer"]["hidden_states"], ranges["transformer"]["image_rope_cos"]
    assert (drawn.min[1], drawn.opt[1], drawn.max[1]) == (32 * 32, 64 * 64, 96 * 96)
    assert places.max == (96 * 96, 128) and ranges["transformer"]["encoder_hidden_states"].max[1] == LENGTH
    assert ranges["vae_decoder"]["latent_sample"].opt == (1, 32, 128, 128)


@pytest.mark.slow
def test_a_bench_measures_the_transformer_at_the_size_that_is_asked(tmp_path: Path) -> None:
    """It had a list of parts of U-Net models, and left any other denoiser out."""
    from safetensors.numpy import load_file

    from diffship.benchmarks.measure.case import Bench, cases_of
    from diffship.benchmarks.measure.materials import Order, prepare

    order = Order("arch:tiny-flux2", str(tmp_path), 96, 4.0, "fp32", (2,), ("text_encoder", "transformer"), (), False)
    made = prepare(order)
    feeds = {part: load_file(made.feeds[part]["2"]) for part in ("text_encoder", "transformer")}
    assert feeds["transformer"]["hidden_states"].shape == (2, 36, 16)  # a distilled model has one row per picture
    assert feeds["transformer"]["encoder_hidden_states"].shape == (2, LENGTH, 48)
    assert feeds["text_encoder"]["attention_mask"].shape == (2, LENGTH)
    cases = cases_of(Bench((order.target,)), {order.target: tuple(made.parts)}, {order.target: ("torch",)})
    assert [case.part for case in cases] == [*PARTS, "image"]


# ---- Qwen's tokenizer

SENTENCES = [
    *("a red fox, painting", "Hello, WORLD's  best 123 don't", "", "日本語 emoji 😀", "\t\n a\u00a0b c", "e\u0301té"),
    *("<|im_end|> x <|endoftext|> <think>", "<|im_start|>system\nbe rude<|im_end|>", "word " * 300),
]


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import Qwen2TokenizerFast

    for name, data in qwen_files().items():
        (tmp_path / name).write_bytes(data)
    stock = Qwen2TokenizerFast.from_pretrained(tmp_path)
    ours = QwenTokenizer.from_files(qwen_files())
    for sentence in SENTENCES:
        message = [{"role": "user", "content": sentence}]
        text = stock.apply_chat_template(message, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        padded = stock(text, padding="max_length", max_length=LENGTH, truncation=True)
        made = ours([sentence])
        assert made.ids[0].tolist() == padded["input_ids"], sentence
        assert made.mask is not None and made.mask[0].tolist() == padded["attention_mask"], sentence


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [
        ("tokenizer.json", None, r"tokenizer: has no tokenizer.json.*save_pretrained"),
        ("chat_template.jinja", b"{{ messages[0].content }}", "its chat template has no '<|im_start|>'"),
        ("tokenizer_config.json", b'{"padding_side": "left"}', "padding_side is 'left'"),
    ],
)
def test_another_tokenizer_is_refused(name: str, data: bytes | None, said: str) -> None:
    files = {file: made for file, made in qwen_files().items() if file != name} | ({} if data is None else {name: data})
    kind = kinds()["flux2"]
    (slot,) = kind.text_slots
    with pytest.raises((SourceError, UnsupportedError), match=said.replace("|", r"\|")):
        kind.tokenizer("tokenizer", kind.complete_tokenizer(slot, files, "tokenizer"))


# ---- what is refused


def edited(folder: str, **changes: Any) -> Pipeline:
    """The tiny model, assembled with keys of one config changed."""
    material = arch_material("arch:tiny-flux2")
    module = material.modules[folder]
    changed = replace(module, config={**module.config, **changes})
    return assemble(replace(material, modules={**material.modules, folder: changed}))


@pytest.mark.parametrize(
    ("folder", "changes", "said"),
    [
        ("text_encoder", {"hidden_size": 32}, "text 48 wide, three layers of text_encoder are 96"),
        ("text_encoder", {"num_hidden_layers": 4}, "num_hidden_layers is 4; layers 1, 2, 4 are read, so legal is 5"),
        ("text_encoder", {"diffship": {"layers": [2, 1, 3]}}, "legal are rising numbers"),
        ("text_encoder", {"use_sliding_window": True, "max_window_layers": 1}, "use_sliding_window is on"),
        ("transformer", {"guidance_embeds": True}, "guidance_embeds is on, as in FLUX.2-dev"),
        ("transformer", {"axes_dims_rope": [8, 4, 2, 2]}, "axes_dims_rope is"),
        ("transformer", {"rope_theta": 10000}, "rope_theta 10000"),
        ("vae", {"latent_channels": 8}, "in_channels is 16; legal is 32"),
        ("vae", {"patch_size": [1, 1]}, "patch_size is"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((SourceError, UnsupportedError), match=said.replace("[", r"\[")):
        edited(folder, **changes)


def test_other_noise_class_suffix_or_statistics_are_refused() -> None:
    material = arch_material("arch:tiny-flux2")
    with pytest.raises(UnsupportedError, match="_class_name is 'DDIMScheduler'"):
        assemble(replace(material, scheduler={"_class_name": "DDIMScheduler"}))
    with pytest.raises(UnsupportedError, match="'Flux2Pipeline', which is not drawn here"):
        assemble(replace(material, index={"_class_name": "Flux2Pipeline"}))
    with pytest.raises(SourceError, match="unknown suffix 'taesd'"):
        arch_material("arch:tiny-flux2+taesd")
    family = assemble(material).family
    with pytest.raises(ConfigError, match="latents_std has 3 numbers; legal is 16"):
        replace(family, latents_std=(1.0, 2.0, 3.0))


@pytest.mark.parametrize("words", ["layout --set name=bk-tiny", "prune --set keep=0.5", "lora --set files=none"])
def test_passes_for_u_nets_are_refused(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffship.cli.main import main

    code = main(["compress", "arch:tiny-flux2", "-o", str(tmp_path / "out"), "--pass", *words.split()])
    assert code == 3 and "Flux2Transformer2DModel; legal: UNet2DConditionModel" in capsys.readouterr().err
