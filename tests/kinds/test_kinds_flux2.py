"""FLUX.2-klein beside stock diffusers: source, conditioning, positions, shift, pictures; its bundle on every path."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_checks import require_served, require_verified
from numpy.typing import NDArray

from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError
from diffship.core.family import Family
from diffship.kinds.flux2 import empirical_shift, image_places, rope_angles, text_places
from diffship.sampling.generate import Request, generate, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.qwen_tokenizer import LENGTH
from diffship.sampling.wire import pack, unpack

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")
pytest.importorskip("onnxruntime")

from diffship.models.assemble import assemble  # noqa: E402
from diffship.models.model import PipelineModel  # noqa: E402
from diffship.models.saving import save  # noqa: E402
from diffship.models.sources.arch import arch_material  # noqa: E402
from diffship.models.sources.opening import open_source  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
LEAST_DB = 60.0
PROMPT = "a red fox, painting"
PARTS = ["text_encoder", "transformer", "vae_encoder", "vae_decoder"]
LAYERS = (1, 2, 4)  # of the tiny encoder; stock diffusers is told by its caller
WIDE, HIGH = (96, 64), (64, 96)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Diffusers folders of the tiny model as it is, distilled, and of one that takes guidance.

    The statistics of the latents are far from 0 and 1 in both.
    """
    from diffship.core.weights import MemoryWeights

    home, material = tmp_path_factory.mktemp("flux2"), arch_material("arch:tiny-flux2")
    vae = material.modules["vae"]
    tensors = {name: vae.weights.read(name) for name in vae.weights.names()}
    far = np.random.default_rng(3)
    tensors |= {"bn.running_mean": far.normal(0, 0.5, 16).astype(np.float32)}
    tensors |= {"bn.running_var": far.uniform(0.3, 3, 16).astype(np.float32)}
    modules = {**material.modules, "vae": replace(vae, weights=MemoryWeights(tensors))}
    made = {}
    for name, distilled in (("distilled", True), ("guided", False)):
        index = {**material.index, "is_distilled": distilled}
        made[name] = save(assemble(replace(material, modules=modules, index=index)), home / name)
    return made


@pytest.fixture(scope="module")
def stocks(folders: dict[str, Path]) -> dict[str, Any]:
    """The same opened by stock diffusers."""
    made = {name: diffusers.Flux2KleinPipeline.from_pretrained(folder) for name, folder in folders.items()}
    for pipe in made.values():
        pipe.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def expected(stocks: dict[str, Any]) -> NDArray[Any]:
    """What stock draws of the distilled one."""
    return stock_picture(stocks["distilled"], WIDE)


@pytest.fixture(scope="module")
def opened_source(folders: dict[str, Path]) -> Iterator[PipelineModel]:
    """The distilled one on torch."""
    with PipelineModel(open_source(str(folders["distilled"]))) as model:
        yield model


@pytest.fixture(scope="module")
def bundle(shared: Path, graphs_folder: Path, folders: dict[str, Path]) -> Bundle:
    """Exported to ONNX, which proves every part and a trajectory."""
    from filelock import FileLock

    from diffship.cli.main import main

    folder = shared / "tiny-flux2"
    with FileLock(shared / "tiny-flux2.lock"):
        if not folder.exists():
            words = ["--to", "onnx", "-o", str(folder), "--trajectory", "2", "--cache", str(graphs_folder), "--quiet"]
            assert main(["export", str(folders["distilled"]), *words]) == 0
    return Bundle.open(folder)


def psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(255.0**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


def noise(size: tuple[int, int]) -> NDArray[np.float32]:
    width, height = size
    return np.random.default_rng(5).standard_normal((1, 16, height // 16, width // 16)).astype(np.float32)


def stock_picture(pipe: Any, size: tuple[int, int], steps: int = 4, guidance: float = 1.0) -> NDArray[Any]:
    asked = {"width": size[0], "height": size[1], "num_inference_steps": steps, "guidance_scale": guidance}
    latents = torch.from_numpy(noise(size))
    made = pipe(prompt=PROMPT, text_encoder_out_layers=LAYERS, latents=latents, output_type="np", **asked).images[0]
    return np.asarray(np.round(made * 255))


def asked(size: tuple[int, int], steps: int = 4, guidance: float | None = None) -> Request:
    return Request(PROMPT, steps=steps, guidance=guidance, size=size, latents=noise(size))


def opened(bundle: Bundle) -> Any:
    from diffship.runtimes.engines.model import BundleModel

    return BundleModel(bundle)


# ---- beside stock diffusers


@pytest.mark.parametrize(
    ("name", "size", "steps", "guidance"),
    [
        *(("distilled", WIDE, 4, 1.0), ("guided", HIGH, 3, 4.0)),
        pytest.param("distilled", (64, 64), 1, 1.0, marks=pytest.mark.slow),
        pytest.param("guided", WIDE, 3, 1.0, marks=pytest.mark.slow),
        pytest.param("guided", (128, 96), 12, 2.0, marks=pytest.mark.slow),
    ],
)
def test_a_picture_is_stocks(
    name: str, size: tuple[int, int], steps: int, guidance: float, folders: dict[str, Path], stocks: dict[str, Any]
) -> None:
    with PipelineModel(open_source(str(folders[name]))) as model:
        (picture,) = generate(model, asked(size, steps, guidance))
    assert picture.pixels.shape == (size[1], size[0], 3) and picture.pixels.std() > 1
    assert psnr(picture.pixels, stock_picture(stocks[name], size, steps, guidance)) >= LEAST_DB


def test_a_static_shift_has_the_same_levels_before_it(folders: dict[str, Path], stocks: dict[str, Any]) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    pipeline = replace(open_source(str(folders["distilled"])), scheduler=config)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_config(config)
    stock = diffusers.Flux2KleinPipeline(
        **{**stocks["distilled"].components, "scheduler": scheduler}, is_distilled=True
    )
    stock.set_progress_bar_config(disable=True)
    with PipelineModel(pipeline) as model:
        (picture,) = generate(model, asked((64, 64), 3))
    assert psnr(picture.pixels, stock_picture(stock, (64, 64), 3)) >= LEAST_DB


def test_conditioning_is_stocks(folders: dict[str, Path], stocks: dict[str, Any]) -> None:
    with torch.no_grad():
        expected, _ = stocks["distilled"].encode_prompt([PROMPT, "", "on " * 600], text_encoder_out_layers=LAYERS)
    with PipelineModel(open_source(str(folders["distilled"]))) as model:
        made = [model.family.kind.encode(model, text, (64, 64)) for text in (PROMPT, "", "on " * 600)]
    for (mine, _), theirs in zip(made, expected, strict=True):
        assert mine["encoder_hidden_states"].shape == (LENGTH, 48)
        np.testing.assert_allclose(mine["encoder_hidden_states"], theirs.numpy(), atol=2e-5)
    assert [len(warnings) for _, warnings in made] == [0, 0, 1]
    assert "512 are used" in made[2][1][0]


@pytest.mark.parametrize("shape", [(128, 3, 5), (128, 7, 2)])
def test_positions_are_those_of_stock(shape: tuple[int, int, int]) -> None:
    from diffusers.models.transformers.transformer_flux2 import Flux2PosEmbed

    pipe, stock = diffusers.Flux2KleinPipeline, Flux2PosEmbed(2000, (32, 32, 32, 32))
    sides = {
        "image": (image_places(shape), pipe._prepare_latent_ids(torch.zeros(1, *shape))),
        "text": (text_places(9), pipe._prepare_text_ids(torch.zeros(1, 9, 4))),
    }
    for ours, theirs in sides.values():
        assert np.array_equal(ours, theirs[0].numpy())
        cos, sin = stock(theirs[0])
        turns = rope_angles(ours, 128)
        np.testing.assert_allclose(np.cos(turns), cos.numpy(), atol=1e-7)
        np.testing.assert_allclose(np.sin(turns), sin.numpy(), atol=1e-7)


def test_the_shift_is_that_of_stock() -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    for tokens in (4, 256, 1024, 4096, 4300, 4301, 16384):
        for steps in (1, 4, 10, 50, 150):
            assert empirical_shift(tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), abs=1e-12)


# ---- faults that a picture's proof must see


@pytest.mark.parametrize("fault", ["text ignored", "one token off", "axes exchanged", "shift", "statistics", "patches"])
def test_a_fault_is_seen(
    fault: str, opened_source: PipelineModel, expected: NDArray[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffship.kinds import flux2

    def exchanged(shape: Any) -> Any:
        return image_places(shape)[:, [0, 2, 1, 3]]

    def unmixed(self: Any, family: Family, latents: Any) -> Any:
        return latents.reshape(1, 4, 2 * latents.shape[2], 2 * latents.shape[3])

    kind = flux2.Flux2Klein
    changes: dict[str, tuple[Any, str, Any]] = {
        "text ignored": (
            kind,
            "encode",
            lambda self, *_, **__: ({"encoder_hidden_states": np.zeros((512, 48), "f4")}, ()),
        ),
        "one token off": (flux2, "text_places", lambda tokens: text_places(tokens + 1)[1:]),
        "axes exchanged": (flux2, "image_places", exchanged),
        "shift": (flux2, "empirical_shift", lambda tokens, steps: empirical_shift(tokens, 50)),
        "statistics": (flux2, "_by_channel", lambda numbers: np.float32(1.0)),
        "patches": (kind, "decoder_latents", unmixed),
    }
    monkeypatch.setattr(*changes[fault])
    (picture,) = generate(opened_source, asked(WIDE))
    assert psnr(picture.pixels, expected) < LEAST_DB - 5


# ---- guidance


def test_a_distilled_model_is_not_guided_and_says_so(folders: dict[str, Path]) -> None:
    distilled, guided = (open_source(str(folders[name])).family for name in ("distilled", "guided"))
    assert (distilled.guidance_default, distilled.steps_default, distilled.guided) == (1.0, 4, False)
    assert (guided.guidance_default, guided.steps_default, guided.guided) == (4.0, 50, True)
    with PipelineModel(open_source(str(folders["distilled"]))) as model:
        (begun,) = start(model, asked((64, 64), 4, 4.0))
        (negated,) = start(model, replace(asked((64, 64)), negative="grey"))
    assert begun.guidance == 1.0 and begun.negative is None
    assert begun.facts["warnings"] == ["guidance 4 is not used: this model is distilled to draw without guidance"]
    assert negated.facts["warnings"][0].startswith("the negative prompt is not used: this model is distilled")


def test_a_batch_of_one_number_of_tokens_and_two_shapes_is_refused(folders: dict[str, Path]) -> None:
    """Its rows would be equally long, and the tokens of one of the pictures would stand elsewhere."""
    with PipelineModel(open_source(str(folders["distilled"]))) as model:
        batch = [start(model, asked(size))[0] for size in (WIDE, HIGH)]
        with pytest.raises(ConfigError, match="latents have different shapes"):
            denoise(batch, denoiser_of(model))


# ---- the bundle


@pytest.mark.slow
def test_every_part_and_the_trajectory_are_proved(bundle: Bundle) -> None:
    proofs = {part.name: part.proof["status"] for part in bundle.manifest.parts}
    assert proofs == dict.fromkeys(PARTS, "proved")
    assert Family.from_json(bundle.manifest.family.to_json()) == bundle.manifest.family
    inputs = {spec.name: spec.shape for spec in bundle.part("transformer").inputs}
    assert inputs["hidden_states"] == ("batch_size", "image_tokens", 16)
    assert inputs["image_rope_cos"] == ("image_tokens", 16)


@pytest.mark.slow
@pytest.mark.parametrize("size", [WIDE, (64, 128)])
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_draws_stocks_picture(
    engine: str, size: tuple[int, int], bundle: Bundle, stocks: dict[str, Any]
) -> None:
    from diffship.runtimes.engines.model import BundleModel

    pytest.importorskip(engine)
    with BundleModel(bundle, engine=engine) as model:
        (picture,) = generate(model, asked(size))
    assert psnr(picture.pixels, stock_picture(stocks["distilled"], size)) >= LEAST_DB


@pytest.mark.slow
def test_tiles_and_a_split_over_the_wire(bundle: Bundle) -> None:
    from diffship.runtimes.handoff.arrival import check_arrival
    from diffship.runtimes.handoff.router import Router, begin, draw

    with opened(bundle) as first, opened(bundle) as second:
        (whole,) = generate(first, asked(WIDE))
        router = Router([first, second], (1, 3))
        (split,) = draw(router, begin(router, asked(WIDE)))
        assert np.array_equal(whole.pixels, split.pixels)
        half = denoise(start(first, asked(WIDE)), denoiser_of(first), until=2)[0]
        arrived = unpack(pack(half))
        assert set(arrived.positive or ()) == {"encoder_hidden_states"}  # positions are computed where they are used
        assert check_arrival(arrived, second) == ()
        (end,) = denoise([arrived], denoiser_of(second))
        assert whole.trajectory is not None and np.array_equal(end.latents, whole.trajectory.latents)
        (tiled,) = generate(first, Request(PROMPT, steps=1, size=(64, 272), memory="low"))
        assert tiled.settings["decoded"].startswith("tiles of 32") and tiled.pixels.shape == (272, 64, 3)


@pytest.mark.slow
def test_the_server_draws_what_generate_draws(bundle: Bundle) -> None:
    with opened(bundle) as model:
        require_served(model, Request(PROMPT, seed=3))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_verify_draws_the_golden_trajectory_again(bundle: Bundle, engine: str) -> None:
    require_verified(bundle, engine)


@pytest.mark.slow
def test_half_precision_is_proved_with_positions_in_full(tmp_path: Path, graphs_folder: Path) -> None:
    from diffship.cli.main import main

    words = ["--precision", "fp16", "--parts", "transformer", "-o", str(tmp_path / "made"), "--quiet"]
    assert main(["export", "arch:tiny-flux2", "--to", "onnx", "--cache", str(graphs_folder), *words]) == 0
    types = {spec.name: spec.dtype for spec in Bundle.open(tmp_path / "made").part("transformer").inputs}
    assert types["hidden_states"] == "float16" and types["text_rope_sin"] == types["timestep"] == "float32"
