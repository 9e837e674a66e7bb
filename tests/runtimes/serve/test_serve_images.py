"""Requests with an image and a mask: what `generate` draws of them, and what is refused."""

from __future__ import annotations

import base64
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sampling_toy import ToyModel
from serve_toy import ask, toy_service

from diffship.sampling.generate import Request, generate
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.wire import unpack

PIXELS = np.random.default_rng(3).integers(0, 256, (64, 128, 3), np.uint8)
MASK = np.zeros((64, 128), np.uint8)
MASK[:, 40:] = 255
ASKED: dict[str, Any] = {"prompt": "red cat", "steps": 4, "seed": 7}


def packed(pixels: Any, form: str = "PNG") -> str:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, form)
    return base64.b64encode(out.getvalue()).decode()


def test_an_image_and_a_mask_give_the_bytes_of_generate_alone_and_after_a_handoff() -> None:
    body = {**ASKED, "image": packed(PIXELS), "mask": packed(MASK), "strength": 0.75}
    (alone,) = generate(ToyModel(), Request("red cat", steps=4, seed=7, image=PIXELS, mask=MASK, strength=0.75))
    with toy_service() as service:
        whole = ask(service, "POST", "/v1/generate", json=body)
        half = ask(service, "POST", "/v1/handoff", json={**body, "split": 2})
        early = ask(service, "POST", "/v1/handoff", json={**body, "split": 0})
    assert whole.content == alone.png()
    carried = denoise([unpack(half.content)], denoiser_of(ToyModel()))[0]
    assert np.array_equal(carried.latents, alone.trajectory.latents)  # type: ignore[union-attr]
    assert early.status_code == 422 and "legal is from 1 to 4" in early.text


def test_a_large_image_is_resized_with_a_warning_and_its_body_may_be_longer_than_text() -> None:
    large = np.random.default_rng(5).integers(0, 256, (300, 400, 3), np.uint8)  # 480 kB in base64
    with toy_service() as service:
        body = {**ASKED, "image": packed(large), "width": 128, "height": 64, "response": "json"}
        answer = ask(service, "POST", "/v1/generate", json=body).json()
        refused = ask(service, "POST", "/v1/images/generations", json={"prompt": "x" * 100_000})
    assert answer["warnings"] == ["the image has 400x300 pixels and is resized to 128x64; its proportions change"]
    assert refused.status_code == 413


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"image": "data:image/png;base64,AAAA"}, "image is not base64"),
        ({"image": base64.b64encode(b"GIF89a and more").decode()}, "image: cannot be read as PNG, JPEG or WebP"),
        ({"image": packed(PIXELS)[:400]}, "image: cannot be read"),
        ({"mask": packed(MASK)}, "a mask and no image"),
        ({"strength": 0.5}, "no image to begin with"),
        ({"image": packed(PIXELS), "strength": 0.1}, "leaves no step to draw"),
        ({"image": packed(PIXELS[:20])}, "image has 128x20 pixels"),
    ],
)
def test_what_is_no_picture_or_does_not_fit_is_refused(body: dict[str, Any], message: str) -> None:
    with toy_service() as service:
        answer = ask(service, "POST", "/v1/generate", json={**ASKED, **body})
    assert answer.status_code == 422 and message in answer.json()["error"]["message"]


def test_a_body_of_more_values_than_any_form_has_is_not_parsed() -> None:
    with toy_service() as service:
        answer = ask(
            service, "POST", "/v1/generate", content=b"[" + b"0," * 70_000 + b"0]",
            headers={"content-type": "application/json"},
        )  # fmt: skip
    assert answer.status_code == 422 and "no form takes so many" in answer.text
