"""Makes docs/wire-vectors.json, the test vectors of docs/wire-format.md: `python tests/sampling/wire_vectors.py`.

Every value is a closed formula of its index and exact in 16 bits, so that a vector can be made in any language.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np

from diffship.core.family import Family
from diffship.core.registry import kind
from diffship.sampling.rng import Philox, TorchNoise
from diffship.sampling.samplers import make_sampler
from diffship.sampling.trajectory import Conditioning, Origin, Trajectory
from diffship.sampling.wire import pack

FILE = Path(__file__).parents[2] / "docs" / "wire-vectors.json"
BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
LATENTS = (4, 8, 8)
OLD_FILE = FILE.with_name("wire-vectors-2.json")  # of schema 2, which is read and not written any more


def digests(name: str) -> dict[str, str]:
    return {part: hashlib.sha256(part.encode()).hexdigest() for part in kind(name).shared_parts}


def told(states: np.ndarray, **more: np.ndarray) -> Conditioning:
    return Conditioning({"encoder_hidden_states": states, **more})


def pattern(shape: tuple[int, ...], stride: int) -> np.ndarray:
    """Element i is ((i * stride) mod 37 - 18) / 16."""
    return (((np.arange(math.prod(shape)) * stride) % 37 - 18) / 16).astype(np.float32).reshape(shape)


def trajectories() -> dict[str, tuple[Trajectory, str]]:
    """By name: a trajectory, and the dtype that it is packed in."""
    sd = Family("sd", default_size=64, text_width=8)
    common: dict[str, Any] = {"size": (64, 64), "guidance": 7.5, "latents": pattern(LATENTS, 3)}
    both = {"positive": told(pattern((5, 8), 5)), "negative": told(pattern((5, 8), 7))}
    prompts = Trajectory(
        **common,
        step=2,
        steps=4,
        sampler=make_sampler(BETAS, "ddim"),
        noise=Philox(12345, 1),
        prompt="ein roter Äpfel 🍎",
        negative_prompt="",
        facts={"seed": 12345, "rng": "philox", "image": 1},
    )
    multistep = Trajectory(
        **common,
        **both,
        step=3,
        steps=6,
        sampler=make_sampler(BETAS, "dpmpp-2m"),
        noise=TorchNoise.seeded(7).draw(LATENTS)[1],
        history=(pattern(LATENTS, 11),),
        prompt="a black cat",
        facts={"seed": 7, "rng": "torch"},
        origin=Origin(sd, digests("sd")),
    )
    ids = np.array([64, 64, 0, 0, 64, 64], np.float32)
    sdxl = Trajectory(
        **common,
        step=1,
        steps=3,
        sampler=make_sampler({**BETAS, "timestep_spacing": "trailing"}, "euler-a"),
        noise=Philox(2**63 - 1, 0),
        positive=told(pattern((5, 16), 5), text_embeds=pattern((8,), 2), time_ids=ids),
        negative=told(np.zeros((5, 16), np.float32), text_embeds=np.zeros(8, np.float32), time_ids=ids),
        prompt="two frogs",
        facts={"seed": 2**63 - 1, "rng": "philox", "image": 0},
        origin=Origin(Family("sdxl", default_size=64, text_width=16, pooled_width=8, time_ids=6), digests("sdxl")),
    )
    inpaint = Trajectory(
        **common,
        **both,
        step=4,
        steps=5,
        sampler=make_sampler({**BETAS, "skip_prk_steps": True, "steps_offset": 1}, "pndm"),
        noise=Philox(9, 3),
        history=tuple(pattern(LATENTS, stride) for stride in (13, 17, 19)),
        mask=(pattern((1, 8, 8), 23) > 0).astype(np.float32),
        masked_latents=pattern(LATENTS, 29),
        prompt="a hat",
        negative_prompt="blurry",
        facts={"seed": 9, "rng": "philox", "image": 3},
        origin=Origin(Family("sd", default_size=64, text_width=8, unet_channels=9), digests("sd")),
    )
    two_calls = Trajectory(
        **common,
        **both,
        step=7,
        steps=5,
        sampler=make_sampler({**BETAS, "timestep_spacing": "trailing"}, "heun"),
        noise=Philox(3, 0),
        history=(pattern(LATENTS, 31), pattern(LATENTS, 33)),
        prompt="a boat",
        facts={"seed": 3, "rng": "philox", "image": 0},
    )
    return {
        "ddim-philox-prompts": (prompts, "float32"),
        "dpmpp-2m-torch": (multistep, "float32"),
        "sdxl-euler-a-float16": (sdxl, "float16"),
        "inpaint-pndm": (inpaint, "float32"),
        "heun-second-call": (two_calls, "float32"),
    }


def vector(name: str, trajectory: Trajectory, dtype: str) -> dict[str, Any]:
    """The bytes, and what the next call does with the trajectory in them."""
    data = pack(trajectory, dtype)
    following = trajectory.sampler.coefficients(trajectory.step, trajectory.steps, len(trajectory.history))
    fresh, _ = trajectory.noise.draw(LATENTS, trajectory.step + 1)
    return {
        "name": name,
        "bytes": len(data),
        "sha256": hashlib.sha256(data).hexdigest(),
        "next_call": {
            "input_scale": following.input_scale,
            "timestep": following.timestep,
            "matrix": [list(row) for row in following.matrix],
        },
        "next_noise": [float(value) for value in fresh.reshape(-1)[:4]],
        "base64": base64.b64encode(data).decode(),
    }


def reseal(data: bytes) -> bytes:
    """The same bytes with a checksum that is right."""
    start = data.index(b'"sha256":"') + 10
    zeroed = data[:start] + b"0" * 64 + data[start + 64 :]
    return data[:start] + hashlib.sha256(zeroed).hexdigest().encode() + data[start + 64 :]


def refused(data: bytes) -> list[dict[str, str]]:
    """What a reader must not accept, made of one good vector."""
    (length,) = struct.unpack_from("<Q", data)
    flipped = bytearray(data)
    flipped[-1] ^= 1
    bad = {
        "a flipped bit": bytes(flipped),
        "a byte short": data[:-1],
        "a byte long": data + b"\0",
        "a header longer than the file": struct.pack("<Q", 1 << 62) + data[8:],
        "another schema": reseal(data.replace(b'"schema":"3"', b'"schema":"9"')),
        "NaN in the latents": reseal(data[: 8 + length] + b"\0\0\xc0\x7f" + data[12 + length :]),
        "a step beyond the end": reseal(data.replace(rb"{\"step\": 2,", rb"{\"step\": 7,")),
    }
    return [{"name": name, "base64": base64.b64encode(entry).decode()} for name, entry in bad.items()]


def document() -> str:
    """The file's text."""
    made = {name: vector(name, *entry) for name, entry in trajectories().items()}
    first = base64.b64decode(made["ddim-philox-prompts"]["base64"])
    whole = {"schema": "3", "vectors": list(made.values()), "refused": refused(first)}
    return json.dumps(whole, indent=1) + "\n"


if __name__ == "__main__":
    FILE.write_text(document(), encoding="utf-8")
