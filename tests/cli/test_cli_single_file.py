"""A checkpoint in one file on the command line: every verb that takes a source takes it."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("torch")
sys.path.insert(0, str(Path(__file__).parents[1] / "models"))

import ldm_writer as writer

from diffship.models.saving import save
from diffship.models.sources.opening import open_source


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """tiny-sd as a file and as a folder."""
    place, pipeline = tmp_path_factory.mktemp("single"), open_source("arch:tiny-sd")
    file = writer.write(place / "my_model.safetensors", writer.checkpoint(pipeline))
    return file, save(pipeline, place / "folder")


@pytest.mark.slow
def test_run_draws_what_the_folder_draws(command: Any, model: tuple[Path, Path], tmp_path: Path) -> None:
    pictures = []
    for number, source in enumerate(model):
        made = command("run", source, "red apple", "--steps", 1, "-o", tmp_path / f"{number}.png")
        assert made["exit_code"] == 0, made
        pictures.append(np.asarray(Image.open(tmp_path / f"{number}.png")))
    assert np.array_equal(*pictures)


@pytest.mark.slow
def test_inspect_and_compress_take_it(command: Any, model: tuple[Path, Path]) -> None:
    file, folder = model
    one, other = command("inspect", file), command("inspect", folder)
    assert one["exit_code"] == 0 and one["parts"] == other["parts"] and one["source"]["kind"] == "file"
    words = ["--pass", "layout", "--set", "name=bk-tiny", "--dry-run", "--no-timing"]
    assert command("compress", file, *words)["plan"] == command("compress", folder, *words)["plan"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["run", "FILE", "x", "--engine", "onnxruntime"], 3, "Run: diffship export"),
        (["run", "FILE", "x", "--prediction", "noise"], 2, "--prediction"),
        (["run", "FILE", "x", "--vae", "arch:tiny-sd3"], 2, "latent_channels is 16, and that of the model 4"),
        (["export", "FILE", "-o", "OUT", "--ema"], 2, "averaged (EMA) weights are not in it"),
        (["export", "PICKLE", "-o", "OUT"], 2, "Look for a .safetensors file of the same model"),
        (["compare", "PICKLE", "FILE"], 2, "Look for a .safetensors file of the same model"),
        (["inspect", "FILE", "--base", "CUT"], 2, "cut short"),
        (["run", "CUT", "x"], 2, "cut short"),
    ],
)
def test_one_line_says_what_is_wrong(
    words: list[str], code: int, told: str, command: Any, model: tuple[Path, Path], tmp_path: Path
) -> None:
    places = {
        "FILE": model[0],
        "OUT": tmp_path / "out",
        "PICKLE": tmp_path / "old.ckpt",
        "CUT": tmp_path / "cut.safetensors",
    }
    places["PICKLE"].write_bytes(pickle.dumps({"state_dict": {}}))
    places["CUT"].write_bytes(model[0].read_bytes()[:-4])
    made = command(*[places.get(word, word) for word in words])
    assert (made["exit_code"], told in made["error"]["message"]) == (code, True), made["error"]


def test_a_bundle_is_not_read_in_another_way(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    made = command("run", tiny_bundle, "x", "--ema", "-o", tmp_path / "a.png")
    assert made["exit_code"] == 2 and "--ema: for one model, and a source" in made["error"]["message"]
