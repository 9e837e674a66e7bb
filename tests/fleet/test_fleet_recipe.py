"""Recipes with targets: what they mean, what they refuse, and those that are shipped."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from diffship.core.errors import ConfigError
from diffship.core.registry import EXPORTERS
from diffship.exporters.coreml import CoreMl
from diffship.exporters.onnx import Onnx
from diffship.fleet.recipe import FleetTarget, fleet_target, parse_fleet, read_fleet

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "recipes").glob("*-fleet.toml"))


def parsed(text: str) -> Any:
    return parse_fleet(tomllib.loads(f"schema = 1\n{text}"))


def test_a_target_is_its_exporter_under_a_name() -> None:
    fleet = parsed(
        'source = "emoji"\nbase = "arch:sd15"\n[[target]]\nto = "onnx"\n[[target]]\nto = "coreml"\nname = "phone"\n'
        "optional = true\nwidth = 512\n[[target]]\nto = 'onnx'\nprecision = 'int8-weights'\nkeep = ['unet.mid_block']\n"
    )
    assert (fleet.source, fleet.base) == ("emoji", "arch:sd15")
    assert fleet.targets == (
        FleetTarget("onnx-fp32", Onnx()),
        FleetTarget("phone", CoreMl(width=512), optional=True),
        FleetTarget("onnx-int8-weights", Onnx(precision="int8-weights", keep=("unet.mid_block",))),
    )
    assert fleet.targets[1] == fleet_target("coreml", "phone", optional=True, width=512)


ONE = "[[target]]\nto = 'onnx'\n"
WRONG = {
    "no target": ("", "has no [[target]]"),
    "a key of the fleet": (f"{ONE}optionl = true", "target 1 (onnx): unknown key 'optionl'; did you mean 'optional'?"),
    "another key of the fleet": (f"{ONE}nmae = 'x'", "did you mean 'name'?"),
    "a key of the exporter": (f"{ONE}precison = 'fp16'", "did you mean 'precision'?"),
    "a key of another exporter": (f"{ONE}{ONE}sm = [89]", "target 2 (onnx): unknown key 'sm'"),
    "a target": ("[[target]]\nto = 'onx'", "did you mean 'onnx'?"),
    "no to": ("[[target]]\nname = 'a'", "target 1 has no 'to'"),
    "to of another type": ("[[target]]\nto = ['onnx']", "target 1 has no 'to'"),
    "a value": (f"{ONE}precision = 'fp17'", "did you mean 'fp16'?"),
    "a type": (f"{ONE}optional = 1", "it must be true or false"),
    "what the exporter refuses": (f"{ONE}precision = 'int8'", "needs what diffship calibrate measured"),
    "two of one name": (f"{ONE}{ONE}opset = 18", "two targets called onnx-fp32"),
    "one folder on some systems": (f"{ONE}name='a'\n{ONE}name = 'A'", "two targets called a"),
    "a path": (f"{ONE}name = 'a/b'", "has a slash"),
    "a way out": (f"{ONE}name = '..'", "is not legal"),
    "no name": (f"{ONE}name = ''", "has 0 characters"),
    "a table": ("target = 'onnx'", "it must be a list"),
    "too many": (ONE * 65, "has 65 targets; at most 64"),
    "a key at the top": (f"sorce = 'emoji'\n{ONE}", "did you mean 'source'?"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_recipes_say_what_is_legal(name: str) -> None:
    text, message = WRONG[name]
    with pytest.raises(ConfigError) as fault:
        parsed(text)
    assert message in str(fault.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_are_parsed_and_say_how_they_are_run(path: Path) -> None:
    fleet, text = read_fleet(path), path.read_text(encoding="utf-8")
    assert fleet.source and f"diffship export --recipe recipes/{path.name} -o " in text
    optional = {target.exporter.name for target in fleet.targets if target.optional}
    assert optional <= {"coreml", "tensorrt"} and not any(
        target.exporter.name in optional for target in fleet.targets if not target.optional
    )


@pytest.mark.slow
def test_the_fleet_of_sdxl_fits_sdxl() -> None:
    """Every exporter's own check of the whole model, from which no weight is read."""
    from diffship.core.errors import MissingExtra
    from diffship.models.sources.opening import open_source

    sdxl = open_source("arch:sdxl")
    fleet = read_fleet(ROOT / "recipes" / "sdxl-fleet.toml")
    assert {target.exporter.name for target in fleet.targets} == set(EXPORTERS)
    for target in fleet.targets:
        try:
            assert target.exporter.check(sdxl) == []
        except MissingExtra:
            assert target.optional
