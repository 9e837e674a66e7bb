"""Names of pictures: the fields of a template, what tells experiments apart, and places that would be lost."""

from __future__ import annotations

import argparse
import hashlib
import re
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffship.cli.flags import AUTO, request_fields
from diffship.cli.places import FIELDS, refuse_taken
from diffship.core.errors import ConfigError
from diffship.sampling.model import Model
from diffship.sampling.request import Request, settle
from diffship.sampling.trajectory import Trajectory

Fields = Mapping[str, str]
_SHARES = ("scale", "start", "end")  # of controls
_MARKS = {  # others stand alone
    "steps": "{}steps",
    "guidance": "g{}",
    "negative": "no-{}",
    "strength": "strength{}",
    "clip_skip": "skip{}",
    "eta": "eta{}",
}
OWN = "own"  # spacing and eta of a sampler whose scheduler has no such key
_FREE = ("seed", "images", "first_image")  # told by the name's beginning


class Names:
    """Where the pictures of one command go, by `-o`: a .png file, a folder, or a template of either.

    Raises (the constructor):
        ConfigError: a field that no picture has, or a brace that closes nothing.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        self._out = options.output
        self._overwrite = options.overwrite
        self._others = {"--grid": options.grid, "--save-trajectory": options.save_trajectory}
        self._template = _template(options.output, _marks(options))

    def places(self, pictures: Sequence[Fields]) -> list[Path] | None:
        """A file for each; None if the template names what only an opened model knows.

        Raises:
            ConfigError: two would go to one file, or one is there already and may not be replaced.
        """
        needed = _fields_of(self._template)
        if any(field not in picture for picture in pictures for field in needed):
            return None
        if len(pictures) > 1 and not needed:
            raise ConfigError(
                f"-o {self._out} is one file for {len(pictures)} pictures; give a folder, or a template such as "
                "'out/{prompt}-{seed}.png'"
            )
        files = [Path(self._template.format_map(picture)) for picture in pictures]
        named = [("-o", file) for file in files] + [(flag, file) for flag, file in self._others.items() if file]
        refuse_taken(named, self._overwrite)
        return files


def asked_fields(options: argparse.Namespace, request: Request, index: int, image: int) -> dict[str, str]:
    """What the command line alone says of a picture."""
    engines = options.engines or ([options.engine] if options.engine else [])
    split = options.split if isinstance(options.split, tuple) else ()
    known = _settings(request.sampler, request.steps or sum(split) or None, request.guidance, request.size)
    known |= {"spacing": request.spacing, "eta": _number(request.eta), "strength": _number(request.strength)}
    known["engine"] = "+".join(engines) or None
    return {
        **_said(index, image, request.prompt, request.negative, request.seed),
        "model": _models(options),
        "rng": request.rng,
        "memory": request.memory,
        **{key: value for key, value in known.items() if value is not None},
    }


def settled_fields(request: Request, steps: int | None, model: Model, engines: Sequence[str]) -> dict[str, str]:
    """The settings of a request if they are left to `model`, which begins it."""
    made = settle(request, model.family, model.scheduler)
    known = _settings(made.sampler.name, steps or made.steps, made.guidance, made.size)
    spacing, strength = made.sampler.spacing or OWN, _number(made.strength)
    return {key: str(value) for key, value in known.items()} | {
        "spacing": spacing,
        "eta": _number(made.sampler.eta) or OWN,
        "strength": str(strength),
        "engine": "+".join(engines),
    }


def resumed_fields(options: argparse.Namespace, trajectory: Trajectory, seed: int) -> dict[str, str]:
    """What a trajectory says of its picture; its engine is known when the model is open."""
    sampler = trajectory.sampler
    known = _settings(sampler.name, trajectory.steps, trajectory.guidance, trajectory.size)
    facts = {"strength": trajectory.facts.get("strength", 1.0), "rng": trajectory.facts.get("rng", "torch")}
    return {
        **_said(0, 0, trajectory.prompt, trajectory.negative_prompt, seed),
        **{key: str(value) for key, value in known.items()},
        **{key: slug(str(value)) for key, value in facts.items()},
        "spacing": sampler.spacing or OWN,
        "eta": _number(sampler.eta) or OWN,
        "model": _models(options),
        "memory": options.memory or "normal",
        **({"engine": options.engine} if options.engine else {}),
    }


def slug(text: str, length: int = 40) -> str:
    """At most `length` characters of a text that every file system takes; what was cut is told apart by four digits."""
    plain = re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
    if len(plain) <= length and text.isascii():
        return plain or "picture"
    mark = hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:4]
    return f"{plain[: length - 5].strip('-') or 'picture'}-{mark}"


def _said(index: int, image: int, prompt: str, negative: str | None, seed: int) -> dict[str, str]:
    words = {"prompt": slug(prompt), "negative": slug(negative, 24) if negative else "none"}
    return {"index": f"{index:03d}", "image": str(image), "seed": str(seed), **words}


def _settings(
    sampler: str | None, steps: int | None, guidance: float | None, size: tuple[int, int] | None
) -> dict[str, str | None]:
    return {
        "sampler": sampler,
        "steps": None if steps is None else str(steps),
        "guidance": _number(guidance),
        "size": None if size is None else "x".join(map(str, size)),
    }


def _number(value: float | None) -> str | None:
    return None if value is None else f"{value:g}"


def _models(options: argparse.Namespace) -> str:
    sources = options.models or [options.large, options.bundle]
    names = [slug(_last(source), 24) for source in sources if source]
    whole = "+".join(["cloud", *names] if options.cloud else names)
    return whole if len(whole) <= 80 else slug(whole, 80)


def _last(source: str) -> str:
    path = Path(source)
    return path.resolve().name if path.is_dir() else re.split(r"[/\\]", source.rstrip("/\\"))[-1]


def _marks(options: argparse.Namespace) -> list[str]:
    """What the command line sets beside prompt, seed and model, in words that a file name takes."""
    marks = []
    for name, value in request_fields(options).items():
        if name not in (*_FREE, *(options.liked.filled if options.liked else ())):
            value = "each" if name == "negative" and len(options.negative) > 1 else value
            text = "x".join(map(str, value)) if isinstance(value, tuple) else _mark(value)
            marks.append(_MARKS.get(name, "{}").format(text))
    if options.split is not None:
        marks.append(AUTO if options.split == AUTO else "+".join(map(str, options.split)))
    marks += options.engines or ([options.engine] if options.engine else [])
    marks += [slug(options.device)] if options.device else []
    marks += [f"of-{slug(file.stem, 24)}" for file in (options.image, options.mask) if file]
    marks += [slug(Path(text).stem if ":" not in text else text.rpartition("/")[2], 24) for text in options.lora]
    marks += [f"like-{slug(options.like.stem, 24)}"] if options.like else []
    marks += [f"{slug(name, 24)}-{slug(Path(file).stem, 24)}" for name, file in options.control]
    marks += [f"{name}{value:g}" for name in _SHARES for value in getattr(options, f"control_{name}")]
    marks += ["guess"] * options.guess
    marks += [f"hires{options.hires:g}"] if options.hires is not None else []
    marks += [f"hires-strength{options.hires_strength:g}"] if options.hires_strength is not None else []
    return [*marks, *(["resumed"] if options.resume else [])]


def _mark(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else slug(str(value), 24)


def _template(out: Path, marks: Sequence[str]) -> str:
    text = str(out)
    if not ("{" in text or "}" in text) or out.is_dir():
        text = text.replace("{", "{{").replace("}", "}}")
    for field in _fields_of(text):
        if field not in FIELDS:
            raise ConfigError(
                f"-o: unknown field {{{field[:40]}}}; fields are {', '.join(FIELDS)} (a brace itself: {{{{)"
            )
    if out.suffix.lower() == ".png" and not out.is_dir():
        return text
    end = "-".join(["", *marks]).replace("{", "{{").replace("}", "}}")
    return str(Path(text) / ("{index}-{prompt}-{seed}-{model}" + end + ".png"))


def _fields_of(template: str) -> list[str]:
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as fault:
        raise ConfigError(f"-o {template}: {fault}; fields are {', '.join(FIELDS)}") from None
    for _, field, form, conversion in parsed:
        if field is not None and (form or conversion):
            raise ConfigError(f"-o: {{{field}}} takes no form behind ':' or '!'; its text stands as it is")
    return [field for _, field, _, _ in parsed if field is not None]
