"""PNG files: what is written can be read by us and by Pillow; hostile files are bounded."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from diffship.core.errors import ConfigError
from diffship.sampling.picture import Picture, parameters, read_image, read_pixels, read_settings

SETTINGS: dict[str, Any] = {
    "prompt": "a red äpfel, 😀",
    "negative_prompt": "blurry",
    "steps": 25,
    "sampler": "dpmpp-2m-karras",
    "guidance": 7.5,
    "seed": 42,
    "rng": "torch",
    "width": 8,
    "height": 16,
    "model": "emoji",
    "model_digest": "abcdef0123456789",
}
PIXELS = np.random.default_rng(0).integers(0, 256, (16, 8, 3), np.uint8)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Picture(PIXELS, SETTINGS).save(path)
    assert read_settings(path) == SETTINGS
    assert np.array_equal(read_pixels(path), PIXELS)
    with Image.open(path) as image:
        assert image.text["parameters"] == parameters(SETTINGS)
        assert json.loads(image.text["diffship"]) == SETTINGS


def test_parameters_are_what_a1111_writes() -> None:
    assert parameters(SETTINGS).split("\n") == [
        "a red äpfel, 😀",
        "Negative prompt: blurry",
        "Steps: 25, Sampler: DPM++ 2M Karras, CFG scale: 7.5, Seed: 42, Size: 8x16, Model hash: abcdef0123, "
        "Model: emoji, RNG: CPU, Version: diffship",
    ]
    plain = parameters({**SETTINGS, "negative_prompt": "", "guidance": 7.0, "model": "a, b: c"})
    assert "Negative" not in plain
    assert "CFG scale: 7, " in plain
    assert 'Model: "a, b: c"' in plain


def test_texts_of_other_tools(tmp_path: Path) -> None:
    info = PngInfo()
    info.add_text("parameters", "a cat\nSteps: 20")
    Image.fromarray(PIXELS).save(tmp_path / "a.png", pnginfo=info)
    assert read_settings(tmp_path / "a.png") == {"parameters": "a cat\nSteps: 20"}
    Image.fromarray(PIXELS).save(tmp_path / "b.png")
    assert read_settings(tmp_path / "b.png") == {}


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks) + chunk(b"IEND", b"")


def bomb(side: int) -> bytes:
    rows = zlib.compressobj(9)
    data = b"".join(rows.compress(bytes(side // 8 + 1) * 100) for _ in range(side // 100)) + rows.flush()
    return png(chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)), chunk(b"IDAT", data))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"not a png",
        b"\x89PNG\r\n\x1a\n",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\xff\xd8\xff\xe0" + b"\0" * 50,
        bomb(19_000),
        Picture(PIXELS, SETTINGS).png()[:200],
    ],
    ids=["empty", "text", "signature", "svg", "jpeg", "bomb", "truncated"],
)
def test_bad_pictures_are_refused_before_decoding(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(ConfigError):
        read_pixels(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_text_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    for data in (
        png(*[chunk(b"tEXt", b"parameters\0x")] * 100_000),
        png(chunk(b"tEXt", b"parameters\0" + b"x" * (1 << 20))),
        png(chunk(b"iTXt", b"diffship\0\0\0\0\0[1]")),
        png(chunk(b"iTXt", b"diffship\0\0\0\0\0{")),
        b"GIF89a",
    ):
        path.write_bytes(data)
        with pytest.raises(ConfigError):
            read_settings(path)
    packed = png(chunk(b"iTXt", b"diffship\0\1\0\0\0" + zlib.compress(b"x" * 1_000_000)))
    path.write_bytes(packed)
    assert read_settings(path) == {}
    with pytest.raises(ConfigError, match="cannot be read"):
        read_settings(tmp_path / "missing.png")


def test_a_huge_length_field_ends_the_walk(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I4s", 2**32 - 1, b"IHDR") + b"abc")
    assert read_settings(path) == {}


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS)
    exif = image.getexif()
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "PNG", exif=exif)
    (tmp_path / "r.png").write_bytes(out.getvalue())
    assert np.array_equal(read_pixels(tmp_path / "r.png"), np.rot90(PIXELS, -1))


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint16).reshape(16, 16) * 257
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    pixels = read_pixels(tmp_path / "ramp.png")
    assert np.array_equal(pixels[..., 0].ravel(), np.arange(256)) and np.array_equal(pixels[..., 0], pixels[..., 2])


def saved(path: Path, image: Image.Image, **how: object) -> Path:
    image.save(path, **how)  # type: ignore[arg-type]
    return path


def test_palette_cmyk_and_alpha_give_the_colours_that_stock_pipelines_see(tmp_path: Path) -> None:
    """The oracle is Pillow's own conversion, which diffusers' load_image makes."""
    flat = np.zeros((24, 32, 3), np.uint8)
    flat[:, :16], flat[:, 16:] = (200, 30, 60), (10, 220, 90)
    image, clear = Image.fromarray(flat), Image.fromarray(flat).convert("RGBA")
    clear.putalpha(Image.fromarray((flat[..., 0] // 2).astype(np.uint8)))
    files = [
        saved(tmp_path / "palette.png", image.convert("P", palette=Image.Palette.ADAPTIVE)),
        saved(tmp_path / "cmyk.jpg", image.convert("CMYK"), quality=100),
        saved(tmp_path / "alpha.png", clear),
        saved(tmp_path / "grey.webp", image.convert("L"), lossless=True),
    ]
    for file in files:
        pixels, told = read_image(file)
        assert np.array_equal(pixels, np.asarray(Image.open(file).convert("RGB")))
        assert [("transparency" in text) for text in told] == ([True] if file.stem == "alpha" else [])
    assert np.abs(read_pixels(tmp_path / "cmyk.jpg").astype(int) - flat).max() < 12
    opaque = saved(tmp_path / "opaque.png", image.convert("RGBA"))
    assert read_image(opaque)[1] == ()


@pytest.mark.parametrize("end", ["png", "webp"])
def test_an_animated_picture_is_refused(tmp_path: Path, end: str) -> None:
    frames = [Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 100, 200)]
    file = saved(tmp_path / f"a.{end}", frames[0], save_all=True, append_images=frames[1:])
    with pytest.raises(ConfigError, match=r"is animated \(3 frames\)"):
        read_pixels(file)


def test_a_camera_s_preview_behind_its_picture_is_no_animation(tmp_path: Path) -> None:
    first, preview = (Image.fromarray(np.full((8, 8, 3), value, np.uint8)) for value in (10, 200))
    file = saved(tmp_path / "a.jpg", first, format="MPO", save_all=True, append_images=[preview])
    assert read_pixels(file).max() < 20
