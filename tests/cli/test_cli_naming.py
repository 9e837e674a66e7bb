"""Where pictures and results go: names that tell experiments apart, templates, and nothing that is replaced unasked."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.cli.drawing import save, wanted
from diffship.cli.main import main, parse
from diffship.cli.naming import Names, slug
from diffship.cli.places import FIELDS, refuse_taken
from diffship.core.errors import ConfigError
from diffship.sampling.picture import Picture, read_settings
from diffship.sampling.request import Request


def options_of(*words: object) -> argparse.Namespace:
    return parse(["run", *map(str, words)])


def names(*words: object, images: int = 1) -> list[str]:
    """What the pictures of a command are called that leaves nothing in `{field}`s to its model."""
    from diffship.cli.flags import request_fields

    options = options_of(*words)
    requests = [Request(prompt, **request_fields(options)) for prompt in options.prompts]
    pictures = [fields for index, request in enumerate(requests) for fields in wanted(options, request, index)]
    found = Names(options).places(pictures)
    assert found is not None
    return [file.as_posix() for file in found]


def test_the_usual_name_has_prompt_seed_and_model() -> None:
    assert names("out/emoji", "Red apple!", "../../etc", "--images", 2, "--seed", 7, "-o", "o") == [
        "o/000-red-apple-7-emoji.png",
        "o/000-red-apple-8-emoji.png",
        "o/001-etc-7-emoji.png",
        "o/001-etc-8-emoji.png",
    ]
    assert names("D", "x", "-o", "o.png") == ["o.png"]


def test_every_experiment_has_a_name_of_its_own() -> None:
    changes = (
        "--guidance 4|--guidance 4.5|--sampler euler|--negative blue|--negative red|--steps 6|--size 64|--size 64x128"
    )
    changes += "|--spacing trailing|--rng philox|--memory low|--strength 0.5|--engine torch|--device cuda|--image a.png"
    changes += "|--mask b.png|--large L --split 1,2|--large L --split 2,1|--large M --split 1,2|--seed 1"
    made = [names("D", "x", *change.split()) for change in ["", *changes.split("|")]] + [names("E", "x")]
    assert len({name for (name,) in made}) == len(changes.split("|")) + 2


def test_words_that_a_name_cannot_hold_are_told_apart() -> None:
    assert slug("Red apple!") == "red-apple" and slug("") == slug("!") == "picture"
    long = "a photo of a lighthouse in a storm, oil on canvas, "
    for one, other in ((long + "4k", long + "8k"), ("\u732b", "\u72ac"), ("caf\u00e9", "caf\u00e8")):
        assert slug(one) != slug(other) and len(slug(one)) <= 40 and slug(one).isascii()


def test_fields_of_a_template() -> None:
    form = "{prompt}/{seed}-{sampler}-{steps}-{guidance}-{size}-{negative}-{model}-{engine}.png"
    words = ["out/emoji", "a b", "--sampler", "lcm", "--steps", 4, "--guidance", 1, "--size", "64x128"]
    assert names(*words, "--engine", "torch", "-o", f"o/{form}") == ["o/a-b/0-lcm-4-1-64x128-none-emoji-torch.png"]
    assert names("D", "x", "-o", "{sampler}", "--sampler", "lcm") == ["lcm/000-x-0-d-lcm.png"]
    assert names("D", "x", "-o", "{{{seed}}}.png") == ["{0}.png"]


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("{samplr}.png", "unknown field {samplr}; fields are index, image, prompt, seed, "),
        ("{}.png", "unknown field {}"),
        ("{seed:d}.png", "{seed} takes no form"),
        ("{seed.__class__}.png", "unknown field {seed.__class__}"),
        ("{seed.png", "fields are index"),
        ("one.png", "one file for 2 pictures"),
        ("{prompt}.png", "two of -o would be written to one file, cat.png: a template with {index}"),
    ],
)
def test_templates_are_refused_by_name(form: str, message: str) -> None:
    with pytest.raises(ConfigError) as fault:
        names("D", "cat", "cat", "-o", form)
    assert message in str(fault.value)


@pytest.mark.slow
def test_what_only_the_model_knows_waits_for_it(command: Any, tiny_bundle: Path, tmp_path: Path) -> None:
    form = tmp_path / "{prompt}-{sampler}-{steps}-{guidance}-{size}-{engine}.png"
    words = ["run", tiny_bundle, "red apple", "--steps", 1, "--size", 64, "-o", form]
    document = command(*words)
    assert document["exit_code"] == 0, document
    (file,) = tmp_path.iterdir()
    settings = read_settings(file)
    size = f"{settings['width']}x{settings['height']}"
    assert file.name == f"red-apple-{settings['sampler']}-1-{settings['guidance']:g}-{size}-onnxruntime.png"
    before = file.read_bytes()
    assert "exists already" in command(*words, "--seed", 3)["error"]["message"] and file.read_bytes() == before
    assert command(*words, "--seed", 3, "--overwrite")["exit_code"] == 0 and file.read_bytes() != before
    assert set(document["pictures"][0]) >= {"file"} and {"load_seconds", "picture_seconds"} <= set(document)


KEPT = {
    "a picture": (["run", "B", "x", "-o", "kept.png"], "-o kept.png exists already"),
    "a link to nothing": (["run", "B", "x", "-o", "link.png"], "-o link.png exists already"),
    "a grid": (["run", "B", "x", "-o", "a.png", "--grid", "kept.png"], "--grid kept.png exists already"),
    "a trajectory": (["run", "B", "x", "-o", "a.png", "--save-trajectory", "kept.png"], "--save-trajectory kept.png"),
    "a pipe": (
        ["run", "B", "x", "-o", "a.png", "--grid", "pipe", "--overwrite"],
        "--grid pipe is a device, pipe or socket, which is never replaced",
    ),
    "a pipe for the trajectory": (
        ["run", "B", "x", "-o", "a.png", "--save-trajectory", "pipe", "--overwrite"],
        "--save-trajectory pipe is a device, pipe or socket",
    ),
    "the grid over the picture": (
        ["run", "B", "x", "-o", "a.png", "--grid", "./a.png", "--overwrite"],
        "-o and --grid would be written to one file",
    ),
    "a cloud's picture": (
        ["run", "B", "x", "-o", "kept.png", "--cloud", "http://127.0.0.1:9", "--split", "1,1"],
        "-o kept.png exists already",
    ),
    "a comparison": (["compare", "B", "B", "--grid", "kept.png"], "--grid kept.png exists already"),
    "results": (["bench", "B", "-o", "kept.png"], "-o kept.png exists already"),
    "a table": (["bench", "B", "--csv", "kept.png"], "--csv kept.png exists already"),
    "a table over a table": (["bench", "B", "--csv", "a", "--markdown", "a"], "--csv and --markdown would be written"),
    "plots": (["bench", "B", "--plots", "plots"], "--plots plots/bench-memory.png exists already"),
    "scores": (
        [
            "compress",
            "emoji",
            "--pass",
            "significance",
            "--set",
            "parameters=0.5",
            "--set",
            "scores_out=kept.png",
            "-o",
            "new",
        ],
        "scores_out kept.png exists already",
    ),
}


@pytest.mark.parametrize("case", KEPT)
def test_nothing_is_replaced_unasked(
    case: str, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, message = KEPT[case]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.png").write_bytes(b"kept")
    (tmp_path / "link.png").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "bench-memory.png").write_bytes(b"kept")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    for place in ("runtimes.engines.model.open_model", "cli.bench._measured", "compress._opened"):
        monkeypatch.setattr(f"diffship.{place}", lambda *_, **__: pytest.fail("it was begun"))
    assert main([str(tiny_bundle) if word == "B" else word for word in words]) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    assert (tmp_path / "kept.png").read_bytes() == b"kept"


def test_overwrite_replaces_and_says_so_in_help(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a").touch()
    refuse_taken([("-o", tmp_path / "a"), ("--grid", tmp_path / "b")], overwrite=True)
    for verb in ("run", "compare", "bench"):
        assert main([verb, "--help"]) == 0
        assert "--overwrite" in capsys.readouterr().out
    assert main(["run", "--help"]) == 0
    told = capsys.readouterr().out
    assert all(f"\n  {name} " in told for name in FIELDS)


def test_a_picture_whose_name_was_taken_while_it_was_drawn_is_kept_and_so_is_the_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = Picture(np.zeros((8, 8, 3), np.uint8), {"prompt": "cat", "seed": 1})
    file, options = tmp_path / "out" / "cat.png", argparse.Namespace(overwrite=False, no_metadata=False)
    assert save(picture, file, options).file == file
    before = file.read_bytes()
    other = save(replace(picture, settings={"prompt": "cat", "seed": 2}), file, options)
    assert other.file == tmp_path / "out" / "cat-2.png" and read_settings(other.file)["seed"] == 2
    assert file.read_bytes() == before
    assert f"{file} was written by someone else meanwhile and is kept; this picture is {other.file}" in (
        capsys.readouterr().err
    )
    assert save(picture, other.file, argparse.Namespace(overwrite=True, no_metadata=False)).file == other.file
    assert read_settings(other.file)["seed"] == 1 and len(list(file.parent.iterdir())) == 2
