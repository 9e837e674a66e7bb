from __future__ import annotations

import argparse
import dataclasses
import io
import os
import sys
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image, ImageFont

from diffship.cli import doctor
from diffship.cli.compress import fitting
from diffship.cli.export import _target, _warn_of_loose
from diffship.cli.flags import add_fields, given_fields, names, setting, size, worded
from diffship.cli.main import main
from diffship.cli.output import figure, jsonable, size_text, table
from diffship.cli.pass_help import option_texts
from diffship.cli.prompts import read_prompts
from diffship.core.compare import Tolerance, picture_psnr
from diffship.core.errors import ConfigError
from diffship.core.outcome import outcome
from diffship.core.precision import FP16, FP32
from diffship.core.registry import EXPORTERS, PASSES, load
from diffship.core.strict import choices, plain_value
from diffship.exporters.tolerances import method
from diffship.sampling.grid import grid, png_bytes, wrapped


@pytest.mark.parametrize(
    ("text", "expected"), [("512", (512, 512)), ("512x768", (512, 768)), ("64X128", (64, 128)), ("7x", (7, 7))]
)
def test_size(text: str, expected: tuple[int, int]) -> None:
    assert size(text) == expected


@pytest.mark.parametrize("text", ["", "x", "axb", "1x2x3", "1.5", "x8"])
def test_size_refuses(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="is not N or WxH"):
        size(text)


def test_a_float32_part_that_is_held_loosely_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    for precision, loosened in ((FP32, True), (FP32, False), (FP16, False)):
        golden = SimpleNamespace(method=method(precision, loosened), tolerance=Tolerance(atol=1.0, psnr_db=71.5))
        _warn_of_loose([SimpleNamespace(name="unet", golden=golden), SimpleNamespace(name="vae_decoder", golden=None)])
        told = "unet enlarges rounding errors: as a whole it is held to 71.5 dB, and not the usual 100"
        assert (told in capsys.readouterr().err) == loosened


def test_settings_and_names() -> None:
    assert setting("threads=2") == ("threads", 2)
    assert setting("memory-pattern=false") == ("memory_pattern", False)
    assert setting("a=b=c") == ("a", "b=c")
    assert plain_value("1e-3") == 1e-3 and plain_value("cpu") == "cpu"
    assert names("unet, vae_decoder,") == ("unet", "vae_decoder")


@dataclass(frozen=True)
class Options:
    precision: str = field(default="fp32", metadata=choices("fp32", "fp16"))
    opset: int = 23
    verify: bool = True
    scale: float | None = None
    parts: tuple[str, ...] = ()


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(exit_on_error=False)
    add_fields(made, Options, "options")
    return made


def test_flags_of_a_dataclass() -> None:
    words = ["--precision", "fp16", "--no-verify", "--scale", "0.5", "--parts", "a,b"]
    found = given_fields(parser().parse_args(words), Options)
    assert found == {"precision": "fp16", "verify": False, "scale": 0.5, "parts": ("a", "b")}
    assert given_fields(parser().parse_args([]), Options) == {}


def test_flags_of_a_dataclass_keep_their_choices() -> None:
    with pytest.raises(argparse.ArgumentError, match="invalid choice: 'int3'"):
        parser().parse_args(["--precision", "int3"])


def test_target_is_found_in_either_form() -> None:
    assert _target(["emoji", "--to", "coreml"]) == "coreml"
    assert _target(["emoji", "--to=tensorrt"]) == "tensorrt"
    assert _target(["emoji"]) == _target([]) == "onnx"
    assert _target(["--to"]) == ""


def test_table_aligns_numbers_right() -> None:
    text = table(("part", "bytes"), [("unet", "3.4 GB"), ("vae_decoder", "98 B"), ("x", None)])
    assert text.splitlines() == [
        "part          bytes",
        "unet         3.4 GB",
        "vae_decoder    98 B",
        "x                 -",
    ]


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (3_438_000_000, "3.4 GB")])
def test_size_text(count: int, text: str) -> None:
    assert size_text(count) == text


def test_figures_that_json_cannot_hold() -> None:
    assert figure(float("inf"), ".1f") == "exact" and figure(None) == "-" and figure(float("nan")) == "-"
    made = jsonable({"a": float("inf"), "b": (1, float("nan")), "c": Path("x"), "d": True})
    assert made == {"a": None, "b": [1, None], "c": "x", "d": True}


def prompts_of(file: object, *words: str) -> list[str]:
    return read_prompts(argparse.Namespace(prompts=list(words), prompts_file=Path(str(file)), quiet=False))


def test_prompts_of_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "prompts.txt"
    text = "# comment\nred apple\n\n  black cat  \n#1 fan\n##\n#\n #\tno\n"
    file.write_text(text, encoding="utf-8-sig")  # with an editor's mark before it
    assert prompts_of(file, "first") == ["first", "red apple", "black cat", "#1 fan"]
    assert capsys.readouterr().err == f"{file}: 3 prompts; 4 lines are comments\n"
    file.write_text("# comment\nred apple\n")
    assert prompts_of(file) == ["red apple"]
    assert capsys.readouterr().err == f"{file}: 1 prompt; 1 line is a comment\n"


def test_prompts_of_a_pipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.write(writer, "caf\u00e9\n".encode())
    os.close(writer)
    with open(reader, "rb") as pipe:
        assert prompts_of(f"/dev/fd/{pipe.fileno()}") == ["caf\u00e9"]
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\ntwo\n")))
    assert prompts_of("-") == ["one", "two"]
    for closed in (None, io.StringIO("x")):
        monkeypatch.setattr(sys, "stdin", closed)
        with pytest.raises(ConfigError, match="'-' is not a file, a pipe or -: there is nothing to read"):
            prompts_of("-")
    with pytest.raises(ConfigError, match="is not a file, a pipe or -: Is a directory"):
        prompts_of(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"# only\n", "no prompt is given"),
        (b"x\n" * 257, "257 prompts"),
        (b"x" * 3_000_000, "longer"),
    ],
)
def test_prompts_of_a_bad_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        prompts_of(file)


def solid(value: int, side: int = 32) -> Any:
    return np.full((side, side, 3), value, np.uint8)


def test_grid_places_every_picture(tmp_path: Path) -> None:
    sheet = grid([solid(10), solid(200), solid(90)], ["a", "b", "a very long label that cannot fit"])
    pixels = np.asarray(sheet)
    for value in (10, 200, 90):
        assert int((pixels == value).all(axis=2).sum()) >= 32 * 32
    file = tmp_path / "grid.png"
    file.write_bytes(png_bytes(sheet))
    with Image.open(file) as read:
        assert read.size == sheet.size


def test_labels_take_two_lines_at_most() -> None:
    font = ImageFont.load_default(size=10)
    for label in ("red apple", "thumbs up: dark skin tone", "word " * 50, "w" * 100, "x " + "w" * 100, "", "   "):
        lines = wrapped(label, font, 80)
        assert 1 <= len(lines) <= 2 and all(font.getlength(line) <= 80 for line in lines)
    assert wrapped("thumbs up: dark skin tone", font, 80) == ["thumbs up: dark", "skin tone"]


def test_grid_refuses() -> None:
    with pytest.raises(ConfigError, match="0 pictures"):
        grid([], [])
    with pytest.raises(ConfigError, match="more than 16384"):
        grid([solid(0, 1500)] * 12, ["x"] * 12, columns=12)


def test_picture_psnr() -> None:
    assert picture_psnr(solid(3), solid(3)) == float("inf")
    assert picture_psnr(solid(0), solid(255)) == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("version", "bounds", "fits"),
    [
        ("2.13.0+cpu", ">=2.13,<2.14", True),
        ("2.14.0", ">=2.13,<2.14", False),
        ("2.9", ">=2.13", False),
        ("10.4", ">=10.4", True),
        ("2026.4.1", ">=2026.0", True),
        ("1.0rc1", "", True),
        ("2.13.0rc1", ">=2.13.0", False),
        ("2.14.0.dev20261101", ">=2.13", True),
        ("1.20.3", "==1.20.*", True),
        ("1.21", "~=1.20.1", False),
        ("1.20.5", "!=1.20.5", False),
    ],
)
def test_an_extra_whose_version_does_not_fit_is_a_conflict(
    version: str, bounds: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: {"some-package": version}[name])
    found = doctor._extra("torch", [Requirement(f"some-package{bounds}")])
    assert (found["ready"], found["installed"]) == (fits, {"some-package": version})
    assert list(found["conflicts"]) == ([] if fits else ["some-package"])


def test_requirements_are_those_of_this_machine_and_extra() -> None:
    for line, wanted in (
        ("a>=1; extra == 'torch'", True),
        ("a>=1; extra == 'onnx'", False),
        ("a>=1; sys_platform == 'no such system' and extra == 'torch'", False),
        ("a>=1; python_version >= '3'", False),
    ):
        assert doctor.wanted_by(Requirement(line), "torch") is wanted
    assert {entry.name for entry in doctor._extras()["serve"]} == {"fastapi", "uvicorn", "httpx"}


@dataclass(frozen=True)
class Fields:
    data: str | None = None
    name: str = ""
    files: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    steps: int = 1
    fast: bool = False


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("data", "2024", "2024"),
        ("data", "a,b", "a,b"),
        ("name", "true", "true"),
        ("files", "1.safetensors,2024", ["1.safetensors", "2024"]),
        ("files", '["a,b.safetensors", "c"]', ["a,b.safetensors", "c"]),
        ("files", "[x].safetensors", ["[x].safetensors"]),
        ("weights", "1,-0.5", [1, -0.5]),
        ("weights", "[1, -0.5]", [1, -0.5]),
        ("steps", "20", 20),
        ("fast", "true", True),
        ("unheard", "1e3", 1000.0),
    ],
)
def test_what_is_set_is_read_as_its_field_takes_it(key: str, text: str, value: object) -> None:
    assert worded(f"{key}={text}") == (key, text)
    assert fitting(Fields, key, text) == value


@pytest.mark.parametrize("name", PASSES)
def test_help_of_a_pass_says_what_each_option_is(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    cls = load(PASSES, name, "pass")
    about, summary = option_texts(cls)
    assert summary.endswith(".") and {field.name for field in dataclasses.fields(cls)} == set(about)
    assert main(["compress", "--pass", name, "--help"]) == 0
    text = capsys.readouterr().out
    ours = text[text.index(f"pass {name}, --set KEY=VALUE:") :]
    assert max(map(len, ours.splitlines())) <= 100
    column = max(map(len, about)) + 4
    for key, told in about.items():
        (line,) = [line for line in ours.splitlines() if line.startswith(f"  {key} ")]
        assert line[column:].startswith(("default: ", "needed")) and line[column - 1] == " "
        assert told.split(" ")[0] in ours
    assert main(["compress", "--help"]) == 0 and "--set KEY=VALUE:" not in capsys.readouterr().out


def test_help_of_a_pass_has_legal_values(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "--pass", "prune", "--help"]) == 0
    text = capsys.readouterr().out
    assert "\n  criterion   default: magnitude; magnitude, taylor, diff-pruning, random\n" in text
    assert "\n  data        default: not set\n              folder of pictures with captions" in text


@pytest.mark.parametrize("target", EXPORTERS)
def test_help_of_a_target_says_what_each_option_is(target: str) -> None:
    for entry in dataclasses.fields(load(EXPORTERS, target, "target")):
        if entry.init:
            assert entry.metadata.get("help"), entry.name


def test_a_folder_that_is_gone_and_a_long_name_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(OSError) as fault:
        Path("x").absolute()
    assert outcome(fault.value)[1] == "the folder that this was started in is gone; change to one that exists"
    with pytest.raises(OSError) as fault:
        (tmp_path / ("x" * 5000)).stat()
    assert len(outcome(fault.value)[1]) < 400
