"""Pictures of `diffship run` against those of stock diffusers, both at their defaults, of folders that people have."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from stock_folders import CASES, Case, table, write

from diffship.cli.main import main

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = {"guidance": "guidance_scale", "negative": "negative_prompt", "strength": "strength"}
LEAST_DB = 60.0
PAGE = Path(__file__).parents[2] / "docs" / "stock.md"


def _params() -> list[Any]:
    return [pytest.param(case, id=case.name, marks=() if case.quick else pytest.mark.slow) for case in CASES]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("stock")


@pytest.mark.slow
@pytest.mark.parametrize("case", _params())
def test_a_picture_is_stocks_or_refused_by_file_and_key(
    case: Case, bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(case, bases, tmp_path / "model")
    if "inpaint" in case.base:
        save_image_and_mask(tmp_path)
    code = main(["run", str(folder), case.prompt, "-o", str(tmp_path / "ours.png"), "-q", *flags(case, tmp_path)])
    said = capsys.readouterr().err
    if case.refused is not None:
        assert code in (2, 3) and not (tmp_path / "ours.png").exists()
        assert all(word in said for word in case.refused), said
        return
    assert code == 0 and case.said in said, said
    ours, theirs = np.asarray(Image.open(tmp_path / "ours.png")), stock(case, folder, tmp_path)
    assert ours.shape == theirs.shape and ours.std() > 1
    assert psnr(ours, theirs) >= LEAST_DB


@pytest.mark.slow
@pytest.mark.parametrize("name", ["textual inversion of three", "[8, 12]", "SDXL inpainting: Euler, its"])
def test_a_bundle_draws_it_as_its_folder_does(
    name: str, bases: Path, tmp_path: Path, graphs_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is repaired and what is default lies in the bundle: an engine without torch draws the same."""
    (case,) = [case for case in CASES if name in case.name]
    folder = write(case, bases, tmp_path / "model")
    save_image_and_mask(tmp_path)
    words = ["--cache", str(graphs_folder), "--no-verify", "--trajectory", "0", "-q"]
    assert main(["export", str(folder), "--to", "onnx", "-o", str(tmp_path / "onnx"), *words]) == 0
    words = ["-o", str(tmp_path / "ours.png"), "-q", "--engine", "onnxruntime", *flags(case, tmp_path)]
    assert main(["run", str(tmp_path / "onnx"), case.prompt, *words]) == 0, capsys.readouterr().err
    assert psnr(np.asarray(Image.open(tmp_path / "ours.png")), stock(case, folder, tmp_path)) >= LEAST_DB


def flags(case: Case, folder: Path) -> list[str]:
    words = ["--seed", "1", *([] if case.steps is None else ["--steps", str(case.steps)])]
    words += [] if case.sampler is None else ["--sampler", case.sampler[0]]
    for name, value in case.ask.items():
        words += [f"--{name}", str(value)]
    if "inpaint" in case.base:
        words += ["--image", str(folder / "image.png"), "--mask", str(folder / "mask.png")]
    return words


def save_image_and_mask(folder: Path) -> None:
    """A gradient, and a mask in colours of which one is brighter than half and one darker."""
    pixels = np.stack(np.broadcast_arrays(*np.mgrid[0:256:4, 0:256:4], 90), -1).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:, 24:48], mask[:, 48:] = (0, 255, 0), (255, 0, 0)  # green is 150 of 255 in grey, red 76
    Image.fromarray(mask).save(folder / "mask.png")


def stock(case: Case, folder: Path, pictures: Path) -> Any:
    kind, more = getattr(diffusers, case.stock_class), {}
    asked = {NAMES[name]: value for name, value in case.ask.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if case.sampler is not None:
            sampler = getattr(diffusers, case.sampler[1])
            more["scheduler"] = sampler.from_config(sampler.load_config(folder / "scheduler"))
        if case.base != "lcm" and "sdxl" not in case.base:
            more["safety_checker"] = None
        pipe = kind.from_pretrained(folder, **more)
        pipe.set_progress_bar_config(disable=True)
        pipe.watermark = None
        if "inpaint" in case.base:
            size = (64, 64)
            asked |= {"image": Image.open(pictures / "image.png"), "mask_image": Image.open(pictures / "mask.png")}
            assert asked["image"].size == size
        if case.steps is not None:
            asked["num_inference_steps"] = case.steps
        made = pipe(case.prompt, generator=torch.Generator().manual_seed(1), output_type="np", **asked)
    return np.round(made.images[0] * 255).astype(np.uint8)


def psnr(a: Any, b: Any) -> float:
    return float(10 * np.log10(255.0**2 / max(np.mean((a.astype(np.float64) - b) ** 2), 1e-9)))


def test_the_page_has_the_table_of_these_folders() -> None:
    page = PAGE.read_text(encoding="utf-8")
    found = re.search(r"<!-- folders -->\n(.*?)\n<!-- /folders -->", page, re.DOTALL)
    assert found is not None and found[1] == table(), "write tests/sampling/stock_folders.py's table() into the page"
    assert len(CASES) >= 30 and sum(case.quick for case in CASES) <= 8
