"""What `run --cloud` does: pictures that a server begins and this device finishes, and how many calls each makes."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffship.cli.drawing import Drawn, reporter, require_something, result, save, wanted, write_grid
from diffship.cli.flags import AUTO, engine_options, requests_of
from diffship.cli.models import half_on_cpu
from diffship.cli.naming import Names, settled_fields
from diffship.cli.output import Result
from diffship.cli.pace import Pace
from diffship.cli.progress import Stages, note
from diffship.cli.prompts import read_prompts
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS, check_range
from diffship.core.strict import unknown
from diffship.runtimes.handoff.choose import (
    BUDGETS,
    Budget,
    Choice,
    SplitProfile,
    choose_split,
    read_curve,
    read_profile,
    write_profile,
)
from diffship.runtimes.handoff.client import HybridClient
from diffship.runtimes.handoff.pair import sampler_of
from diffship.runtimes.handoff.profile import measure_profile
from diffship.runtimes.handoff.report import Hybrid
from diffship.runtimes.handoff.router import check_split
from diffship.runtimes.handoff.transport import CloudError
from diffship.sampling.request import Request

_TOKEN_BYTES = 4096


def draw(options: argparse.Namespace) -> Result:
    """One picture after the other; everything is checked before the model is opened."""
    pace = Pace()
    check_flags(options)
    budget = budget_of(options) if options.split == AUTO else None
    names = Names(options)
    requests, pictures = asked(options)
    places = names.places(pictures)
    token = read_token(options)
    require_something(options.bundle)
    drawn: list[Drawn] = []
    made: list[Hybrid] = []
    with Stages(options.quiet) as stages, open_client(options, token) as client:
        pace.opened()
        split, choice, noted = settle_split(client, requests[0], options, budget)
        files = places or settled_places(names, requests, pictures, client, sum(split))
        for number, (request, file) in enumerate(zip(requests, files, strict=True)):
            label = f"{number + 1}/{len(requests)} {request.prompt[:40]}"
            made.append(client.generate(request, split, reporter(stages, label, options.save_trajectory)))
            drawn.append(save(made[-1].picture, file, options))
        models = shares(client, options.bundle, split, made)
        noted += half_on_cpu([client.small], options)
        told = pace.told([client.small], len(drawn))
    if options.grid:
        write_grid(options.grid, [entry.pixels for entry in drawn], [entry.prompt for entry in drawn])
    noted += [warning for hybrid in made for warning in hybrid.report.warnings]
    for warning in (noted := list(dict.fromkeys(noted))):
        note(f"warning: {warning}")
    document = result(models, noted, drawn, options, told)
    return _with_handoffs(document, made, choice)


def check_flags(options: argparse.Namespace) -> None:
    """Raises ConfigError: flags that do not go with --cloud, or with each other."""
    if options.bundle is None:
        raise ConfigError("DIR is missing: the small bundle that finishes what the cloud begins")
    others = (
        "large",
        "models",
        "engines",
        "resume",
        "image",
        "mask",
        "strength",
        "lora",
        "embedding",
        "control",
        "hires",
    )
    given = [f"--{name}" for name in others if getattr(options, name) not in (None, False, [])]
    if given:
        why = "; --resume finishes on this device alone" if options.resume else ""
        raise ConfigError(f"--cloud goes without {', '.join(given)}{why}")
    if options.split is None:
        raise ConfigError("--cloud needs --split CLOUD,HERE, such as 10,15, or --split auto with --budget")
    if options.split != AUTO:
        check_split(options.split, 2, options.steps)
        chooses = ("budget", "quality_curve", "profile")
        extra = [f"--{name.replace('_', '-')}" for name in chooses if getattr(options, name)]
        if extra:
            raise ConfigError(f"{', '.join(extra)} choose a split; they go with --split auto")


def budget_of(options: argparse.Namespace) -> Budget:
    """The budget of --budget. Raises ConfigError: none, an unknown one, one twice, or a value that is no number above
    0."""
    if not options.budget:
        raise ConfigError("there is no budget; --split auto needs --budget cloud-ms=X, quality=X or latency=SECONDS")
    found: dict[str, float] = {}
    for key, value in options.budget:
        name = key.replace("_", "-")
        if name not in BUDGETS:
            raise ConfigError(unknown("budget", name, BUDGETS))
        if name in found:
            raise ConfigError(f"--budget {name} is given twice")
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"--budget {name}={value} is no number")
        found[name] = float(value) if name == "quality" else check_range(f"--budget {name}", float(value), 0.0, 1e9)
    latency = found.get("latency")
    return Budget(found.get("cloud-ms"), found.get("quality"), None if latency is None else 1000 * latency)


def settled_places(
    names: Names, requests: Sequence[Request], pictures: Sequence[Mapping[str, str]], client: HybridClient, steps: int
) -> list[Path]:
    """The files of pictures whose names hold what the split and this device's model chose."""
    engines = ["cloud", str(getattr(client.small, "engine", "torch"))]
    settled = [settled_fields(request, steps, client.small, engines) for request in requests]
    files = names.places([{**more, **known} for more, known in zip(settled, pictures, strict=True)])
    assert files is not None, "a settled picture has every field"
    return files


def asked(options: argparse.Namespace) -> tuple[list[Request], list[dict[str, str]]]:
    """One request a picture, and the fields of its name: a handoff is of one image, image i has seed + i.

    Raises:
        ConfigError: a prompt, file or value that is not legal.
    """
    prompts = read_prompts(options)
    whole = requests_of(options, prompts)
    images, seed = whole[0].images, whole[0].seed
    if images > 1 and whole[0].rng != "torch":
        raise ConfigError(
            "with --cloud --rng philox draws one image a prompt: images of one seed differ by their place"
        )
    if options.save_trajectory and len(prompts) * images > 1:
        raise ConfigError("--save-trajectory keeps one picture; give one prompt and no --images")
    pictures = [fields for index, request in enumerate(whole) for fields in wanted(options, request, index)]
    return [replace(request, images=1, seed=seed + image) for request in whole for image in range(images)], pictures


def read_token(options: argparse.Namespace) -> str | None:
    """The token of --token-file or DIFFSHIP_TOKEN. Raises ConfigError: a file that cannot be read or holds none."""
    if options.token_file is None:
        return os.environ.get("DIFFSHIP_TOKEN") or None
    try:
        with open(options.token_file, "rb") as stream:
            word = stream.read(_TOKEN_BYTES).decode("ascii").strip()
    except OSError as fault:
        raise ConfigError(f"--token-file {str(options.token_file)!r} cannot be read: {fault.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"--token-file {str(options.token_file)!r} is not plain ASCII") from None
    if not word:
        raise ConfigError(f"--token-file {str(options.token_file)!r} is empty")
    return word


def open_client(options: argparse.Namespace, token: str | None) -> HybridClient:
    return HybridClient(
        options.bundle,
        options.cloud,
        token,
        deadline=60.0 if options.deadline is None else options.deadline,
        cloud_model=options.cloud_model,
        shared_latents=options.shared_latents,
        engine=options.engine,
        **engine_options(options),
    )


def settle_split(
    client: HybridClient, request: Request, options: argparse.Namespace, budget: Budget | None
) -> tuple[tuple[int, int], Choice | None, list[str]]:
    """The split, how it was chosen if it is `auto`, and what to warn of: without a cloud this device draws alone."""
    if budget is None:
        return options.split, None, []
    steps = client.small.family.steps_default if request.steps is None else request.steps
    check_range("steps", steps, *LIMITS.steps)
    curve = None if options.quality_curve is None else read_curve(options.quality_curve)
    try:
        profile = _profile(client, request, steps, options.profile)
        calls = sampler_of(client.facts().facts, request.sampler).calls(steps)
    except CloudError as fault:
        return (0, steps), None, [f"the cloud could not be measured, this device draws alone ({fault})"]
    choice = choose_split(profile, steps, budget, curve, calls)
    note(f"predicted: {choice.line()}", options.quiet)
    return choice.split, choice, []


def _profile(client: HybridClient, request: Request, steps: int, file: Path | None) -> SplitProfile:
    """The stored one, or one measured now, and stored if a file is named."""
    if file is None or not file.exists():
        made = measure_profile(client, request, steps)
        if file is not None:
            write_profile(file, made)
        return made
    stored, settled = read_profile(file), client.settled(request, steps)
    assert settled.guidance is not None
    here: dict[str, object] = {"cloud": client.facts().digest, "edge": client.small.digest}
    here |= {"size": settled.size, "guided": settled.guidance > 1}
    for name, value in here.items():
        if getattr(stored, name) != value:
            raise ConfigError(f"--profile {str(file)!r} is of another {name}: name a file that is not there yet")
    return stored


def shares(client: HybridClient, source: str, split: Sequence[int], made: Sequence[Hybrid]) -> list[dict[str, object]]:
    """What each side did over all pictures, as `models` of the document has it; the cloud's seconds are waited here."""
    reports = [hybrid.report for hybrid in made]
    cloud = client.known
    return [
        {
            "name": client.cloud.url if cloud is None else cloud.name,
            "source": client.cloud.url,
            "engine": "unknown" if cloud is None else cloud.engine,
            "steps": split[0],
            "calls": sum(report.cloud_calls for report in reports),
            "seconds": round(sum(report.cloud_ms for report in reports) / 1000, 3),
        },
        {
            "name": client.small.name,
            "source": source,
            "engine": getattr(client.small, "engine", "torch"),
            "steps": split[1],
            "calls": sum(report.edge_calls for report in reports),
            "seconds": round(sum(report.edge_ms for report in reports) / 1000, 3),
        },
    ]


def _with_handoffs(drawn: Result, made: Sequence[Hybrid], choice: Choice | None) -> Result:
    more: dict[str, Any] = {"handoffs": [hybrid.report.to_json() for hybrid in made]}
    lines = [drawn.text]
    if choice is not None:
        more["choice"] = choice.to_json()
        lines.append(f"predicted: {choice.line()}")
    lines += [f"{'actual' if choice else 'handoff'}: {hybrid.report.line()}" for hybrid in made]
    return Result({**drawn.document, **more}, "\n".join(lines))
