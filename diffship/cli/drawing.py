"""What `run` does once its flags are read: requests, pictures, files, one grid."""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from diffship.cli.flags import request_fields
from diffship.cli.models import open_router, report, sources_of
from diffship.cli.output import Result
from diffship.cli.progress import Stages, note
from diffship.core.atomic import write_file
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.limits import LIMITS
from diffship.runtimes.engine import installed
from diffship.runtimes.handoff.arrival import check_arrival
from diffship.runtimes.handoff.router import Router
from diffship.runtimes.handoff.router import begin as begin_request
from diffship.runtimes.handoff.router import draw as draw_batch
from diffship.sampling.picture import Picture
from diffship.sampling.request import Request
from diffship.sampling.trajectory import Trajectory, warnings_in
from diffship.sampling.wire import pack, unpack

MAX_PROMPTS = 256
Work = tuple[Callable[[Router], list[Trajectory]], list[Path]]  # how a batch begins, and where its pictures go


def draw(options: argparse.Namespace) -> Result:
    """Everything is checked before the model is opened, and no folder is made before the first picture is there."""
    begin = time.perf_counter()
    sources = sources_of(options)
    work = resumed(options) if options.resume else asked(options)
    for source in sources:
        require_something(source)
    with Stages(options.quiet) as stages, open_router(options, sources) as (router, noted):
        drawn = []
        for number, (begun, places) in enumerate(work):
            batch = begun(router)
            label = f"{number + 1}/{len(work)} {batch[0].prompt[:40]}"
            pictures = draw_batch(router, batch, reporter(stages, label, options.save_trajectory))
            drawn += [save(picture, file, options) for picture, file in zip(pictures, places, strict=True)]
        models = report(router, sources)
    if options.grid:
        write_grid(options.grid, [entry.pixels for entry in drawn], [entry.prompt for entry in drawn])
    return result(models, noted, drawn, options.grid, time.perf_counter() - begin)


def asked(options: argparse.Namespace) -> list[Work]:
    """One piece of work a prompt.

    Raises:
        ConfigError: a prompt, file or value that is not legal.
    """
    prompts = read_prompts(options)
    requests = [Request(prompt, **request_fields(options)) for prompt in prompts]
    files = file_names(options.output, prompts, requests[0].images, requests[0].seed)
    if options.save_trajectory and (len(prompts) > 1 or requests[0].images > 1):
        raise ConfigError("--save-trajectory keeps one picture; give one prompt and no --images")
    image, mask = _read_image(options.image), _read_mask(options.mask)
    begun = [partial(begin_request, request=request, image=image, mask=mask) for request in requests]
    return list(zip(begun, files, strict=True))


def resumed(options: argparse.Namespace) -> list[Work]:
    """The one piece of work that --resume names.

    Raises:
        ConfigError: something else was asked for too, or there is no such file.
        HandoffError: the file is damaged.
    """
    given = [f"--{name}" for name in request_fields(options) if name != "memory"]
    given += ["a prompt"] * bool(options.prompts or options.prompts_file)
    given += ["--image"] * bool(options.image) + ["--mask"] * bool(options.mask)
    if given:
        raise ConfigError(f"--resume goes on with what its file says; leave {', '.join(given)} out")
    if not options.resume.is_file():
        raise ConfigError(f"--resume {str(options.resume)!r} is not a file")
    if options.resume.stat().st_size > LIMITS.trajectory_bytes:
        raise ConfigError(f"--resume {str(options.resume)!r} is longer than a trajectory can be")
    trajectory = unpack(options.resume.read_bytes())

    def begun(router: Router) -> list[Trajectory]:
        model = router.models[router.place_of(trajectory)]
        for warning in check_arrival(trajectory, model, options.shared_latents):
            note(f"warning: {warning}")
        if trajectory.facts.get("model_digest") not in [model.digest for model in router.models]:
            note("warning: the trajectory was begun with other weights than these")
        return [trajectory]

    return [(begun, file_names(options.output, [trajectory.prompt], 1, _seed(trajectory.facts))[0])]


def _seed(facts: Mapping[str, Any]) -> int:
    """Facts only label a picture: whatever a trajectory's sender wrote there, it is drawn."""
    seed = facts.get("seed")
    return seed if isinstance(seed, int) and 0 <= seed < 1 << 64 else 0


@dataclass(frozen=True)
class Drawn:
    """One picture and where it lies."""

    file: Path
    prompt: str
    pixels: Any
    settings: dict[str, Any]


def require_something(text: str) -> None:
    """A hub id or built-in source may be looked up later; a path must be there.

    Raises:
        ConfigError: a path that leads nowhere.
        UnsupportedError: a source, and no torch to run it with.
    """
    if Path(text).exists():
        return
    if text.startswith(("/", ".", "~", "\\")):
        raise ConfigError(f"{text!r} does not exist; DIR is a bundle, a folder with diffship.json in it")
    if not installed("torch"):
        raise UnsupportedError(
            f"there is no folder {text!r}, and without torch only bundles are run. "
            "Export it where torch is, or run: pip install 'diffship[torch]'"
        )


def write_grid(file: Path, pictures: Sequence[Any], labels: Sequence[str], columns: int | None = None) -> None:
    """One labelled PNG of all pictures; appears whole or not at all."""
    from diffship.benchmarks.grid import grid, png_bytes

    sheet = grid(pictures, labels, columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, png_bytes(sheet))


def save(picture: Picture, file: Path, options: argparse.Namespace) -> Drawn:
    """Write one PNG, its folder included; without its settings where the command line says so."""
    settings = dict(picture.settings)
    kept = replace(picture, settings={}) if options.no_metadata else picture
    file.parent.mkdir(parents=True, exist_ok=True)
    kept.save(file)
    return Drawn(file, str(settings["prompt"]), picture.pixels, settings)


def reporter(stages: Stages, label: str, kept: Path | None) -> Callable[[Sequence[Trajectory]], None]:
    """What hears of every step: moves the bar, and keeps the trajectory in a file where one is named."""

    def report(batch: Sequence[Trajectory]) -> None:
        stages(label, batch[0].step, batch[0].calls)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, pack(batch[0]))

    return report


def _read_image(file: Path | None) -> Any:
    from diffship.sampling.picture import read_pixels

    return None if file is None else read_pixels(file)


def _read_mask(file: Path | None) -> Any:
    """Grey as diffusers takes it of a coloured mask: ITU-R 601."""
    from PIL import Image

    pixels = _read_image(file)
    return None if pixels is None else np.asarray(Image.fromarray(pixels).convert("L"))


def result(
    models: Sequence[dict[str, object]], noted: Sequence[str], drawn: Sequence[Drawn], grid: Path | None, seconds: float
) -> Result:
    """The document and the text of a run; `noted` are warnings that were told before."""
    pictures = []
    for entry in drawn:
        height, width = entry.pixels.shape[:2]
        facts = {"file": str(entry.file), "prompt": entry.prompt, "seed": _seed(entry.settings)}
        pictures.append({**facts, "width": width, "height": height, "settings": entry.settings})
    warnings = list(dict.fromkeys(text for entry in drawn for text in warnings_in(entry.settings)))
    for warning in warnings:
        note(f"warning: {warning}")
    document = {
        "model": models[-1]["name"],
        "engine": models[-1]["engine"],
        "models": models,
        "pictures": pictures,
        "grid": None if grid is None else str(grid),
        "seconds": round(seconds, 3),
        "warnings": [*noted, *warnings],
    }
    files = [str(entry.file) for entry in drawn] + ([] if grid is None else [str(grid)])
    return Result(document, "\n".join([*files, *(_line(model) for model in models if len(models) > 1)]))


def _line(model: dict[str, object]) -> str:
    return f"{model['source']} ({model['engine']}): {model['calls']} calls, {model['seconds']} s"


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Prompts of the command line, then those of the file, without comments and blank lines.

    Raises:
        ConfigError: there is none, there are too many, or the file is missing, too long or not UTF-8.
    """
    prompts = list(options.prompts)
    if options.prompts_file is not None:
        prompts += _prompts_of(options.prompts_file)
    if not prompts:
        raise ConfigError(
            "no prompt is given; the bundle comes first: diffship run DIR PROMPT... or --prompts-file FILE"
        )
    if len(prompts) > MAX_PROMPTS:
        raise ConfigError(f"{len(prompts)} prompts; legal is 1 to {MAX_PROMPTS}: PROMPT... or --prompts-file FILE")
    return prompts


def _prompts_of(file: Path) -> list[str]:
    if not file.is_file():
        raise ConfigError(f"--prompts-file {str(file)!r} is not a file")
    if file.stat().st_size > 4 * MAX_PROMPTS * LIMITS.prompt_chars:
        raise ConfigError(f"--prompts-file {str(file)!r} is longer than {MAX_PROMPTS} prompts can be")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()  # some editors put a mark before the text
    except UnicodeDecodeError as fault:
        raise ConfigError(f"--prompts-file {str(file)!r} is not UTF-8: {fault.reason} at byte {fault.start}") from None
    return [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]


def file_names(folder: Path, prompts: Sequence[str], images: int, seed: int) -> list[list[Path]]:
    """A list per prompt: `000-red-apple-1.png` is the first prompt with seed 1; or the one .png that was asked for.

    Raises:
        ConfigError: one .png file, but more than one picture.
    """
    if folder.suffix.lower() == ".png":
        if len(prompts) * images > 1:
            raise ConfigError(f"-o {folder} is one file for {len(prompts) * images} pictures; give a folder")
        return [[folder]]
    return [
        [folder / f"{index:03d}-{slug(prompt)}-{seed + image}.png" for image in range(images)]
        for index, prompt in enumerate(prompts)
    ]


def slug(prompt: str) -> str:
    """At most 40 characters of a prompt that every file system takes."""
    return re.sub(r"[^a-z0-9]+", "-", prompt.lower()).strip("-")[:40].strip("-") or "picture"
