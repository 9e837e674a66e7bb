"""What a trajectory from elsewhere must be before a model computes with it."""

from __future__ import annotations

from dataclasses import replace

from diffship.core.errors import HandoffError
from diffship.core.kind import CONTROLNET, control_names
from diffship.runtimes.handoff.pair import Facts, ModelFacts, differences, other_texts
from diffship.sampling.request import Request
from diffship.sampling.trajectory import Trajectory


def check_arrival(trajectory: Trajectory, model: Facts, shared_latents: bool = False) -> tuple[str, ...]:
    """Warnings for a `model` that goes on with `trajectory`; `shared_latents` as in `check_pair`.

    If the bytes do not say which model they come from, only shapes and schedule are compared.

    Raises:
        HandoffError: the model cannot; every reason is named.
    """
    trajectory.require_fit(model.family)
    origin = trajectory.origin
    sampler, name = trajectory.sampler, trajectory.sampler.name
    # not compared: the sender chose the class for this picture, whatever the model's own is
    here = ModelFacts(model.name, model.family, {**model.scheduler, "_class_name": ""}, dict(model.digests))
    there = ModelFacts("the trajectory", model.family, {**sampler.to_config(), "_class_name": ""}, {})
    if origin is not None:
        there = replace(there, family=origin.family, digests=dict(origin.digests))
    found = differences(there, here, name, shared_latents)
    reasons = [*found.reasons, *_without_controls(trajectory, here)]
    if trajectory.positive is None and not trajectory.done:
        parts = other_texts(there, here)
        reasons += [f"it came without embeddings, and {' and '.join(parts)} differ: send them"] if parts else []
    if reasons:
        raise HandoffError(f"the trajectory does not fit {model.name}: {'; '.join(reasons)}")
    return found.warnings


def _without_controls(trajectory: Trajectory, here: ModelFacts) -> list[str]:
    """Why its ControlNets cannot act on the calls that are left."""
    has = ", ".join(control_names(here.digests))
    names = [] if trajectory.done else [control.name for control in trajectory.controls]
    gone = [name for name in names if f"{CONTROLNET}{name}" not in here.digests]
    return [f"the ControlNet {name} acts on it, and the model has {has or 'none'}" for name in gone]


def require_answer(trajectory: Trajectory, request: Request, step: int, image: int = 0) -> None:
    """Raises HandoffError unless this is image `image` of `request` after `step` calls, and no older answer.

    What the request leaves open may be anything.
    """
    seed = request.seed + image if request.rng == "torch" else request.seed
    pairs = {
        "step": (trajectory.step, step),
        "prompt": (trajectory.prompt, request.prompt),
        "negative prompt": (trajectory.negative_prompt, request.negative),
        "rng": (trajectory.facts.get("rng"), request.rng),
        "seed": (trajectory.facts.get("seed"), seed),
        "steps": (trajectory.steps, request.steps),
        "size": (trajectory.size, request.size),
        "guidance": (trajectory.guidance, request.guidance),
        "sampler": (trajectory.sampler.name, request.sampler),
        "spacing": (trajectory.sampler.spacing, request.spacing),
        "reading": (trajectory.reading, request.reading),
        "eta": (trajectory.sampler.eta, request.eta),
    }
    if request.rng != "torch":
        pairs["image"] = (trajectory.facts.get("image"), image)
    for label, (got, asked) in pairs.items():
        free = asked is None and label != "negative prompt"
        if not free and got != asked:
            shown = f"{str(got)[:60]!r}, asked was {str(asked)[:60]!r}"
            raise HandoffError(f"this trajectory answers something else: its {label} is {shown}")
