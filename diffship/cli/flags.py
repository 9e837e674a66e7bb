"""Flags: types that argparse lacks, and the flags that a dataclass of options brings along."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError
from diffship.core.load_options import PREDICTIONS, LoadOptions
from diffship.core.registry import RUNNERS, SAMPLERS, SPACINGS, SYNTAXES
from diffship.core.sniff import also
from diffship.core.strict import key_text, plain_value

if TYPE_CHECKING:
    from diffship.sampling.request import Request


def size(text: str) -> tuple[int, int]:
    """`512` or `512x768` as (width, height)."""
    width, _, height = text.lower().partition("x")
    try:
        return int(width), int(height or width)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N or WxH, such as 512 or 512x768") from None


AUTO = "auto"


def split(text: str) -> tuple[int, ...] | str:
    """`10,15` as whole numbers, or AUTO; what is legal depends on the models."""
    if text == AUTO:
        return AUTO
    try:
        return tuple(int(share) for share in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not A,B,...: whole numbers such as 10,15, or auto with --cloud"
        ) from None


def names(text: str) -> tuple[str, ...]:
    """`unet,vae_decoder` as a tuple, without empty entries."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def numbers(text: str) -> tuple[int, ...]:
    """`4,25` as whole numbers."""
    try:
        return tuple(int(word) for word in names(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers, such as 4,25") from None


def setting(text: str) -> tuple[str, Any]:
    """`key=value`; whole numbers, numbers, true and false become such, everything else stays text."""
    key, value = worded(text)
    return key, plain_value(value)


def worded(text: str) -> tuple[str, str]:
    """`key=value` with the value as it was written, for whoever knows what the key takes."""
    found = key_text(text)
    if found is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not key=value")
    return found


SOURCES = "a diffusers folder or .safetensors file, a hub id, emoji, or arch:NAME"


def add_source(parser: argparse.ArgumentParser) -> None:
    """What else a source is read from and how: for the verbs that take one."""
    parser.add_argument("--base", metavar="SOURCE", help="supplies the parts that SOURCE lacks")
    parser.add_argument("--revision", metavar="COMMIT", help="revision of a hub id; the resolved commit is recorded")
    add_load_options(parser)


def add_load_options(group: argparse._ActionsContainer) -> None:
    """The fields of LoadOptions."""
    group.add_argument("--vae", metavar="SOURCE", help="its VAE takes the place of the model's own: a file or folder")
    group.add_argument(
        "--ema", action="store_true", default=None, help="of a single file: the averaged weights of the U-Net"
    )
    group.add_argument(
        "--prediction", choices=PREDICTIONS, help="of a single file: what its U-Net predicts (default: as it says)"
    )


def load_fields(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of LoadOptions that the command line set."""
    return given_fields(options, LoadOptions)


REQUEST_FIELDS = (
    *("negative", "steps", "size", "guidance", "sampler", "spacing", "eta", "strength", "seed", "rng", "images"),
    *("memory", "prompt_syntax", "clip_skip", "first_image"),
)


def add_request(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """What is drawn, beside the prompt; what is not given is the model's own choice."""
    group = parser.add_argument_group("picture")
    group.add_argument(
        "--negative", metavar="TEXT", action="append", help="what to keep away from; repeat: one for each prompt"
    )
    group.add_argument(
        "--prompt-syntax",
        choices=SYNTAXES,
        help="a1111, compel: weights, and any length (default: plain)",
    )
    group.add_argument("--clip-skip", metavar="N", type=int, help="last layers of CLIP to leave out (default: 0)")
    group.add_argument("--steps", metavar="N", type=int, help="denoising steps (default: the model's)")
    group.add_argument("--size", metavar="N|WxH", type=size, help="pixels (default: the model's)")
    group.add_argument("--guidance", metavar="X", type=float, help="weight of the prompt (default: the model's)")
    group.add_argument("--sampler", metavar="NAME", help=f"{', '.join(SAMPLERS)} (default: the model's scheduler)")
    group.add_argument("--spacing", choices=SPACINGS, help="of the timesteps (default: the scheduler's)")
    group.add_argument(
        "--eta", metavar="X", type=float, help="share of noise drawn anew by tcd, 0 to 1 (its own, or 0)"
    )
    group.add_argument("--seed", metavar="N", type=int, help="image i uses seed + i (default: 0)")
    group.add_argument("--rng", choices=("torch", "philox"), help="noise (default: torch, as it draws on a CPU)")
    return group


def request_fields(options: argparse.Namespace, prompt: int = 0) -> dict[str, Any]:
    """Keyword arguments of the Request of prompt number `prompt`: what the command line set."""
    values = {name: getattr(options, name, None) for name in REQUEST_FIELDS}
    if values["negative"] is not None:
        values["negative"] = values["negative"][prompt if len(values["negative"]) > 1 else 0]
    return {name: value for name, value in values.items() if value is not None}


def requests_of(options: argparse.Namespace, prompts: Sequence[str], **more: Any) -> list[Request]:
    """One request a prompt, with `more` keyword arguments.

    Raises:
        ConfigError: a value that is not legal, or more than one negative prompt and not one for each prompt.
    """
    from diffship.sampling.request import Request

    negatives = len(options.negative or ())
    if negatives not in (0, 1, len(prompts)):
        raise ConfigError(
            f"{negatives} negative prompts for {len(prompts)} prompts; give --negative once for all, or once for each"
        )
    return [Request(prompt, **request_fields(options, index), **more) for index, prompt in enumerate(prompts)]


def add_engine(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """--engine and its own options: `--device` for the one that nearly all have, `--option` for the others."""
    group = parser.add_argument_group("engine")
    group.add_argument("--engine", choices=tuple(RUNNERS), help="default: the first installed one that reads DIR")
    group.add_argument("--device", help="the engine's device, such as cpu or cuda")
    group.add_argument(
        "--option", metavar="KEY=VALUE", type=setting, action="append", default=[], help="engine option, as threads=1"
    )
    return group


def engine_options(options: argparse.Namespace) -> dict[str, Any]:
    """Options of the engine that the command line set; the last of equal keys counts."""
    device = {} if options.device is None else {"device": options.device}
    return device | dict(options.option)


def add_fields(parser: argparse.ArgumentParser, cls: type[Any], title: str, skip: typing.Container[str] = ()) -> None:
    """One flag per field of `cls`: its name with dashes, its type, its legal values; absent if not given."""
    group = parser.add_argument_group(title)
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if field.init and field.name not in skip:
            group.add_argument(flag_of(field), dest=field.name, default=None, **_keywords(hints[field.name], field))


def flag_of(field: dataclasses.Field[Any]) -> str:
    """`--min-shapes` of the field `min_shapes`."""
    return f"--{field.name.replace('_', '-')}"


def given_fields(options: argparse.Namespace, cls: type[Any]) -> dict[str, Any]:
    """The fields of `cls` that the command line set."""
    values = {field.name: getattr(options, field.name, None) for field in dataclasses.fields(cls)}
    return {name: value for name, value in values.items() if value is not None}


def existing_file(path: Path, what: str) -> Path:
    if not path.is_file():
        raise ConfigError(f"{what} {str(path)!r} is not a file{also(path)}")
    return path


def _keywords(kind: Any, field: dataclasses.Field[Any]) -> dict[str, Any]:
    shown = "" if field.default in (dataclasses.MISSING, None, ()) else f" (default: {field.default})"
    words: dict[str, Any] = {"help": f"{field.metadata.get('help', field.name.replace('_', ' '))}{shown}"}
    if kind is bool:
        return {**words, "action": argparse.BooleanOptionalAction}
    if field.metadata.get("choices"):
        words["choices"] = field.metadata["choices"]
    return {**words, **_scalar(kind)}


def _scalar(kind: Any) -> dict[str, Any]:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(entry for entry in typing.get_args(kind) if entry is not type(None))
    if typing.get_origin(kind) is typing.Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        whole = typing.get_args(kind)[0] is int
        return {"type": numbers if whole else names, "metavar": "N,M" if whole else "A,B"}
    return {"type": kind if kind in (int, float, Path) else str, "metavar": "N" if kind in (int, float) else None}
