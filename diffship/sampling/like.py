"""Settings of a picture as a Request again: ours, from the JSON in its PNG, and A1111's `parameters` text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from diffship.core.brief import brief
from diffship.core.errors import ConfigError
from diffship.core.registry import SAMPLERS
from diffship.sampling.picture import A1111_SAMPLERS
from diffship.sampling.text.a1111 import networks

_TAKEN = ("steps", "sampler", "spacing", "guidance", "seed", "rng", "strength", "eta", "prompt_syntax", "clip_skip")
_FILES = {"image-to-image": ("image",), "inpainting": ("image", "mask")}  # by mode: what no PNG holds
_VALUE = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST = 3  # values that make a line one of values, as A1111 has it
_NEGATIVE = "Negative prompt:"
_SIZE = re.compile(r"(\d+)x(\d+)\Z")
_NUMBERS: Mapping[str, tuple[str, type[int] | type[float]]] = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance", float),
    "Seed": ("seed", int),
}
_NAMES = {theirs: ours for ours, theirs in A1111_SAMPLERS.items()}
_KARRAS_UNLESS_SAID = ("DPM++ 2M",)  # what A1111 means by "Schedule type: Automatic"


@brief
@dataclass(frozen=True)
class Likeness:
    """What a picture says of how it was drawn.

    fields: keyword arguments of a Request. unused: what it says further and nothing here reads. ours: whether diffship
    drew it, so that the same model gives the same bytes. digest: of that model's weights, if known. split: model names
    and their steps, if several drew it. files: options whose pictures it was drawn from, which no PNG holds.
    """

    fields: Mapping[str, Any]
    unused: tuple[str, ...] = ()
    ours: bool = True
    model: str = ""
    digest: str = ""
    split: tuple[tuple[str, int], ...] = field(default=())
    files: tuple[str, ...] = ()


def likeness(settings: Mapping[str, Any]) -> Likeness:
    """What `read_settings` found, as fields of a Request, which checks their values.

    Raises:
        ConfigError: there are no settings, or they are no table of a picture.
    """
    if "prompt" in settings:
        return _own(settings)
    if "parameters" in settings:
        return read_parameters(str(settings["parameters"]))
    raise ConfigError("it holds no settings: neither those of diffship nor A1111's parameters")


def _own(settings: Mapping[str, Any]) -> Likeness:
    try:
        fields = {key: settings[key] for key in _TAKEN if key in settings}
        fields |= {"prompt": settings["prompt"], "size": (settings["width"], settings["height"])}
        if settings["negative_prompt"] or settings.get("negative_given"):
            fields["negative"] = settings["negative_prompt"]
        if settings.get("image"):  # its number under a seed of philox
            fields["first_image"] = settings["image"]
        if "decoded" in settings:
            fields["memory"] = "low"
        split = tuple((str(one["model"]), int(one["steps"])) for one in settings.get("split", ()))
        files = (*_FILES.get(str(settings.get("mode")), ()), *["control"] * bool(settings.get("controls")))
    except (KeyError, TypeError, ValueError) as fault:
        reason = f"{type(fault).__name__}: {str(fault)[:80]}"
        raise ConfigError(f"its settings are not those of a picture ({reason})") from None
    if "hires" in settings:
        raise ConfigError(
            "it was drawn in two passes (--hires), the second over the first's pixels: repeat its command"
        )
    names = str(settings.get("model", "")), str(settings.get("model_digest", ""))
    return Likeness(fields, (), True, *names, split, files)


def read_parameters(text: str) -> Likeness:
    """A1111's text: the prompt, `Negative prompt: ...`, and a line `Steps: 20, Sampler: Euler a, ...`.

    Prompts are read in A1111's syntax. LoRAs in the prompt are taken out of it, and are in `unused`.

    Raises:
        ConfigError: a value that should be a number is none.
    """
    *lines, last = text.strip().split("\n")
    values = _VALUE.findall(last)
    if len(values) < _FEWEST:
        lines, values = [*lines, last], []
    prompt, negative = _prompts(lines)
    fields, unused = _fields({key: _unquoted(value) for key, value in values})
    fields["prompt"], taken = networks(prompt)
    if negative:
        fields["negative"], more = networks(negative)
        taken += more
    fields["prompt_syntax"] = "a1111"
    return Likeness(fields, (*unused, *taken), ours=False)


def _prompts(lines: list[str]) -> tuple[str, str]:
    """(prompt, negative prompt), each of one or more lines."""
    found = [line.strip() for line in lines]
    at = next((place for place, line in enumerate(found) if line.startswith(_NEGATIVE)), len(found))
    behind = [line.removeprefix(_NEGATIVE).strip() for line in found[at:]]
    return "\n".join(found[:at]).strip(), "\n".join(behind).strip()


def _fields(values: Mapping[str, str]) -> tuple[dict[str, Any], list[str]]:
    """Fields of a Request, and what is left of `values`."""
    left = {key: value for key, value in values.items() if key != "Version"}
    fields: dict[str, Any] = {}
    for key, (name, kind) in _NUMBERS.items():
        if key in left:
            fields[name] = _number(key, left.pop(key), kind)
    size = _SIZE.match(left.get("Size", ""))
    if size:
        fields["size"] = (int(size.group(1)), int(size.group(2)))
        del left["Size"]
    if "Clip skip" in left:
        fields["clip_skip"] = max(_number("Clip skip", left.pop("Clip skip"), int) - 1, 0)
    fields |= _sampler(left)
    return fields, [f"{key}: {value}" for key, value in left.items()]


def _sampler(left: dict[str, str]) -> dict[str, str]:
    """The sampler of `Sampler` and `Schedule type`; what of them is understood is taken out of `left`."""
    name, spread = left.get("Sampler", ""), left.get("Schedule type", "")
    karras = spread == "Karras" or (spread == "Automatic" and name in _KARRAS_UNLESS_SAID)
    found = _NAMES.get(f"{name} Karras" if karras else name) or _NAMES.get(name)
    if found is None:
        return {}
    del left["Sampler"]
    if found in SAMPLERS and (spread in ("", "Automatic", "Uniform") or (karras and found.endswith("-karras"))):
        left.pop("Schedule type", None)
    return {"sampler": found}


def _number(key: str, text: str, kind: type[int] | type[float]) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise ConfigError(f"its parameters say {key}: {text[:40]!r}, which is no number") from None


def _unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value
