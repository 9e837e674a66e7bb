"""Pictures, and PNG files that carry the settings: A1111's `parameters` line and our JSON."""

from __future__ import annotations

import io
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin

from diffship.core.atomic import write_file
from diffship.core.brief import brief
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.core.sniff import describe_bytes, foreign
from diffship.sampling.trajectory import Trajectory

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_FILE_BYTES = 64 << 20
_TEXT_BYTES = 64 << 10
_TEXT_CHUNKS = 16
A1111_SAMPLERS = {
    "ddim": "DDIM",
    "deis": "DEIS",
    "dpmpp-2m": "DPM++ 2M",
    "dpmpp-2m-karras": "DPM++ 2M Karras",
    "dpmpp-2m-sde": "DPM++ 2M SDE",
    "dpmpp-2m-sde-karras": "DPM++ 2M SDE Karras",
    "dpmpp-3m-sde": "DPM++ 3M SDE",
    "dpmpp-3m-sde-karras": "DPM++ 3M SDE Karras",
    "dpmpp-sde": "DPM++ SDE",
    "euler": "Euler",
    "euler-a": "Euler a",
    "heun": "Heun",
    "kdpm2": "DPM2",
    "kdpm2-a": "DPM2 a",
    "lcm": "LCM",
    "pndm": "PLMS",
    "tcd": "TCD",
    "unipc": "UniPC",
}


@brief
@dataclass(frozen=True, eq=False)
class Picture:
    """uint8 pixels (height, width, 3), the settings that made them, and where the trajectory ended.

    `picture.save("apple.png")` writes it with its settings; a notebook shows it as it is.
    """

    pixels: NDArray[np.uint8]
    settings: dict[str, Any] = field(default_factory=dict)
    trajectory: Trajectory | None = None

    def png(self) -> bytes:
        """PNG with `parameters` (as A1111 writes) and `diffship` (JSON) texts."""
        texts = PngImagePlugin.PngInfo()
        if self.settings:
            texts.add_itxt("parameters", parameters(self.settings))
            texts.add_itxt("diffship", json.dumps(self.settings, ensure_ascii=False, sort_keys=True))
        out = io.BytesIO()
        Image.fromarray(self.pixels).save(out, "PNG", pnginfo=texts)
        return out.getvalue()

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        return self.png()

    def save(self, path: str | Path) -> None:
        """Write the PNG, over what was there; the file appears whole or not at all."""
        write_file(path, self.png())


def parameters(settings: Mapping[str, Any]) -> str:
    """The text that A1111 and its readers know: prompt, negative prompt, one line of values."""
    values = {
        "Steps": settings.get("steps"),
        "Sampler": A1111_SAMPLERS.get(str(settings.get("sampler")), settings.get("sampler")),
        "CFG scale": _short(settings.get("guidance")),
        "Denoising strength": _short(settings.get("strength")),
        "Seed": settings.get("seed"),
        "Size": f"{settings['width']}x{settings['height']}" if "width" in settings else None,
        "Model hash": str(settings.get("model_digest", ""))[:10] or None,
        "Model": settings.get("model"),
        "RNG": {"torch": "CPU", "philox": "Philox"}.get(str(settings.get("rng"))),
        "Clip skip": settings["clip_skip"] + 1 if "clip_skip" in settings else None,
        "Version": "diffship",
    }
    negative = settings.get("negative_prompt")
    lines = [str(settings.get("prompt", "")), *([f"Negative prompt: {negative}"] if negative else [])]
    return "\n".join(
        [*lines, ", ".join(f"{key}: {_quoted(value)}" for key, value in values.items() if value is not None)]
    )


def read_settings(path: str | Path) -> dict[str, Any]:
    """The `diffship` JSON of a PNG, or {"parameters": text} of one by other tools, or {}; pixels are not decoded.

    Raises:
        ConfigError: not a PNG, or larger or longer than the limits.
    """
    texts = dict(_texts(_bounded(path)))
    if "diffship" in texts:
        try:
            made = json.loads(texts["diffship"])
        except (ValueError, RecursionError):
            raise ConfigError(f"{path}: its diffship text is not JSON") from None
        if not isinstance(made, dict):
            raise ConfigError(f"{path}: its diffship text is not a table")
        return made
    return {"parameters": texts["parameters"]} if "parameters" in texts else {}


def read_pixels(path: str | Path) -> NDArray[np.uint8]:
    """The pixels of `read_image`."""
    return read_image(path)[0]


def read_image(path: str | Path) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """RGB pixels (height, width, 3) of an image file, its EXIF rotation applied, and warnings.

    Raises:
        ConfigError: not a PNG, JPEG or WebP file, several pictures in one file, or larger than the limits.
    """
    return image_in(_bounded(path), str(path))


def image_in(data: bytes, name: str) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """`read_image` of bytes, which errors call `name`; the picture's size is checked before it is decoded."""
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            _require_one(image, name)
            clear = _transparent(image)
            pixels = np.array(eight_bits(_upright(image)).convert("RGB"), np.uint8)
    except ConfigError:
        raise
    except Exception as fault:  # Pillow's decoders raise many kinds
        raise ConfigError(f"{name}: cannot be read as PNG, JPEG or WebP: {undecoded(fault, data)}") from None
    told = f"{name}: its transparency is left out, and the colours below it are used, as in stock pipelines"
    return pixels, (told,) if clear else ()


def grey(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """RGB pixels (height, width, 3) as grey (height, width) by ITU-R 601, as diffusers takes a coloured mask."""
    return np.asarray(Image.fromarray(pixels).convert("L"))


def _require_one(image: Image.Image, name: str) -> None:
    """Raises ConfigError for a picture of too many pixels, or one of several; a camera's previews (MPO) are none."""
    if image.width * image.height > LIMITS.decoded_pixels:
        raise ConfigError(
            f"{name}: is {image.width}x{image.height}; at most {LIMITS.decoded_pixels} pixels are decoded"
        )
    frames = getattr(image, "n_frames", 1)
    if frames > 1 and image.format != "MPO":
        raise ConfigError(f"{name}: is animated ({frames} frames); save the frame that you mean as a picture")


def _transparent(image: Image.Image) -> bool:
    """Whether any pixel lets through what is behind it."""
    if not image.has_transparency_data:
        return False
    least = image.convert("RGBA").getchannel("A").getextrema()[0]
    return isinstance(least, (int, float)) and least < 255


def decoder_fault(fault: Exception) -> str:
    """What a decoder of Pillow says, without the address of the bytes that it read."""
    return re.sub(r" ?<_io\.\w+ object at 0x[0-9a-f]+>", "", str(fault))[:120]


def undecoded(fault: Exception, data: bytes) -> str:
    """Why a picture is none: what its decoder says, and what its bytes are if they are known."""
    told = describe_bytes(data)
    return f"{decoder_fault(fault)}; {told}" if told else decoder_fault(fault)


def eight_bits(image: Image.Image) -> Image.Image:
    """Grey of 16 bits a pixel scaled to 8, which Pillow would cut off at 255; any other picture as it is."""
    if not image.mode.startswith("I"):
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _bounded(path: str | Path) -> bytes:
    try:
        if not Path(path).is_file():
            raise ConfigError(f"{path}: cannot be read: {foreign(path, 'there is no such file')}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size > _FILE_BYTES:
                raise ConfigError(f"{path}: has {size} bytes; at most {_FILE_BYTES} are read")
            return file.read(size)
    except OSError as fault:
        raise ConfigError(f"{path}: cannot be read: {fault.strerror or fault}") from None


def _texts(data: bytes) -> Iterator[tuple[str, str]]:
    """Uncompressed text chunks (tEXt, iTXt) ahead of any decoding; compressed ones are never inflated."""
    if not data.startswith(_SIGNATURE):
        raise ConfigError("not a PNG file")
    place, found = len(_SIGNATURE), 0
    while place + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        if kind in (b"tEXt", b"iTXt"):
            found += 1
            if found > _TEXT_CHUNKS or length > _TEXT_BYTES:
                raise ConfigError(f"the PNG has too much text: at most {_TEXT_CHUNKS} of {_TEXT_BYTES} bytes are read")
            yield from _text(kind, data[place + 8 : place + 8 + length])
        place += 12 + length


def _text(kind: bytes, body: bytes) -> Iterator[tuple[str, str]]:
    key, _, rest = body.partition(b"\0")
    if kind == b"iTXt":
        if rest[:1] != b"\0":
            return
        rest = rest[2:].split(b"\0", 2)[-1]
    yield key.decode("latin-1"), rest.decode("utf-8" if kind == b"iTXt" else "latin-1", "replace")


def _short(value: object) -> object:
    return f"{value:g}" if isinstance(value, float) else value


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if "," in text or ":" in text or "\n" in text else text
