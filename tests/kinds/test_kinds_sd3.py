"""Stable Diffusion 3: source, conditioning and pictures beside stock diffusers, and its bundle on every path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_checks import require_served, require_verified

from diffship.core.bundle import Bundle
from diffship.core.errors import SourceError, UnsupportedError
from diffship.core.family import Family
from diffship.sampling.generate import Request, generate, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.t5_tokenizer import LENGTH, T5Tokenizer
from diffship.sampling.wire import pack, unpack

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from diffship.models.assemble import assemble  # noqa: E402
from diffship.models.model import PipelineModel  # noqa: E402
from diffship.models.pipeline import Pipeline  # noqa: E402
from diffship.models.saving import save  # noqa: E402
from diffship.models.sources.arch import arch_material  # noqa: E402
from diffship.models.sources.opening import open_source  # noqa: E402
from diffship.models.sources.t5_files import t5_files  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
LEAST_DB = 60.0
PROMPT, NEGATIVE = "a red fox, painting", "grey"
PARTS = ["text_encoder", "text_encoder_2", "text_encoder_3", "transformer", "vae_encoder", "vae_decoder"]
SCHEDULERS: Mapping[str, dict[str, Any]] = {
    "euler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0},
    "heun": {"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0},
    "dynamic": {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "max_shift": 3.0},
}
QUICK = [("with T5", "euler", (96, 64), 7.0), ("without", "heun", (64, 64), 1.0), ("with T5", "dynamic", (64, 96), 4.0)]
REST = [
    (texts, scheduler, size, guidance)
    for texts in ("with T5", "without")
    for scheduler in SCHEDULERS
    for size in ((64, 64), (96, 64))
    for guidance in (1.0, 7.0)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Diffusers folders of the tiny model with T5 and without."""
    home = tmp_path_factory.mktemp("sd3")
    sources = {"with T5": "arch:tiny-sd3", "without": "arch:tiny-sd3+no-t5"}
    return {name: save(open_source(source), home / name) for name, source in sources.items()}


@pytest.fixture(scope="module")
def stocks(folders: dict[str, Path]) -> dict[str, Any]:
    """The same opened by stock diffusers, which is told by its caller that T5 is left out."""
    made = {}
    for name, folder in folders.items():
        left_out = {} if name == "with T5" else {"text_encoder_3": None, "tokenizer_3": None}
        made[name] = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **left_out)
        made[name].set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def bundle(shared: Path, graphs_folder: Path) -> Bundle:
    """Exported to ONNX, which proves every part and a trajectory."""
    from filelock import FileLock

    from diffship.cli.main import main

    folder = shared / "tiny-sd3"
    with FileLock(shared / "tiny-sd3.lock"):
        if not folder.exists():
            words = ["--to", "onnx", "-o", str(folder), "--trajectory", "2", "--cache", str(graphs_folder), "--quiet"]
            assert main(["export", "arch:tiny-sd3", *words]) == 0
    return Bundle.open(folder)


def psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(255.0**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


def noise(size: tuple[int, int]) -> np.ndarray:
    width, height = size
    return np.random.default_rng(5).standard_normal((1, 16, height // 8, width // 8)).astype(np.float32)


def stock_picture(pipe: Any, scheduler: str, size: tuple[int, int], guidance: float) -> np.ndarray:
    config = SCHEDULERS[scheduler]
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    asked = {"width": size[0], "height": size[1], "guidance_scale": guidance, "negative_prompt": NEGATIVE}
    latents = torch.from_numpy(noise(size))
    made = pipe(PROMPT, num_inference_steps=3, latents=latents, output_type="np", **asked).images[0]
    return np.round(made * 255)


def asked(size: tuple[int, int], guidance: float = 7.0) -> Request:
    return Request(PROMPT, negative=NEGATIVE, steps=3, guidance=guidance, size=size, latents=noise(size))


def opened(bundle: Bundle) -> Any:
    from diffship.runtimes.engines.model import BundleModel

    return BundleModel(bundle)


# ---- beside stock diffusers


@pytest.mark.parametrize(
    ("texts", "scheduler", "size", "guidance"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)],
)
def test_a_picture_is_stocks(
    texts: str,
    scheduler: str,
    size: tuple[int, int],
    guidance: float,
    folders: dict[str, Path],
    stocks: dict[str, Any],
) -> None:
    pipeline = replace(open_source(str(folders[texts])), scheduler=SCHEDULERS[scheduler])
    with PipelineModel(pipeline) as model:
        (picture,) = generate(model, asked(size, guidance))
    assert picture.pixels.shape == (size[1], size[0], 3) and picture.pixels.std() > 1
    assert psnr(picture.pixels, stock_picture(stocks[texts], scheduler, size, guidance)) >= LEAST_DB


@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("scheduler", "strength"), [("euler", 0.6), ("dynamic", 0.75), ("euler", 1.0)])
def test_latents_from_an_image_are_stocks(
    folders: dict[str, Path], stocks: dict[str, Any], scheduler: str, strength: float, masked: bool
) -> None:
    """The latents and not the picture: stock's inpainting decodes them without the shift."""
    from PIL import Image

    config, names = SCHEDULERS[scheduler], ("Img2Img", "Inpaint")
    pipe = getattr(diffusers, f"StableDiffusion3{names[masked]}Pipeline")(**stocks["with T5"].components)
    pipe.scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    pipe.set_progress_bar_config(disable=True)
    pixels, mask = np.random.default_rng(3).integers(0, 256, (64, 96, 3), np.uint8), np.zeros((64, 96), np.uint8)
    mask[13:50, 21:] = 255
    given = {"image": Image.fromarray(pixels), **({"mask_image": Image.fromarray(mask)} if masked else {})}
    theirs = pipe(
        PROMPT, negative_prompt=NEGATIVE, num_inference_steps=6, guidance_scale=4.0, strength=strength, width=96,
        height=64, generator=torch.Generator().manual_seed(1), output_type="latent", **given,
    ).images[0].numpy()  # fmt: skip
    model = PipelineModel(replace(open_source(str(folders["with T5"])), scheduler=config))
    request = Request(
        PROMPT, NEGATIVE, 6, 4.0, seed=1, strength=strength, image=pixels, mask=mask if masked else None
    )  # fmt: skip
    ours = generate(model, request)[0].trajectory.latents
    assert np.abs(ours - theirs).max() <= 1e-4 * max(1.0, np.abs(theirs).max())


@pytest.mark.parametrize("texts", ["with T5", "without"])
def test_conditioning_is_stocks(texts: str, folders: dict[str, Path], stocks: dict[str, Any]) -> None:
    with torch.no_grad():
        found = stocks[texts].encode_prompt(PROMPT, None, None, negative_prompt=NEGATIVE)
    with PipelineModel(open_source(str(folders[texts]))) as model:
        kind = model.family.kind
        sides = [kind.encode(model, prompt, (64, 64))[0] for prompt in (PROMPT, NEGATIVE)]
    ours = [side[name] for name in ("encoder_hidden_states", "pooled_projections") for side in sides]
    for mine, theirs in zip(ours, found, strict=True):
        assert mine.shape == theirs[0].shape
        np.testing.assert_allclose(mine, theirs[0].numpy(), atol=1e-5)
    assert ours[0].shape == (77 + LENGTH, 96) and not ours[0][:77, 80:].any()
    assert bool(ours[0][77:].any()) is (texts == "with T5")


def test_defaults_are_stocks(folders: dict[str, Path]) -> None:
    import inspect

    call = inspect.signature(diffusers.StableDiffusion3Pipeline.__call__).parameters
    family = open_source(str(folders["with T5"])).family
    assert family.guidance_default == call["guidance_scale"].default
    assert family.steps_default == call["num_inference_steps"].default
    assert call["max_sequence_length"].default == LENGTH
    assert family.size_step == 16 and family.default_sides == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "width", "count"),
    [
        ("sd3-medium", 192, 1536, 2_028_328_000),
        ("sd35-medium", 384, 1536, 2_243_171_520),
        ("sd35-large", 192, 2432, 8_056_627_520),
    ],
)
def test_a_transformer_has_the_published_count(name: str, side: int, width: int, count: int) -> None:
    part = open_source(f"arch:{name}").denoiser
    table = side * side * width  # of positions: a buffer, which no count of parameters has
    assert part.parameters - table == count


def test_golden_calls_of_the_transformer_read_what_prompts_become(folders: dict[str, Path]) -> None:
    """Unit normals stood in for texts of 333 tokens while 77 were asked for."""
    from diffship.exporters.golden_feeds import PROMPTS, GoldenFeeds

    pipeline = open_source(str(folders["with T5"]))
    part = pipeline.denoiser
    feeds, _ = GoldenFeeds(pipeline, 1 << 30).calls(part, {**part.smallest_sizes(), "batch_size": 1})
    with PipelineModel(pipeline) as model:
        made, _ = model.family.kind.encode(model, PROMPTS[0], (64, 64))
    for name in ("encoder_hidden_states", "pooled_projections"):
        np.testing.assert_array_equal(feeds[name][0], made[name])


# ---- T5's tokenizer

SENTENCES = [
    *("a red fox, painting", "Hello, WORLD's  best 123 don't", "", "日本語 emoji 😀", "\t\n a\u00a0b c"),
    *("<pad> x </s> <extra_id_7>", "word " * 300),
]


def test_ids_are_those_of_transformers(tmp_path: Path) -> None:
    from transformers import T5TokenizerFast

    for name, data in t5_files().items():
        (tmp_path / name).write_bytes(data)
    stock = T5TokenizerFast.from_pretrained(tmp_path)
    ours = T5Tokenizer.from_files(t5_files())
    padded = {"padding": "max_length", "max_length": LENGTH, "truncation": True}
    for sentence in SENTENCES:
        assert ours([sentence]).ids[0].tolist() == stock(sentence, **padded)["input_ids"], sentence


def test_what_is_cut_is_told_with_the_encoders_that_do_not_see_it(folders: dict[str, Path]) -> None:
    with PipelineModel(open_source(str(folders["with T5"]))) as model:
        _, warnings = model.family.kind.encode(model, "on " * 300, (64, 64))
    clip, t5 = warnings
    assert clip.startswith("text_encoder, text_encoder_2: the prompt has 300 tokens, 75 are used")
    assert t5.startswith("text_encoder_3: the prompt has 300 tokens, 255 are used")


def test_a_slow_tokenizer_is_refused_with_the_remedy(folders: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(folders["with T5"], tmp_path / "slow")
    (tmp_path / "slow" / "tokenizer_3" / "tokenizer.json").rename(tmp_path / "slow" / "tokenizer_3" / "spiece.model")
    with pytest.raises(SourceError, match=r"tokenizer_3: has no tokenizer.json.*save_pretrained"):
        open_source(str(tmp_path / "slow"))


# ---- what is refused


def edited(folder: str, **changes: Any) -> Pipeline:
    """The tiny model, assembled with keys of one config changed."""
    material = arch_material("arch:tiny-sd3")
    module = material.modules[folder]
    changed = replace(module, config={**module.config, **changes})
    return assemble(replace(material, modules={**material.modules, folder: changed}))


@pytest.mark.parametrize(
    ("folder", "changes", "said"),
    [
        ("text_encoder_3", {"d_model": 64}, "text 96 wide, text_encoder_3 gives 64"),
        ("text_encoder_2", {"projection_dim": 32}, "pooled text 80 wide, the CLIP encoders give 64"),
        ("text_encoder", {"hidden_size": 64}, "text 96 wide, the CLIP encoders give 112"),
        ("transformer", {"pos_embed_max_size": 48}, "pos_embed_max_size is 48; legal is 96 or more"),
        ("vae", {"latent_channels": 4}, "in_channels is 16; legal is 4"),
        ("vae", {"latents_mean": [0.1]}, "latents_mean"),
    ],
)
def test_parts_that_do_not_fit_are_refused(folder: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises((SourceError, UnsupportedError), match=said):
        edited(folder, **changes)


def test_another_noise_or_class_is_refused() -> None:
    material = arch_material("arch:tiny-sd3")
    with pytest.raises(UnsupportedError, match="_class_name is 'DDIMScheduler'"):
        assemble(replace(material, scheduler={"_class_name": "DDIMScheduler"}))
    with pytest.raises(UnsupportedError, match="'StableDiffusion3PAGPipeline', which is not drawn here"):
        assemble(replace(material, index={"_class_name": "StableDiffusion3PAGPipeline"}))
    with pytest.raises(SourceError, match="unknown suffix 'lcm'"):
        arch_material("arch:tiny-sd3+lcm")


@pytest.mark.parametrize("words", ["layout --set name=bk-tiny", "prune --set keep=0.5", "lora --set files=none"])
def test_passes_for_u_nets_are_refused(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from diffship.cli.main import main

    code = main(["compress", "arch:tiny-sd3", "-o", str(tmp_path / "out"), "--pass", *words.split()])
    assert code == 3 and "SD3Transformer2DModel; legal: UNet2DConditionModel" in capsys.readouterr().err


def test_a_t5_that_the_folder_names_and_has_not_is_missing(folders: dict[str, Path], tmp_path: Path) -> None:
    """Zeros in its place would be another picture, silently."""
    copy = shutil.copytree(folders["with T5"], tmp_path / "cut")
    shutil.rmtree(copy / "text_encoder_3")
    with pytest.raises(SourceError, match="has no text_encoder_3"):
        open_source(str(copy))
    index = json.loads((copy / "model_index.json").read_text())
    left_out = {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (copy / "model_index.json").write_text(json.dumps({**index, **left_out}))
    pipeline = open_source(str(copy))
    assert list(pipeline.texts) == PARTS[:2] and "tokenizer_3" not in pipeline.tokenizers


# ---- the bundle


@pytest.mark.slow
def test_every_part_and_the_trajectory_are_proved(bundle: Bundle) -> None:
    proofs = {part.name: part.proof["status"] for part in bundle.manifest.parts}
    assert proofs == dict.fromkeys(PARTS, "proved")
    assert Family.from_json(bundle.manifest.family.to_json()).kind.name == "sd3"


@pytest.mark.slow
def test_onnxruntime_draws_stocks_picture(bundle: Bundle, stocks: dict[str, Any]) -> None:
    with opened(bundle) as model:
        (picture,) = generate(model, asked((96, 64)))
        with pytest.raises(UnsupportedError, match="draw with flow-euler, flow-heun"):
            generate(model, Request(PROMPT, sampler="ddim"))
    assert psnr(picture.pixels, stock_picture(stocks["with T5"], "euler", (96, 64), 7.0)) >= LEAST_DB


@pytest.mark.slow
def test_a_split_over_the_wire_is_the_whole(bundle: Bundle) -> None:
    from diffship.runtimes.handoff.arrival import check_arrival
    from diffship.runtimes.handoff.router import Router, begin, draw

    with opened(bundle) as first, opened(bundle) as second:
        (whole,) = generate(first, asked((96, 64)))
        router = Router([first, second], (1, 2))
        (split,) = draw(router, begin(router, asked((96, 64))))
        assert np.array_equal(whole.pixels, split.pixels)
        half = denoise(start(first, asked((96, 64))), denoiser_of(first), until=2)[0]
        arrived = unpack(pack(half))
        assert set(arrived.positive or ()) == {"encoder_hidden_states", "pooled_projections"}
        assert check_arrival(arrived, second) == ()
        (end,) = denoise([arrived], denoiser_of(second))
        assert np.array_equal(end.latents, whole.trajectory.latents)


@pytest.mark.slow
def test_the_server_draws_what_generate_draws(bundle: Bundle) -> None:
    with opened(bundle) as model:
        require_served(model, Request(PROMPT, negative=NEGATIVE, seed=3, steps=3))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_verify_draws_the_golden_trajectory_again(bundle: Bundle, engine: str) -> None:
    require_verified(bundle, engine)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_16_bits_are_proved(precision: str, tmp_path: Path, graphs_folder: Path) -> None:
    from diffship.cli.main import main

    words = ["--precision", precision, "-o", str(tmp_path / "made"), "--cache", str(graphs_folder), "--quiet"]
    assert main(["export", "arch:tiny-sd3", "--to", "onnx", *words]) == 0
