"""Models of the studies about few steps: found where the command says, or made by their recipes, and exported once."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from diffship.benchmarks.measure.machine import code_digest
from diffship.benchmarks.measure.materials import GRAPHS, WEIGHTS
from diffship.core.errors import ConfigError
from diffship.core.job import Job, digest_of
from diffship.core.strict import unknown

RECIPES = Path("recipes")
MADE = ("emoji-lcm", "emoji-lcm-lora", "emoji-small-lcm-lora", "emoji-tiny-vae")  # recipes, and what they make
_TRAINING = ("compression", "core", "models", "sampling", "training")  # whose code decides what a recipe makes


def add_made(parser: argparse.ArgumentParser) -> None:
    """`--made NAME=SOURCE`, for models that were trained before."""
    text = f"a model that is there already; NAME is one of {', '.join(MADE)}; others are trained by recipes/NAME.toml"
    parser.add_argument("--made", metavar="NAME=SOURCE", type=_named, action="append", default=[], help=text)


def _named(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    if not (equals and source):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SOURCE")
    if name not in MADE:
        raise argparse.ArgumentTypeError(unknown("model", name, MADE))
    return name, source


class Distilled:
    """Sources and bundles by the names of MADE; any other name is a source itself, such as `emoji` or `arch:sd15`.

    data: the folder that `diffship train emoji-data` wrote. work: keeps what is made, by what it depends on.
    """

    def __init__(self, made: Sequence[tuple[str, str]], data: Path | None, work: Path) -> None:
        self._made, self._data = dict(made), data
        self.job = Job(work, lambda label, done, total: print(f"{label} {done}/{total}", file=sys.stderr))

    def source(self, name: str) -> str:
        """The source of a model, trained now if the command does not name it."""
        return self._made.get(name) or (self._by_recipe(name) if name in MADE else name)

    def bundle(self, name: str) -> Path:
        """Its ONNX bundle, exported once for these weights and this code; a bundle is taken as it is."""
        from diffship.export import export
        from diffship.models.sources.opening import open_source

        source = self.source(name)
        if (Path(source) / "diffship.json").is_file():
            return Path(source)
        pipeline = open_source(source)
        parts = {part: component.digest for part, component in pipeline.components.items()}
        key = digest_of([parts, pipeline.scheduler, code_digest(names=(*WEIGHTS, *GRAPHS))])[:20]
        return self.job.once(f"bundle-{key}", lambda out: export(source, to="onnx", out=out))

    def with_vae(self, name: str, vae: str) -> str:
        """The model `name` with the auto-encoder of the model `vae`, as a diffusers folder."""
        from diffship.compress import compress
        from diffship.compression.swap_vae import SwapVaePass

        source, other = self.source(name), self.source(vae)
        key = digest_of([source, other, code_digest(names=_TRAINING)])[:20]
        folder = self.job.once(f"swapped-{key}", lambda out: compress(source, [SwapVaePass(other)], out))
        return str(folder)

    def _by_recipe(self, name: str) -> str:
        from diffship.compress import compress
        from diffship.core.recipe import read_recipe

        file = RECIPES / f"{name}.toml"
        if self._data is None or not file.is_file():
            raise ConfigError(f"{name} is made by {file} of the folder --data; or name it: --made {name}=SOURCE")
        kind = "vae" if name == "emoji-tiny-vae" else "lcm"
        recipe = read_recipe(file, changes={kind: {"data": str(self._data)}})
        steps = [step for _, step in recipe.passes]
        key = digest_of([file.read_text(encoding="utf-8"), str(self._data), code_digest(names=_TRAINING)])[:20]

        def make(out: Path) -> None:
            compress(str(recipe.source), steps, out, job=Job(self.job.folder / f"work-{key}"))

        return str(self.job.once(f"model-{key}", make))
