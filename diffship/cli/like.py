"""What `run --like FILE` takes from a picture: every setting that the command line leaves open."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffship.cli.progress import note
from diffship.core.errors import ConfigError
from diffship.sampling.like import Likeness, likeness
from diffship.sampling.model import Model
from diffship.sampling.picture import read_settings

_SHOWN = 12  # values that are named as unused


@dataclass(frozen=True)
class Liked:
    """The picture, and the names of the options that it filled."""

    file: Path
    like: Likeness
    filled: frozenset[str]


def fill(options: argparse.Namespace) -> None:
    """Set `options` that are not given to what the picture of --like says, and tell what of it is not used.

    Raises:
        ConfigError: no picture with settings, one that several models drew and no --split, or one that was drawn from
            other pictures which are not given.
    """
    if options.resume:
        raise ConfigError("--resume goes on with what its file says; leave --like out")
    like = _read(options.like)
    fields = dict(like.fields)
    prompt = fields.pop("prompt")
    _check_split(options, like)
    lacking = [f"--{name}" for name in like.files if not getattr(options, name)]
    if lacking:
        raise ConfigError(
            f"--like {options.like} was drawn from other pictures, which it does not hold: give {', '.join(lacking)}"
        )
    if options.split is not None and options.steps is None:
        fields.pop("steps", None)  # the split says how many
    filled = [name for name in fields if getattr(options, name) is None]
    for name in filled:
        setattr(options, name, [fields[name]] if name == "negative" else fields[name])
    if not options.prompts and options.prompts_file is None:
        options.prompts = [prompt]
    options.liked = Liked(options.like, like, frozenset(filled))
    if like.unused:
        more = f" and {len(like.unused) - _SHOWN} more" if len(like.unused) > _SHOWN else ""
        note(f"not used of {options.like}: {', '.join(like.unused[:_SHOWN])}{more}", options.quiet)
        if any(text.startswith("<lora") for text in like.unused):
            note("a LoRA is a flag here: --lora FILE:0.8", options.quiet)
    if not like.ours:
        note(
            f"{options.like} is of another program: its settings are used, and its noise is drawn in another way there",
            options.quiet,
        )


def told_of_others(options: argparse.Namespace, models: Sequence[Model]) -> list[str]:
    """Warnings, which are also told: none of `models` has the weights that drew the picture of --like, or they take its
    clip-skip in another way."""
    if options.liked is None:
        return []
    like, file, found = options.liked.like, options.liked.file, list[str]()
    if like.digest and like.digest not in [model.digest for model in models]:
        found.append(f"{file} was drawn with other weights than these ({like.model}, {like.digest[:10]})")
    twice = any(model.family.pooled_width is not None for model in models)  # SDXL: the last layer is left out anyway
    if not like.ours and twice and options.clip_skip and "clip_skip" in options.liked.filled:
        found.append(f"{file}: A1111 leaves no more layers out of SDXL; to draw as there, pass --clip-skip 0")
    for warning in found:
        note(f"warning: {warning}")
    return found


def _read(file: Path) -> Likeness:
    try:
        return likeness(read_settings(file))
    except ConfigError as fault:
        text = str(fault)
        raise ConfigError(f"--like {text if text.startswith(str(file)) else f'{file}: {text}'}") from None


def _check_split(options: argparse.Namespace, like: Likeness) -> None:
    if like.split and options.split is None:
        names, steps = zip(*like.split, strict=True)
        raise ConfigError(
            f"--like {options.like} was drawn by {len(names)} models in turn ({', '.join(names)}): give their bundles "
            f"with --models A B --split {','.join(map(str, steps))}"
        )
