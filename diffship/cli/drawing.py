"""What `run` does once its flags are read: requests, pictures, files, one grid."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from diffship.cli.flags import existing_file, request_fields, requests_of
from diffship.cli.like import told_of_others
from diffship.cli.models import open_router, report, sources_of
from diffship.cli.naming import Names, asked_fields, resumed_fields, settled_fields
from diffship.cli.output import Result
from diffship.cli.pace import Pace, Told
from diffship.cli.progress import Stages, note
from diffship.cli.prompts import read_prompts
from diffship.core.atomic import write_file, write_new
from diffship.core.errors import ConfigError, HandoffError, SourceError, UnsupportedError
from diffship.core.limits import LIMITS, check_range
from diffship.core.sniff import also, missing, near
from diffship.runtimes.engines.engine import installed
from diffship.runtimes.handoff.arrival import check_arrival
from diffship.runtimes.handoff.router import Router
from diffship.runtimes.handoff.router import begin as begin_request
from diffship.runtimes.handoff.router import draw as draw_batch
from diffship.sampling.control import Control
from diffship.sampling.hires import STRENGTH, enlarged
from diffship.sampling.picture import Picture
from diffship.sampling.request import Request
from diffship.sampling.trajectory import Trajectory, warnings_in
from diffship.sampling.wire import pack, unpack


@dataclass(frozen=True)
class Work:
    """One batch: how it begins, what the command line says of each picture, and what its model adds when it is open."""

    begun: Callable[[Router], list[Trajectory]]
    pictures: list[dict[str, str]]
    settled: Callable[[Router, Sequence[str]], dict[str, str]]
    told: tuple[str, ...] = ()  # warnings of what the command line names
    second: Callable[[Router, Picture, int], list[Trajectory]] | None = None  # how a second pass begins


def draw(options: argparse.Namespace) -> Result:
    """Everything is checked before the model is opened, and no folder is made before the first picture is there."""
    pace = Pace()
    sources = sources_of(options)
    names = Names(options)
    work = resumed(options) if options.resume else asked(options)
    for warning in work[0].told:
        note(f"warning: {warning}")
    places = names.places([picture for piece in work for picture in piece.pictures])
    for source in sources:
        require_something(source)
    with Stages(options.quiet) as stages, open_router(options, sources) as (router, noted):
        pace.opened()
        noted += told_of_others(options, router.models)
        files = iter(places or settled_places(names, work, router))
        drawn = []
        for number, piece in enumerate(work):
            batch = piece.begun(router)
            label = f"{number + 1}/{len(work)} {batch[0].prompt[:40]}"
            pictures = draw_batch(router, batch, reporter(stages, label, options.save_trajectory))
            if piece.second is not None:
                pictures = _second_pass(router, piece.second, pictures, reporter(stages, f"{label} hires", None))
            drawn += [save(picture, next(files), options) for picture in pictures]
        models, noted = report(router, sources), [*noted, *work[0].told]
        told = pace.told(router.models, len(drawn))
    if options.grid:
        write_grid(options.grid, [entry.pixels for entry in drawn], [entry.prompt for entry in drawn])
    return result(models, noted, drawn, options, told)


def settled_places(names: Names, work: Sequence[Work], router: Router) -> list[Path]:
    """The files of pictures whose names hold what the opened model chose; refused before anything is computed."""
    engines = [str(getattr(model, "engine", "torch")) for model in router.models]
    pictures = [{**piece.settled(router, engines), **picture} for piece in work for picture in piece.pictures]
    files = names.places(pictures)
    assert files is not None, "a settled picture has every field"
    return files


def asked(options: argparse.Namespace) -> list[Work]:
    """One piece of work a prompt.

    Raises:
        ConfigError: a prompt, file or value that is not legal.
    """
    require_hires(options)
    prompts = read_prompts(options)
    images, told = images_of(options)
    requests = requests_of(options, prompts, **images)
    if options.save_trajectory and (len(prompts) > 1 or requests[0].images > 1):
        raise ConfigError("--save-trajectory keeps one picture; give one prompt and no --images")
    return [
        Work(
            partial(begin_request, request=request),
            wanted(options, request, index),
            partial(_settled, request),
            told,
            None if options.hires is None else partial(_second, request, options),
        )
        for index, request in enumerate(requests)
    ]


def require_hires(options: argparse.Namespace) -> None:
    """Raises ConfigError for values of the second pass that are not legal, before the first one is drawn."""
    if options.hires is None:
        if options.hires_strength is not None:
            raise ConfigError("--hires-strength is of the second pass: give --hires SCALE too")
        return
    check_range("--hires", options.hires, *LIMITS.hires)
    if options.mask is not None:
        raise ConfigError("--hires draws the whole picture anew, also where --mask keeps it: leave one of them out")
    if options.hires_strength is not None:
        check_range("--hires-strength", options.hires_strength, *LIMITS.strength)


def _second(
    request: Request, options: argparse.Namespace, router: Router, picture: Picture, place: int
) -> list[Trajectory]:
    strength = STRENGTH if options.hires_strength is None else options.hires_strength
    made = enlarged(request, picture, place, router.starter.family, options.hires, strength)
    facts = {"hires": {"scale": options.hires, "strength": strength}}
    return [replace(begun, facts={**begun.facts, **facts}) for begun in begin_request(router, made)]


def _second_pass(
    router: Router,
    second: Callable[[Router, Picture, int], list[Trajectory]],
    pictures: Sequence[Picture],
    report: Callable[[Sequence[Trajectory]], None],
) -> list[Picture]:
    """Each picture enlarged and drawn on, one after the other: they are large now."""
    begun = (second(router, picture, place) for place, picture in enumerate(pictures))
    return [drawn for batch in begun for drawn in draw_batch(router, batch, report)]


def wanted(options: argparse.Namespace, request: Request, index: int) -> list[dict[str, str]]:
    """The fields of every picture of the prompt number `index`, as far as the command line says them."""
    return [
        asked_fields(options, replace(request, images=1, seed=request.seed + image), index, image)
        for image in range(request.images)
    ]


def _settled(request: Request, router: Router, engines: Sequence[str]) -> dict[str, str]:
    return settled_fields(request, sum(router.split or ()), router.starter, engines)


def resumed(options: argparse.Namespace) -> list[Work]:
    """The one piece of work that --resume names.

    Raises:
        ConfigError: something else was asked for too, or there is no such file.
        HandoffError: the file is damaged.
    """
    given = [f"--{name.replace('_', '-')}" for name in request_fields(options) if name != "memory"]
    given += ["a prompt"] * bool(options.prompts or options.prompts_file)
    given += ["--hires"] * (options.hires is not None)
    given += ["--control"] * bool(options.control)
    given += ["--image"] * bool(options.image) + ["--mask"] * bool(options.mask)
    if given:
        raise ConfigError(f"--resume goes on with what its file says; leave {', '.join(given)} out")
    existing_file(options.resume, "--resume")
    if options.resume.stat().st_size > LIMITS.trajectory_bytes:
        raise ConfigError(f"--resume {str(options.resume)!r} is longer than a trajectory can be")
    try:
        trajectory = unpack(options.resume.read_bytes())
    except HandoffError as fault:
        raise HandoffError(f"--resume {options.resume}: {fault}{also(options.resume)}") from None

    def begun(router: Router) -> list[Trajectory]:
        model = router.models[router.place_of(trajectory)]
        for warning in check_arrival(trajectory, model, options.shared_latents):
            note(f"warning: {warning}")
        if trajectory.facts.get("model_digest") not in [model.digest for model in router.models]:
            note("warning: the trajectory was begun with other weights than these")
        return [trajectory]

    fields = resumed_fields(options, trajectory, _seed(trajectory.facts))
    return [Work(begun, [fields], lambda router, engines: {"engine": "+".join(engines)})]


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
        SourceError: a path that leads nowhere.
        UnsupportedError: a source, and no torch to run it with.
    """
    if Path(text).exists():
        return
    if gone := missing(text):
        raise SourceError(f"{gone}; DIR is a bundle, a folder with diffship.json in it{near(text)}")
    if not installed("torch"):
        # the one source whose graphs come with the package
        way = "Run: diffship export emoji -o DIR" if text == "emoji" else "Export it where torch is"
        raise UnsupportedError(
            f"there is no folder {text!r}, and without torch only bundles are run. "
            f"{way}, or run: pip install 'diffship[torch]'"
        )


def write_grid(file: Path, pictures: Sequence[Any], labels: Sequence[str], columns: int | None = None) -> None:
    """One labelled PNG of all pictures; appears whole or not at all."""
    from diffship.sampling.grid import grid, png_bytes

    sheet = grid(pictures, labels, columns)
    file.parent.mkdir(parents=True, exist_ok=True)
    write_file(file, png_bytes(sheet))


def save(picture: Picture, file: Path, options: argparse.Namespace) -> Drawn:
    """Write one PNG, its folder included; without its settings if the command line says so.

    The name was free when the work began; if another command has taken it since, the picture gets one beside it.
    """
    settings = dict(picture.settings)
    kept = replace(picture, settings={}) if options.no_metadata else picture
    file.parent.mkdir(parents=True, exist_ok=True)
    if options.overwrite:
        kept.save(file)
    elif (place := write_new(file, kept.png())) != file:
        note(f"warning: {file} was written by someone else meanwhile and is kept; this picture is {place}")
        file = place
    return Drawn(file, str(settings["prompt"]), picture.pixels, settings)


def reporter(stages: Stages, label: str, kept: Path | None) -> Callable[[Sequence[Trajectory]], None]:
    """What hears of every step: moves the bar, and keeps the trajectory in a file if one is named."""

    def report(batch: Sequence[Trajectory]) -> None:
        stages(label, batch[0].step, batch[0].calls)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_file(kept, pack(batch[0]))

    return report


def images_of(options: argparse.Namespace) -> tuple[dict[str, Any], tuple[str, ...]]:
    """`image` and `mask` of a request, as far as they are given, and warnings.

    Raises:
        ConfigError: a file that is missing or no picture.
    """
    from diffship.sampling.picture import grey, read_image

    read = {name: read_image(file) for name in ("image", "mask") if (file := getattr(options, name)) is not None}
    found: dict[str, Any] = {name: grey(pixels) if name == "mask" else pixels for name, (pixels, _) in read.items()}
    controls, told = controls_of(options)
    if controls or options.guess:
        found |= {"controls": controls, "guess": options.guess}
    return found, tuple(warning for _, warnings in read.values() for warning in warnings) + told


def controls_of(options: argparse.Namespace) -> tuple[tuple[Control, ...], tuple[str, ...]]:
    """The controls of a request, and warnings.

    Raises:
        ConfigError: a value without its --control, or a file that is missing or no picture.
    """
    from diffship.sampling.picture import read_image

    count, made, told = len(options.control), list[Control](), list[str]()
    values = {name: getattr(options, f"control_{name}") for name in ("scale", "start", "end")}
    for name, given in values.items():
        if len(given) not in {0, count} | ({1} if count else set()):
            raise ConfigError(
                f"--control-{name} is given {len(given)} times for {count} --control; give one, or one for each"
            )
    for place, (name, file) in enumerate(options.control):
        pixels, warnings = read_image(Path(file))
        own = {key: given[place] if len(given) == count else given[0] for key, given in values.items() if given}
        made.append(Control(name, pixels, **own))
        told += warnings
    return tuple(made), tuple(told)


def result(
    models: Sequence[dict[str, object]],
    noted: Sequence[str],
    drawn: Sequence[Drawn],
    options: argparse.Namespace,
    told: Told,
) -> Result:
    """The document and the text of a run; `noted` are warnings that were told before."""
    grid = options.grid
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
        **told.to_json(),
        "warnings": [*noted, *warnings],
    }
    note(told.line([str(model["engine"]) for model in models], len(pictures)), options.quiet or options.json)
    files = [str(entry.file) for entry in drawn] + ([] if grid is None else [str(grid)])
    return Result(document, "\n".join([*files, *(_line(model) for model in models if len(models) > 1)]))


def _line(model: dict[str, object]) -> str:
    return f"{model['source']} ({model['engine']}): {model['calls']} calls, {model['seconds']} s"
