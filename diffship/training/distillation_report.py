"""What a run shows while it trains: its loss curve, and pictures of fixed prompts by the averaged weights."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from diffship.core.atomic import write_file
from diffship.core.errors import DiffshipError
from diffship.core.runner import Runner
from diffship.models.model import PipelineModel
from diffship.models.parts.runner import TorchRunner
from diffship.models.pipeline import Pipeline
from diffship.sampling.generate import draw, start
from diffship.sampling.request import Request
from diffship.sampling.samplers import make_sampler

if TYPE_CHECKING:
    from torch import nn

_AT_ONCE = 4
_COLUMNS = 4
_WIDTH, _HEIGHT, _MARGIN = 640, 360, 48
_COLOURS = {
    "loss": "black",
    "task": "#1f77b4",
    "out": "#d95f02",
    "feat": "#2ca02c",
    "pixel": "#1f77b4",
    "perceptual": "#2ca02c",
    "latents": "#d95f02",
    "discriminator": "#9467bd",
}


class InTraining(PipelineModel):
    """A pipeline whose denoiser is a module that is being trained."""

    digest = ""  # none: these weights change during the run

    def __init__(self, pipeline: Pipeline, module: nn.Module, device: str) -> None:
        super().__init__(pipeline, device)
        unet = pipeline.denoiser
        self._live = TorchRunner(module, unet.inputs, unet.outputs, device)

    def use(self, part: str) -> Runner:
        return self._live if part == self.family.kind.denoiser else super().use(part)


@dataclass(frozen=True)
class Look:
    """What pictures to look at are drawn with: `steps` has one entry for each row of them, None is the model's own."""

    prompts: Sequence[str]
    size: int
    steps: tuple[int | None, ...] = (None,)
    guidance: float | None = None


def write_pictures(model: InTraining, look: Look, file: Path) -> None:
    """A grid of one picture per prompt and number of steps, with the same noise at every call.

    Raises:
        RunnerError: the model draws nothing but black, or numbers that are not finite.
    """
    drawn = np.concatenate([_drawn(model, look, steps) for steps in look.steps], axis=0)
    write_file(file, picture_bytes(drawn))


def _drawn(model: InTraining, look: Look, steps: int | None) -> NDArray[np.uint8]:
    facts: dict[str, Any] = {"steps": steps, "guidance": look.guidance, "size": (look.size, look.size)}
    facts["sampler"] = _sampler(model)
    requests = [Request(prompt, seed=seed, **facts) for seed, prompt in enumerate(look.prompts)]
    batch = [trajectory for request in requests for trajectory in start(model, request)]
    pictures = [picture.pixels for picture in draw(model, batch, at_once=_AT_ONCE)]
    return grid(pictures, _COLUMNS if len(look.steps) == 1 else len(pictures))


def _sampler(model: InTraining) -> str | None:
    """The model's own if it is built; pictures to look at may be drawn with another."""
    try:
        make_sampler(model.scheduler)
    except DiffshipError:
        return "dpmpp-2m"
    return None


def grid(pictures: Sequence[NDArray[np.uint8]], columns: int = _COLUMNS) -> NDArray[np.uint8]:
    """(n, size, size, 3) uint8 as rows of `columns`; white if the last row is short."""
    blank = np.full_like(pictures[0], 255)
    whole = [*pictures, *[blank] * (-len(pictures) % columns)]
    rows = [np.concatenate(whole[at : at + columns], axis=1) for at in range(0, len(whole), columns)]
    return np.concatenate(rows)


def picture_bytes(pixels: NDArray[np.uint8]) -> bytes:
    """(height, width, 3) uint8 as a PNG."""
    return _png(Image.fromarray(pixels))


def read_curve(file: Path) -> list[dict[str, Any]]:
    """The logged steps of a run in order; of a step that was run twice, after a kill, the last line counts."""
    steps: dict[int, dict[str, Any]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # a kill cut this line short
        if isinstance(entry, dict) and isinstance(entry.get("step"), int):
            steps[entry["step"]] = entry
    return [steps[step] for step in sorted(steps)]


def last_figures(run: Path) -> dict[str, float]:
    """Loss and its terms at the last logged step of the run in a folder; none if a crash emptied the curve."""
    curve = run / "curve.jsonl"
    last: dict[str, Any] = next(reversed(read_curve(curve) if curve.is_file() else []), {})
    return {name: value for name, value in last.items() if name not in ("step", "seconds")}


def write_curve(curve: Path, file: Path) -> None:
    """Loss and its terms over steps as a PNG, logarithmic in the loss; nothing is written before two points."""
    entries = read_curve(curve)
    values = [entry[name] for entry in entries for name in _COLOURS if entry.get(name, 0) > 0]
    if len(entries) < 2 or not values:
        return
    image = Image.new("RGB", (_WIDTH, _HEIGHT), "white")
    pen = ImageDraw.Draw(image)
    low, high = math.log10(min(values)), math.log10(max(values))
    first, last = entries[0]["step"], entries[-1]["step"]
    place = _scale(first, last, low, high)
    pen.rectangle((_MARGIN, _MARGIN / 2, _WIDTH - _MARGIN / 2, _HEIGHT - _MARGIN), outline="grey")
    for label, x, y in ((f"{10**high:.3g}", 4, _MARGIN / 2), (f"{10**low:.3g}", 4, _HEIGHT - _MARGIN - 10)):
        pen.text((x, y), label, fill="black")
    pen.text((_MARGIN, _HEIGHT - _MARGIN + 6), f"step {first}", fill="black")
    pen.text((_WIDTH - 2 * _MARGIN, _HEIGHT - _MARGIN + 6), f"step {last}", fill="black")
    drawn = [name for name in _COLOURS if sum(entry.get(name, 0) > 0 for entry in entries) > 1]
    for number, name in enumerate(drawn):
        points = [place(entry["step"], entry[name]) for entry in entries if entry.get(name, 0) > 0]
        pen.line(points, fill=_COLOURS[name], width=2)
        pen.text((_MARGIN + 110 + 72 * number, _HEIGHT - _MARGIN + 6), name, fill=_COLOURS[name])
    write_file(file, _png(image))


def _scale(first: int, last: int, low: float, high: float) -> Callable[[int, float], tuple[float, float]]:
    width, height = _WIDTH - 1.5 * _MARGIN, _HEIGHT - 1.5 * _MARGIN

    def place(step: int, value: float) -> tuple[float, float]:
        right = (step - first) / max(1, last - first)
        up = (math.log10(value) - low) / max(1e-9, high - low)
        return _MARGIN + right * width, _HEIGHT - _MARGIN - up * height

    return place


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


class Report:
    """Called with a step: writes `curve.png` and `validation-STEP.png` into the run's folder."""

    def __init__(self, model: InTraining, look: Look, folder: Path, note: Callable[[str], None]) -> None:
        self.model, self.look, self.folder, self.note = model, look, folder, note

    def __call__(self, step: int) -> None:
        write_curve(self.folder / "curve.jsonl", self.folder / "curve.png")
        try:
            write_pictures(self.model, self.look, self.folder / f"validation-{step:06d}.png")
        except DiffshipError as fault:  # pictures are to look at: training goes on
            self.note(f"no validation pictures at step {step}: {fault}")
        self.model.close()
