"""Pictures with captions, read from what people have: an image folder, webdataset shards, or `emoji`'s own data.

Whatever the source, a picture is a stretch of bytes in a file, read and decoded when it is asked for.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from diffship.core.errors import SourceError
from diffship.core.limits import LIMITS
from diffship.core.sniff import also
from diffship.sampling.picture import decoder_fault, eight_bits, undecoded
from diffship.training.gathering import LEGAL, Sample, gathered

_FORMATS = ("PNG", "JPEG", "WEBP")
_PICTURE_BYTES = 64 << 20


@dataclass(frozen=True)
class PairedPictures:
    """Captioned pictures, cropped to `size` x `size` when they are read; `told` says how many there are, and what of
    the folder is left, and why."""

    size: int
    samples: tuple[Sample, ...] = field(repr=False)
    digest: str
    told: str = ""

    @classmethod
    def open(cls, folder: str | Path, size: int) -> PairedPictures:
        """The pictures of `folder`. Every file is read once: headers are checked, `digest` is the sha256 (hex) over
        pictures and captions in their order. Pixels are decoded later.

        Of the folder that `diffship train emoji-data` writes, the training pictures of the stated domain are taken.

        Raises:
            SourceError: no folder, no pictures, pictures without captions, damaged or too large files (the first one is
                named), or more than a tenth of the pictures would be left.
        """
        folder = Path(folder)
        if not folder.is_dir():
            raise SourceError(f"{folder} is not a folder of pictures with captions; {LEGAL}{also(folder)}")
        samples, left = gathered(folder)
        total = hashlib.sha256()
        for sample in samples:
            line = [hashlib.sha256(_checked(sample)).hexdigest(), *sample.captions]
            total.update(json.dumps(line, separators=(",", ":")).encode() + b"\n")
        return cls(size, tuple(samples), total.hexdigest(), f"{folder}: {left.text(len(samples))}")

    def __len__(self) -> int:
        return len(self.samples)

    def captions(self, row: int) -> list[str]:
        """Ways to describe a picture, the plain caption first."""
        return list(self.samples[row].captions)

    def pixels(self, rows: Sequence[int], flips: Sequence[bool] | None = None) -> NDArray[np.uint8]:
        """(n, size, size, 3) uint8 RGB: the short side scaled to `size`, the middle cut out, mirrored if `flips`.

        Raises:
            SourceError: a picture is damaged; it is named.
        """
        made = np.stack([self._decoded(self.samples[row]) for row in rows])
        if flips is not None:
            made[list(flips)] = made[list(flips)][:, :, ::-1]
        return made

    def _decoded(self, sample: Sample) -> NDArray[np.uint8]:
        try:
            with Image.open(io.BytesIO(sample.read()), formats=_FORMATS) as image:
                square = ImageOps.fit(_flat(image), (self.size, self.size), Image.Resampling.LANCZOS)
        except Exception as fault:  # Pillow's decoders raise many kinds
            raise SourceError(f"{sample.name}: is damaged: {decoder_fault(fault)}") from None
        return np.asarray(square, np.uint8)


def _flat(image: Image.Image) -> Image.Image:
    """Upright RGB; what is transparent lies on white."""
    upright = eight_bits(ImageOps.exif_transpose(image))
    if "A" not in upright.getbands() and "transparency" not in upright.info:
        return upright.convert("RGB")
    layered = upright.convert("RGBA")
    ground = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(ground, layered).convert("RGB")


def _checked(sample: Sample) -> bytes:
    """The bytes of a picture whose header is legal; no pixel is decoded. Raises SourceError, naming it, otherwise."""
    if sample.count > _PICTURE_BYTES:
        raise SourceError(f"{sample.name}: has {sample.count} bytes; at most {_PICTURE_BYTES} are read")
    data = sample.read()
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            width, height = image.size
    except Exception as fault:  # Pillow's decoders raise many kinds
        raise SourceError(f"{sample.name}: is no PNG, JPEG or WebP picture: {undecoded(fault, data)}") from None
    if width * height > LIMITS.decoded_pixels:
        raise SourceError(f"{sample.name}: is {width}x{height}; at most {LIMITS.decoded_pixels} pixels are decoded")
    return data
