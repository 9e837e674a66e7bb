"""Many pictures as one, labelled: what `--grid` writes. Pillow only."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from diffship.core.errors import ConfigError

Pixels = NDArray[np.uint8]
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
_GAP = 8
_MAX_SIDE = 16384


def grid(pictures: Sequence[Pixels], labels: Sequence[str], columns: int | None = None) -> Image.Image:
    """`pictures` (each uint8 h x w x 3) in rows on white, each with its label below; about square by default.

    Raises:
        ConfigError: no pictures, another number of labels, or a grid of more than 16384 pixels a side.
    """
    if not pictures or len(pictures) != len(labels):
        raise ConfigError(f"a grid of {len(pictures)} pictures with {len(labels)} labels; give one label a picture")
    columns = columns or math.ceil(math.sqrt(len(pictures)))
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    points = max(10, min(width // 11, 24))
    font, line = ImageFont.load_default(size=points), math.ceil(points * 1.3)
    texts = [wrapped(label, font, width) for label in labels]
    cell = (width + _GAP, height + line * max(len(lines) for lines in texts) + _GAP)
    sheet = (columns * cell[0] + _GAP, math.ceil(len(pictures) / columns) * cell[1] + _GAP)
    if max(sheet) > _MAX_SIDE:
        raise ConfigError(f"the grid would be {sheet[0]}x{sheet[1]} pixels, more than {_MAX_SIDE} a side; draw fewer")
    image = Image.new("RGB", sheet, "white")
    draw = ImageDraw.Draw(image)
    for index, (picture, lines) in enumerate(zip(pictures, texts, strict=True)):
        left, top = _GAP + index % columns * cell[0], _GAP + index // columns * cell[1]
        image.paste(Image.fromarray(picture), (left, top))
        for row, text in enumerate(lines):
            draw.text((left, top + height + row * line), text, fill="black", font=font)
    return image


def wrapped(label: str, font: Font, width: int) -> list[str]:
    """`label` in at most two lines of `width` pixels, broken at a space, the rest cut with an ellipsis."""
    words, first = label.split(), ""
    while words and font.getlength(f"{first} {words[0]}") <= width:
        first = f"{first} {words.pop(0)}".strip()
    if not first:
        return [shortened(" ".join(words), font, width)]
    return [first, shortened(" ".join(words), font, width)] if words else [first]


def shortened(text: str, font: Font, width: int) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text.rstrip() + "..."


def png_bytes(image: Image.Image) -> bytes:
    with io.BytesIO() as file:
        image.save(file, "PNG", optimize=True)
        return file.getvalue()
