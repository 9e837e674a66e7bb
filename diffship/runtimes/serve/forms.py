"""Bodies and queries as frozen dataclasses: read strictly, bounded as `run` is, described to OpenAPI by the same."""

from __future__ import annotations

import dataclasses
import json
import secrets
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.core.reading import PLAIN
from diffship.core.registry import SPACINGS, SYNTAXES
from diffship.core.strict import bounded, bounds, choices, load
from diffship.runtimes.serve.options import DEADLINE_SECONDS
from diffship.sampling.rng import NOISES
from diffship.sampling.samplers import SAMPLERS
from diffship.sampling.wire import DTYPES

T = TypeVar("T")
MOST_CALLS = 2 * LIMITS.steps[1]  # of samplers with two calls a step; PNDM's nine more are fewer
_SIDE = bounds(*LIMITS.size_px)
_PICTURE_CHARS = 6 << 20  # in base64; a body of the usual limit holds one, or two that are smaller
_SEPARATORS = 1 << 16  # of JSON values in a body, which bound what it takes to read it; texts may hold them too
_SEEDS = 1 << 32  # of those that the server draws; every client holds such a number exactly


@dataclass(frozen=True, kw_only=True)
@bounded
class ControlForm:
    """A ControlNet of the bundle by its name, and what it sees: a PNG, JPEG or WebP file in base64.

    `scale` weighs what it adds; it acts on the calls between the shares `start` and `end` of all that are made.
    """

    name: str = field(metadata={"chars": (1, 32)})
    image: str = field(metadata={"chars": (1, _PICTURE_CHARS)})
    scale: float = field(default=1.0, metadata=bounds(*LIMITS.control_scale))
    start: float = field(default=0.0, metadata=bounds(0.0, 1.0))
    end: float = field(default=1.0, metadata=bounds(0.0, 1.0))

    def __post_init__(self) -> None:
        check_chars(self)


@dataclass(frozen=True, kw_only=True)
@bounded
class Drawing:
    """What is drawn; what is not given is the model's own choice. `width` and `height` come together.

    `image` is a PNG, JPEG or WebP file in base64 that the picture begins with, under the share `strength` of the noise;
    `mask` is another, white where the image is drawn anew. `controls` are ControlNets with the pictures that they see;
    with `guess` they lead without a prompt.
    """

    prompt: str = field(metadata={"chars": (1, LIMITS.prompt_chars)})
    negative_prompt: str | None = field(default=None, metadata={"chars": (0, LIMITS.prompt_chars)})
    model: str | None = field(default=None, metadata={"chars": (1, 64)})
    steps: int | None = field(default=None, metadata=bounds(*LIMITS.steps))
    guidance: float | None = field(default=None, metadata=bounds(*LIMITS.guidance))
    width: int | None = field(default=None, metadata=_SIDE)
    height: int | None = field(default=None, metadata=_SIDE)
    seed: int = field(default=0, metadata=bounds(*LIMITS.seed))
    rng: str = field(default="torch", metadata=choices(*NOISES))
    sampler: str | None = field(default=None, metadata=choices(*SAMPLERS))
    spacing: str | None = field(default=None, metadata=choices(*SPACINGS))
    eta: float | None = field(default=None, metadata=bounds(*LIMITS.eta))
    image: str | None = field(default=None, metadata={"chars": (1, _PICTURE_CHARS)})
    mask: str | None = field(default=None, metadata={"chars": (1, _PICTURE_CHARS)})
    strength: float | None = field(default=None, metadata=bounds(*LIMITS.strength))
    controls: tuple[ControlForm, ...] = field(default=(), metadata={"items": LIMITS.controls})
    guess: bool = False
    prompt_syntax: str = field(default=PLAIN.syntax, metadata=choices(*SYNTAXES))
    clip_skip: int = field(default=PLAIN.clip_skip, metadata=bounds(*LIMITS.clip_skip))
    deadline_seconds: float | None = field(default=None, metadata=bounds(*DEADLINE_SECONDS))

    def __post_init__(self) -> None:
        if (self.width is None) != (self.height is None):
            raise ConfigError("width and height come together; give both or neither")
        if len(self.controls) > LIMITS.controls:
            raise ConfigError(f"there are {len(self.controls)} controls; at most {LIMITS.controls} act at once")
        check_chars(self)


@dataclass(frozen=True, kw_only=True)
class GenerateForm(Drawing):
    """Body of `/v1/generate`. `previews`: a picture of the noisy latents every so many steps (0: none)."""

    images: int = field(default=1, metadata=bounds(*LIMITS.images))
    response: str = field(default="png", metadata=choices("png", "json", "events"))
    previews: int = field(default=0, metadata=bounds(0, LIMITS.steps[1]))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_response(self.response, self.images, self.previews)


@dataclass(frozen=True, kw_only=True)
class HandoffForm(Drawing):
    """Body of `/v1/handoff`: `split` model calls are made here. `dtype` float16 halves the bytes and rounds;
    `embeddings` travel unless the receiver encodes the prompt itself."""

    split: int = field(metadata=bounds(0, MOST_CALLS))
    dtype: str = field(default="float32", metadata=choices(*DTYPES))
    embeddings: bool = True
    response: str = field(default="trajectory", metadata=choices("trajectory", "events"))


@dataclass(frozen=True, kw_only=True)
@bounded
class ResumeForm:
    """Query of `/v1/resume`: with `until` the trajectory comes back before that call, without it the picture.

    `dtype` and `embeddings` as for `/v1/handoff`; `shared_latents`: the sender vouches that another VAE fits.
    """

    until: int | None = field(default=None, metadata=bounds(0, MOST_CALLS))
    dtype: str = field(default="float32", metadata=choices(*DTYPES))
    embeddings: bool = True
    shared_latents: bool = False
    model: str | None = field(default=None, metadata={"chars": (1, 64)})
    response: str = field(default="png", metadata=choices("png", "json", "events"))
    previews: int = field(default=0, metadata=bounds(0, LIMITS.steps[1]))
    deadline_seconds: float | None = field(default=None, metadata=bounds(*DEADLINE_SECONDS))

    def __post_init__(self) -> None:
        check_chars(self)
        check_response(self.response, 1, self.previews)
        if self.until is None and (self.dtype != "float32" or not self.embeddings):
            raise ConfigError("dtype and embeddings are of trajectories; without until the answer is a picture")
        if self.until is not None and self.response == "json":
            raise ConfigError("with until the answer is a trajectory; response is png (its bytes) or events")


_UNUSED = ("quality", "style", "moderation", "user")  # of ImagesForm


@dataclass(frozen=True, kw_only=True)
@bounded
class ImagesForm:
    """Body of `/v1/images/generations`, OpenAI's form. `seed` is ours; without it every request draws other pictures.

    `quality`, `style`, `moderation` and `user` say nothing here; the answer's `warnings` name those that were given.
    """

    prompt: str = field(metadata={"chars": (1, LIMITS.prompt_chars)})
    model: str | None = field(default=None, metadata={"chars": (1, 64)})
    n: int | None = field(default=None, metadata=bounds(*LIMITS.images))
    size: str | None = field(default=None, metadata={"chars": (3, 9)})
    response_format: str | None = field(default=None, metadata=choices("b64_json"))
    output_format: str | None = field(default=None, metadata=choices("png"))
    output_compression: int | None = field(default=None, metadata=bounds(100, 100))
    background: str | None = field(default=None, metadata=choices("auto", "opaque"))
    stream: bool | None = None
    partial_images: int | None = field(default=None, metadata=bounds(0, 0))
    quality: str | None = field(default=None, metadata={"chars": (0, 64)})
    style: str | None = field(default=None, metadata={"chars": (0, 64)})
    moderation: str | None = field(default=None, metadata={"chars": (0, 64)})
    user: str | None = field(default=None, metadata={"chars": (0, 512)})
    seed: int | None = field(default=None, metadata=bounds(*LIMITS.seed))

    def __post_init__(self) -> None:
        check_chars(self)
        if self.stream:
            raise ConfigError("stream is true; pictures come whole here. /v1/generate has events: response=events")

    def drawing(self) -> GenerateForm:
        """The same in our own words. Raises ConfigError for a size that is not WxH."""
        width, height = _sides(self.size)
        return GenerateForm(
            prompt=self.prompt,
            model=self.model,
            images=1 if self.n is None else self.n,
            width=width,
            height=height,
            seed=secrets.randbelow(_SEEDS) if self.seed is None else self.seed,
            response="json",
        )

    def warnings(self) -> tuple[str, ...]:
        """What was asked for and does nothing."""
        given = [name for name in _UNUSED if getattr(self, name) not in (None, "auto")]
        return (f"not used here: {', '.join(given)}",) if given else ()


def read_body(cls: type[T], data: bytes) -> T:
    """A form out of a JSON body.

    Raises:
        ConfigError: not JSON, a key twice, NaN, nesting, more values than a form can have, or whatever the form
            refuses; the legal range is named.
    """
    if sum(map(data.count, (b",", b"[", b"{", b":"))) > _SEPARATORS:
        raise ConfigError(f"the body has more than {_SEPARATORS} commas, colons and brackets: no form takes so many")
    try:
        content = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as fault:
        raise ConfigError(f"the body is not UTF-8: byte {fault.start}") from None
    except (ValueError, RecursionError) as fault:
        raise ConfigError(f"the body is not JSON: {str(fault)[:120]}") from None
    return load(cls, content, "body")


def read_query(cls: type[T], pairs: typing.Iterable[tuple[str, str]]) -> T:
    """A form out of query parameters, each at most once. Raises ConfigError as `read_body`."""
    hints, values = typing.get_type_hints(cls), {}
    for key, text in pairs:
        if key in values:
            raise ConfigError(f"the query has {key[:40]!a} twice")
        values[key] = text if _kind(hints.get(key)) is str else _plain(text)
    return load(cls, values, "query")


def json_schema(cls: type[Any]) -> dict[str, Any]:
    """JSON Schema (2020-12) of a form, bounds and choices included."""
    hints = typing.get_type_hints(cls)
    fields = dataclasses.fields(cls)
    return {
        "type": "object",
        "description": (cls.__doc__ or "").strip(),
        "properties": {entry.name: field_schema(hints[entry.name], entry) for entry in fields},
        "required": [entry.name for entry in fields if entry.default is dataclasses.MISSING],
        "additionalProperties": False,
    }


def field_schema(kind: Any, entry: dataclasses.Field[Any]) -> dict[str, Any]:
    """The schema of one field; a tuple of forms is an array of them."""
    if typing.get_origin(kind) is tuple:
        items = json_schema(typing.get_args(kind)[0])
        return {"type": "array", "items": items, "maxItems": entry.metadata["items"], "default": []}
    names = {int: "integer", float: "number", str: "string", bool: "boolean"}
    plain, meta = _kind(kind), entry.metadata
    made: dict[str, Any] = {"type": names[plain]}
    if "low" in meta:
        made |= {"minimum": meta["low"], "maximum": meta["high"]}
    if "choices" in meta:
        made["enum"] = list(meta["choices"])
    if "chars" in meta:
        made |= {"minLength": meta["chars"][0], "maxLength": meta["chars"][1]}
    if plain is not kind:
        made["type"] = [made["type"], "null"]
        made |= {"enum": [*made["enum"], None]} if "enum" in made else {}
    elif entry.default is not dataclasses.MISSING:
        made["default"] = entry.default
    return made


def check_chars(form: Any) -> None:
    """Raises ConfigError for a text that is shorter or longer than its field allows, or holds half a character."""
    for entry in dataclasses.fields(form):
        value, legal = getattr(form, entry.name), entry.metadata.get("chars")
        if not legal or value is None:
            continue
        if not legal[0] <= len(value) <= legal[1]:
            raise ConfigError(f"{entry.name} has {len(value)} characters; legal is from {legal[0]} to {legal[1]}")
        half = next((char for char in value if "\ud800" <= char <= "\udfff"), "")
        if half:
            raise ConfigError(f"{entry.name} holds U+{ord(half):04X}, half of a surrogate pair, which is no character")


def check_response(response: str, images: int, previews: int) -> None:
    """Raises ConfigError if the form of the answer cannot hold what was asked for."""
    if response == "png" and images > 1:
        raise ConfigError(f"response png holds one image, and images is {images}; ask for json or events")
    if previews and response != "events":
        raise ConfigError(f"previews come with response events; response is {response}")


def _sides(size: str | None) -> tuple[int | None, int | None]:
    if size is None or size == "auto":
        return None, None
    width, cross, height = size.partition("x")
    if not cross or not (width.isdecimal() and height.isdecimal() and size.isascii()):
        raise ConfigError(f"size is {size!a}; it must be WIDTHxHEIGHT, such as 512x512")
    return int(width), int(height)


def _kind(hint: Any) -> Any:
    """The type of a field without its None."""
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return next(kind for kind in typing.get_args(hint) if kind is not type(None))
    return hint


def _plain(text: str) -> int | float | str:
    """A number, true or false as JSON would have it; anything else stays text, for `load` to refuse."""
    try:
        value = json.loads(text[:40], parse_constant=str)
    except (ValueError, RecursionError):
        return text
    return value if type(value) in (int, float, bool) and len(text) <= 40 else text


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table: Mapping[str, Any] = dict(pairs)
    if len(table) != len(pairs):
        raise ConfigError("a key stands twice in the body")
    return dict(table)


def _constant(text: str) -> NoReturn:
    raise ConfigError(f"the body holds {text}, which is no JSON number")
