"""What `run --auto` does: measure the devices once, take the fastest way of sharing a picture, say what it was."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from diffship.calibration.prompts import built_in
from diffship.cli.drawing import draw as draw_pictures
from diffship.cli.flags import requests_of
from diffship.cli.models import sources_of
from diffship.cli.output import Result, figure, size_text, table
from diffship.cli.partition import WAIT_SECONDS, bundle_of, device_options, is_given
from diffship.cli.progress import note
from diffship.cli.prompts import read_prompts
from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.limits import check_range
from diffship.runtimes.engines.model import BundleModel
from diffship.runtimes.partition.choose import FLOOR_DB, Candidate, Choice, choose
from diffship.runtimes.partition.forecast import Way, joined
from diffship.runtimes.partition.measure import FIDELITY_STEPS, Fidelity, free_bytes, measure_profile
from diffship.runtimes.partition.ranks import place_of
from diffship.runtimes.partition.staged import placement_of, whole_placement
from diffship.sampling.generate import start
from diffship.sampling.request import Request

PROMPTS = 2
SETTLED = ("stride", "warm_up", "time_shift", "cfg_parallel")
_OTHERS = ("resume", "image", "mask", "control", "hires", "save_trajectory")


def check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError: no devices, flags that --auto settles or cannot predict, or several processes."""
    if not options.auto:
        raise ConfigError("--fidelity is the floor of --auto: give both, or neither")
    if place_of() is not None:
        raise ConfigError(
            "--auto measures the devices of one process: run it without torchrun, and start torchrun with what it took"
        )
    if not options.devices:
        raise ConfigError("--auto needs --devices A,B,...: the devices that it may take, in this process")
    given = [f"--{name.replace('_', '-')}" for name in SETTLED if is_given(options, name)]
    if given:
        raise ConfigError(f"--auto settles {', '.join(given)}: leave them out, or leave --auto out")
    given = [f"--{name.replace('_', '-')}" for name in _OTHERS if getattr(options, name) not in (None, [])]
    if given:
        raise ConfigError(f"--auto predicts pictures of a prompt alone; it does not go with {', '.join(given)}")
    if options.fidelity is not None:
        check_range("--fidelity", options.fidelity, 0.0, 200.0)


def draw(options: argparse.Namespace) -> Result:
    """Pictures drawn in the way that was chosen; the text ends with what was predicted and what it then was."""
    sources_of(options)
    choice, images = settle(options)
    taken = choice.taken
    note(f"{_table(choice, images)}\npredicted: {_line(taken, taken.seconds / images)}", options.quiet or options.json)
    drawn = draw_pictures(options)
    actual = drawn.document["picture_seconds"]
    lines = [drawn.text, f"predicted: {_line(taken, taken.seconds / images)}", f"actual: {actual:.3f} s a picture"]
    return Result({**drawn.document, "sharing": _document(choice, images, actual)}, "\n".join(lines))


def settle(options: argparse.Namespace) -> tuple[Choice, int]:
    """Measure, choose, and set the flags that the choice means; also how many pictures share the measured calls.

    Raises:
        ConfigError: DIR is no bundle, or nothing reaches the floor. UnsupportedError: a device has no room to measure.
    """
    bundle, names = bundle_of(options), options.devices
    placement = whole_placement(bundle) if bundle.manifest.staging is None else placement_of(bundle)
    joined(placement, len(names))  # too many ways are refused before anything is measured
    options.prompts, options.prompts_file = read_prompts(options), None  # a pipe is read once
    requests = requests_of(options, options.prompts)
    held = [bundle.part_bytes(piece.name) for piece in placement.pieces]
    room = {name: free_bytes(name) for name in dict.fromkeys(names)}
    _require_room(held, room)
    with ExitStack() as stack:
        models = {name: stack.enter_context(_opened(bundle, options, name)) for name in room}
        runners = {name: [model.use(piece.name) for piece in placement.pieces] for name, model in models.items()}
        model, rows = models[names[0]], [runners[name] for name in names]
        wait = options.wait or WAIT_SECONDS
        profile = measure_profile(model, names, placement, rows, requests[0], held, room, wait)
        begun = start(model, requests[0])[0]
        fidelity = Fidelity(model, placement, rows[0], few(requests, begun.steps), begun.calls)
        floor = FLOOR_DB if options.fidelity is None else options.fidelity
        choice = choose(profile, begun.calls, floor, fidelity)
    _apply(options, choice.taken.way, bundle)
    return choice, requests[0].images


def few(requests: Sequence[Request], steps: int) -> list[Request]:
    """What fidelity is measured on: the prompts of the command line, filled up with built-in ones, in few steps."""
    known = [(request.prompt, request) for request in requests]
    known += [(prompt, requests[0]) for prompt in built_in()[:PROMPTS]]
    few_steps = min(steps, FIDELITY_STEPS)
    return [replace(like, prompt=prompt, images=1, steps=few_steps) for prompt, like in known[:PROMPTS]]


def _opened(bundle: Bundle, options: argparse.Namespace, name: str) -> BundleModel:
    return BundleModel(bundle, options.engine, **device_options(bundle, options, name))


def _require_room(held: Sequence[int], room: dict[str, int | None]) -> None:
    """Raises UnsupportedError if a device cannot hold all stages, which are measured on it."""
    for name, free in room.items():
        if free is not None and sum(held) > free:
            raise UnsupportedError(
                f"--auto measures all stages on each device: they take {size_text(sum(held))}, and {name} has "
                f"{size_text(free)}. Without --auto each device loads its own: --stride, --warm-up, --cfg-parallel"
            )


def _apply(options: argparse.Namespace, way: Way, bundle: Bundle) -> None:
    """The flags of a run in this way."""
    names, options.auto, options.fidelity = options.devices, False, None
    if way.devices == 1:
        options.option = list(device_options(bundle, options, names[0]).items())
        options.devices, options.device, options.wait = None, None, None
        return
    options.devices, options.homes = names[: way.devices], way.homes
    options.stride, options.warm_up = way.scheme.stride, way.scheme.warm_up
    options.cfg_parallel = way.parts > 1


def _line(taken: Candidate, seconds: float) -> str:
    plural = "s" if taken.way.devices > 1 else ""
    return f"{taken.way.text()} ({taken.way.devices} device{plural}), {seconds:.3f} s a picture, {_fidelity(taken)}"


def _fidelity(candidate: Candidate) -> str:
    db = candidate.fidelity_db
    return "not drawn" if db is None else figure(db, ".1f") + (" dB" if math.isfinite(db) else "")


def _table(choice: Choice, images: int) -> str:
    """Seconds are those of one picture."""
    head = ("way", "devices", "seconds", "weights on a device", "fidelity", "why not")
    rows = [
        (
            each.way.text(),
            each.way.devices,
            f"{each.seconds / images:.3f}",
            size_text(each.bytes),
            _fidelity(each),
            each.why,
        )
        for each in choice.candidates
    ]
    return table(head, rows)


def _document(choice: Choice, images: int, actual: object) -> dict[str, Any]:
    return {
        "floor_db": choice.floor_db,
        "calls": choice.calls,
        "images": images,
        "predicted_seconds": round(choice.taken.seconds / images, 6),
        "actual_seconds": actual,
        "taken": _shared(choice.taken, images),
        "candidates": [_shared(each, images) for each in choice.candidates],
    }


def _shared(candidate: Candidate, images: int) -> dict[str, Any]:
    """With the seconds of one of the images that share the calls."""
    return replace(candidate, seconds=candidate.seconds / images).to_json()
