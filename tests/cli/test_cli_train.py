"""The train verb: what it says of its data, and where it stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffship.cli.main import main
from diffship.cli.train import STEPPED, told


@pytest.mark.parametrize("stage", STEPPED)
def test_data_that_was_not_prepared_names_the_stage_that_does(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", stage, "--data", str(tmp_path), "-o", str(tmp_path / "runs")]) == 2
    line = capsys.readouterr().err
    assert "has no metadata.jsonl. Run first: diffship train emoji-data --data ARCHIVES" in line
    assert not (tmp_path / "runs").exists()


def test_help_says_what_data_is_to_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    for words in ("what emoji-data wrote", "the npm archives", "for emoji-pack the runs", "a packed family"):
        assert words in text


def test_a_stage_that_stopped_early_says_how_far_it_came() -> None:
    figures = {"stage": "unet", "step": 13}
    assert told(figures, 6000) == "stage: unet\nstep: 13 of 6000; time is up, the same command goes on"
    assert told({"stage": "unet", "step": 6000}, 6000) == "stage: unet\nstep: 6000"
    assert told({"pictures": 28}, 0) == "pictures: 28"


@pytest.mark.slow
def test_minutes_end_a_stage_with_the_step_and_the_goal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torch")
    from PIL import Image

    record = {"style": "fluent", "domain": True, "concept": "apple", "text": "red apple", "tags": [], "tone": None}
    lines = []
    for name, split in (("a.png", "train"), ("b.png", "held_out")):
        Image.new("RGB", (128, 128), "red").save(tmp_path / name)
        lines.append(json.dumps({**record, "file_name": name, "split": split}))
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    words = ["--data", str(tmp_path), "-o", str(tmp_path / "runs"), "--minutes", "0.0001", "--steps", "6000"]
    assert main(["train", "emoji-vae", *words]) == 0
    out = capsys.readouterr().out
    assert "of 6000; time is up, the same command goes on" in out
