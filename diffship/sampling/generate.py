"""Prompt to pictures over a Model's protocol: encode, denoise, decode; each stage can also be called by itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from diffship.core.errors import Cancelled, RunnerError, UnsupportedError
from diffship.core.reading import Reading
from diffship.sampling.controlled import denoising_parts, require_controls
from diffship.sampling.decode import OVERLAP, TILE, decode, takes_tiles
from diffship.sampling.encode import encode, text_parts
from diffship.sampling.guidance import Key, group_key, unheeded
from diffship.sampling.init_image import Canvas, begun, controlled
from diffship.sampling.kernel import Array
from diffship.sampling.loop import Denoiser, OnStep, denoise, denoiser_of
from diffship.sampling.model import Model
from diffship.sampling.picture import Picture
from diffship.sampling.request import Request as Request
from diffship.sampling.request import Settled, settle
from diffship.sampling.rng import make_noise
from diffship.sampling.tokenizer import check_prompt
from diffship.sampling.trajectory import Origin, Trajectory, as_numpy, warnings_in

Cancel = Callable[[], bool]


def generate(
    model: Model, request: Request, on_step: OnStep | None = None, cancel: Cancel | None = None
) -> list[Picture]:
    """Pictures of a request.

    `on_step` sees the trajectories that share a model call after every call.

    Raises:
        ConfigError: the request does not fit the model.
        UnsupportedError: the model lacks a part or an option is not built.
        RunnerError: a part's output is not finite, or a picture is black; the part is named.
        Cancelled: `cancel()` was true between two calls.
    """
    require_parts(model, model.family.kind.decoder)
    return draw(model, start(model, request), request.memory == "low", request.batch, on_step, cancel)


def generate_many(
    model: Model, requests: Sequence[Request], on_step: OnStep | None = None, cancel: Cancel | None = None
) -> list[Picture]:
    """Pictures of several requests, in order; those of one size share model calls, whatever their steps or samplers.

    Requests with another `batch` or `memory` are drawn by themselves, as they ask.

    Raises as `generate`.
    """
    require_parts(model, model.family.kind.decoder)
    groups: dict[tuple[bool, int | None], list[tuple[int, Request]]] = {}
    for place, request in enumerate(requests):
        groups.setdefault((request.memory == "low", request.batch), []).append((place, request))
    drawn: dict[int, list[Picture]] = {}
    for (low, at_once), members in groups.items():
        batch = [trajectory for _, request in members for trajectory in start(model, request)]
        pictures = iter(draw(model, batch, low, at_once, on_step, cancel))
        drawn |= {place: [next(pictures) for _ in range(request.images)] for place, request in members}
    return [picture for place in range(len(requests)) for picture in drawn[place]]


def draw(
    model: Model,
    batch: Sequence[Trajectory],
    low: bool = False,
    at_once: int | None = None,
    on_step: OnStep | None = None,
    cancel: Cancel | None = None,
) -> list[Picture]:
    """Denoise trajectories from wherever they stand and decode them; `at_once` share a model call (default all).

    With `low` memory one at a time, in tiles, and a part is released when its work is done. Raises as `generate`.
    """
    require_parts(model, model.family.kind.decoder)
    _stop_if(cancel)
    done = [conditioned(model, trajectory) for trajectory in batch]
    if low:
        for part in (*text_parts(model), model.family.kind.encoder):
            model.release(part)
    denoiser: Denoiser | None = None
    for places in _chunks(done, at_once or (1 if low else len(batch))):
        if all(done[place].done for place in places):
            continue  # a denoiser is not opened for what is drawn already
        denoiser = denoiser or checked_denoiser(model)
        active = denoise([done[place] for place in places], denoiser, on_step=on_step, cancel=cancel)
        for place, trajectory in zip(places, active, strict=True):
            done[place] = trajectory
    if low:
        for part in denoising_parts(model):
            model.release(part)
    return finish(model, done, low, cancel)


def start(model: Model, request: Request) -> list[Trajectory]:
    """The trajectories of a request before the first model call."""
    kind = model.family.kind
    settled = settle(request, model.family, model.scheduler)
    require_parts(model, kind.denoiser, *(() if request.image is None else (kind.encoder,)))
    require_controls(model, [control.name for control in request.controls])
    canvas, (controls, steered) = Canvas.of(settled), controlled(settled)
    encoded = encode(model, request.prompt, request.negative, settled.size, settled.guidance, request.reading)
    asked = settled.guidance if request.guidance is None else float(request.guidance)
    told = encoded.warnings + unheeded(model.family, model.scheduler, asked, request.negative)
    told += steered if canvas is None else canvas.warnings + steered
    made = []
    for i in range(request.first_image, request.first_image + request.images):
        trajectory = Trajectory(
            step=settled.begin,
            steps=settled.steps,
            sampler=settled.sampler,
            size=settled.size,
            guidance=settled.guidance,
            positive=encoded.positive,
            negative=encoded.negative,
            prompt=check_prompt(request.prompt),  # as it is encoded, so that files can hold it
            negative_prompt=None if request.negative is None else check_prompt(request.negative),
            facts=_facts(model, settled, i, told),
            origin=_origin(model),
            reading=request.reading,
            controls=controls,
            **begun(model, settled, i, make_noise(request.rng, request.seed, i), canvas),
        )
        made.append(trajectory)
    return made


def conditioned(model: Model, trajectory: Trajectory) -> Trajectory:
    """The trajectory with embeddings: its own, or its prompts encoded by `model` if they did not travel."""
    if trajectory.positive is not None or trajectory.done:
        return trajectory
    prompts = trajectory.prompt, trajectory.negative_prompt
    made = encode(model, *prompts, trajectory.size, trajectory.guidance, trajectory.reading)
    return replace(trajectory, positive=made.positive, negative=made.negative)


def finish(model: Model, batch: Sequence[Trajectory], low: bool = False, cancel: Cancel | None = None) -> list[Picture]:
    """Decode trajectories, one picture at a time; in tiles if `low`."""
    pictures = []
    for trajectory in batch:
        _stop_if(cancel)
        pixels = decode(model, trajectory.latents, tiled=low)
        if low and takes_tiles(model.family, trajectory.latents):
            trajectory = replace(trajectory, facts=_with_tiles(trajectory.facts))
        pictures.append(Picture(pixels, settings(trajectory), trajectory))
    if low:
        model.release(model.family.kind.decoder)
    return pictures


def _with_tiles(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts that say how the picture differs from one that is decoded whole."""
    warning = (
        f"decoded in tiles of {TILE} latent pixels to save memory: close to, and not equal to, the picture of "
        "memory=normal"
    )
    return {**facts, "decoded": f"tiles of {TILE}, overlap {OVERLAP}", "warnings": [*warnings_in(facts), warning]}


def settings(trajectory: Trajectory) -> dict[str, Any]:
    """What a reader needs to draw the same picture again, JSON-ready."""
    width, height = trajectory.size
    return {
        "prompt": trajectory.prompt,
        "negative_prompt": trajectory.negative_prompt or "",
        "steps": trajectory.steps,
        "sampler": trajectory.sampler.name,
        **({"spacing": trajectory.sampler.spacing} if trajectory.sampler.spacing else {}),
        **({"negative_given": True} if trajectory.negative_prompt == "" else {}),
        **_reading(trajectory.reading),
        **({} if trajectory.sampler.eta is None else {"eta": trajectory.sampler.eta}),
        "guidance": trajectory.guidance,
        "width": width,
        "height": height,
        **trajectory.facts,
    }


def _reading(reading: Reading) -> dict[str, Any]:
    """What of it is not at its default, under the names that a Request has."""
    return {{"syntax": "prompt_syntax"}.get(name, name): value for name, value in reading.to_json().items()}


def checked_denoiser(model: Model) -> Denoiser:
    """The Denoiser of a model's own denoiser, which is opened now, with the checks of `checked`."""
    return checked(denoiser_of(model), model.family.kind.denoiser)


def checked(denoiser: Denoiser, part: str) -> Denoiser:
    """The same denoiser, of that part; RunnerError names the part and the step if an output is not finite."""

    def run(batch: Sequence[Trajectory]) -> Sequence[Array]:
        outputs = denoiser(batch)
        for trajectory, output in zip(batch, outputs, strict=True):
            if not np.isfinite(as_numpy(output)).all():
                raise RunnerError(
                    f"{part}: the output of call {trajectory.step + 1} of {trajectory.calls} is not finite. "
                    "Run diffship verify, or use precision fp32"
                )
        return outputs

    return run


def _chunks(batch: Sequence[Trajectory], at_once: int) -> list[list[int]]:
    groups: dict[Key, list[int]] = {}
    for place, trajectory in enumerate(batch):
        groups.setdefault(group_key(trajectory), []).append(place)
    return [group[i : i + at_once] for group in groups.values() for i in range(0, len(group), at_once)]


def _facts(model: Model, settled: Settled, image: int, warnings: Sequence[str]) -> dict[str, Any]:
    request = settled.request
    seed = request.seed + image if request.rng == "torch" else request.seed
    facts: dict[str, Any] = {"seed": seed, "rng": request.rng, "model": model.name, "model_digest": model.digest}
    if request.rng != "torch":
        facts["image"] = image
    if request.image is not None:
        facts |= {"mode": "image-to-image" if request.mask is None else "inpainting", "strength": settled.strength}
    if request.controls:
        facts["controls"] = [
            {"name": one.name, "scale": one.scale, "start": one.start, "end": one.end} for one in request.controls
        ]
        facts |= {"guess": True} if request.guess else {}
    return {**facts, "warnings": list(warnings)} if warnings else facts


def _origin(model: Model) -> Origin:
    """Where a trajectory of `model` begins. Without a digest its weights cannot be told from others, so no part is
    named."""
    shared = model.family.kind.shared_parts if model.digest else ()
    digests = {part: model.digests[part] for part in shared if part in model.parts}
    return Origin(model.family, digests)


def require_parts(model: Model, *names: str) -> None:
    """Raises UnsupportedError for parts that the model lacks."""
    missing = set(names) - set(model.parts)
    if missing:
        raise UnsupportedError(f"{model.name} has no {', '.join(sorted(missing))}; export with --parts, or --base")


def _stop_if(cancel: Cancel | None) -> None:
    if cancel is not None and cancel():
        raise Cancelled("stopped before the first step, or between two pictures")
