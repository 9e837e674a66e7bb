"""Trajectories as bytes: bit-exact handoff at every step, and nothing but HandoffError for damage."""

from __future__ import annotations

import hashlib
import json
import struct
import tracemalloc
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_toy import ToyModel, toy_for

from diffship.core.errors import HandoffError
from diffship.core.limits import LIMITS
from diffship.sampling.generate import Request, draw, finish, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.samplers import SAMPLERS
from diffship.sampling.trajectory import Trajectory
from diffship.sampling.wire import pack, unpack


def begun(kind: str = "sd", until: int = 3, **changes: Any) -> Trajectory:
    model = ToyModel(kind)
    asked = {"prompt": "a red äpfel", "sampler": "dpmpp-2m", "steps": 6, "seed": 5, **changes}
    if kind == "inpaint":
        asked |= {"image": np.full((64, 64, 3), 90, np.uint8), "mask": np.eye(64, dtype=np.uint8) * 255}
    return denoise(start(model, Request(**asked)), denoiser_of(model), until)[0]


@pytest.mark.parametrize("rng", ["torch", "philox"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_handoff_at_every_step_changes_no_bit(name: str, rng: str) -> None:
    model = toy_for(name)
    denoiser = denoiser_of(model)
    first = start(model, Request("x", sampler=name, steps=6, seed=3, rng=rng))
    whole = finish(model, denoise(first, denoiser))[0]
    for k in range(first[0].calls + 1):
        other = toy_for(name)
        arrived = unpack(pack(denoise(first, denoiser, until=k)[0]))
        arrived.require_fit(other.family)
        end = denoise([arrived], denoiser_of(other))[0]
        assert np.array_equal(end.latents, whole.trajectory.latents)
        assert np.array_equal(finish(other, [end])[0].pixels, whole.pixels)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "lcm", "inpaint"])
def test_round_trip_is_exact(kind: str) -> None:
    trajectory = begun(kind)
    data = pack(trajectory)
    arrived = unpack(data)
    assert pack(arrived) == data
    assert (arrived.step, arrived.size, arrived.prompt) == (3, (64, 64), "a red äpfel")
    assert arrived.sampler == trajectory.sampler
    assert arrived.facts == trajectory.facts
    assert (arrived.mask is None) == (kind != "inpaint")
    assert ("text_embeds" in arrived.positive) == (kind == "sdxl")
    assert np.array_equal(arrived.history[0], trajectory.history[0])


def test_any_safetensors_reader_opens_it() -> None:
    tensors = safetensors.numpy.load(pack(begun()))
    assert tensors["latents"].shape == (4, 8, 8)
    assert tensors["noise.key"].dtype == np.uint32


def test_prompts_may_travel_instead_of_embeddings() -> None:
    small = unpack(pack(begun().without_conditioning()))
    assert small.positive is None
    assert small.prompt == "a red äpfel"
    assert len(pack(small)) < 12_000


@pytest.mark.parametrize("kind", ["sd", "sdxl", "lcm"])
@pytest.mark.parametrize("negative", [None, "", "blurry"])
def test_a_receiver_encodes_prompts_that_came_without_embeddings(kind: str, negative: str | None) -> None:
    trajectory = begun(kind, negative=negative)
    whole = draw(ToyModel(kind), [trajectory])[0]
    resumed = draw(ToyModel(kind), [unpack(pack(trajectory.without_conditioning()))])[0]
    assert np.array_equal(whole.trajectory.latents, resumed.trajectory.latents)
    assert whole.settings == resumed.settings


def test_restart_without_history_is_first_order() -> None:
    trajectory = replace(begun(), history=())
    assert unpack(pack(trajectory)).history == ()


DATA = pack(begun())


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
def test_a_flipped_bit_is_refused(place: int, bit: int) -> None:
    damaged = bytearray(DATA)
    damaged[place] ^= 1 << bit
    with pytest.raises(HandoffError):
        unpack(bytes(damaged))


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.integers(0, len(DATA) - 1).map(lambda end: DATA[:end]), st.binary(max_size=300)))
def test_truncated_and_foreign_bytes_are_refused(data: bytes) -> None:
    for candidate in (data, DATA + data[:1] + b"\0"):
        with pytest.raises(HandoffError):
            unpack(candidate)


def forged(change: Any, body: Any = None) -> bytes:
    """The bytes of DATA with a changed header and body, and a checksum that is right again."""
    (length,) = struct.unpack_from("<Q", DATA)
    table = json.loads(DATA[8 : 8 + length])
    about = json.loads(table["__metadata__"]["trajectory"])
    change(about, table)
    table["__metadata__"]["sha256"] = "0" * 64
    table["__metadata__"]["trajectory"] = json.dumps(about)
    header = json.dumps(table, separators=(",", ":")).encode()
    blob = struct.pack("<Q", len(header)) + header + (body or (lambda old: old))(DATA[8 + length :])
    return blob.replace(b"0" * 64, hashlib.sha256(blob).hexdigest().encode(), 1)


ATTACKS: dict[str, Any] = {
    "schema": lambda about, table: table["__metadata__"].update(schema="99"),
    "step beyond the end": lambda about, table: about.update(step=7),
    "negative step": lambda about, table: about.update(step=-1),
    "step is a bool": lambda about, table: about.update(step=True),
    "other sigma count": lambda about, table: about.update(steps=2),
    "steps 10**9": lambda about, table: about.update(steps=10**9),
    "unknown sampler": lambda about, table: about["sampler"].update(_class_name="EvilScheduler"),
    "sampler of 10**9 timesteps": lambda about, table: about["sampler"].update(num_train_timesteps=10**9),
    "sampler is a list": lambda about, table: about.update(sampler=[1]),
    "guidance 1e9": lambda about, table: about.update(guidance=1e9),
    "size": lambda about, table: about.update(size=[64, 10**6]),
    "size of three": lambda about, table: about.update(size=[64, 64, 64]),
    "long prompt": lambda about, table: about.update(prompt="x" * 5000),
    "prompt is a number": lambda about, table: about.update(prompt=5),
    "unknown key": lambda about, table: about.update(more=1),
    "missing key": lambda about, table: about.pop("noise"),
    "noise kind": lambda about, table: about["noise"].update(kind="pickle"),
    "noise position": lambda about, table: about["noise"].update(pos=10**6),
    "facts": lambda about, table: about.update(facts="x" * 10),
    "large facts": lambda about, table: about.update(facts={"x": "y" * 100_000}),
    "dtype": lambda about, table: table["latents"].update(dtype="F64"),
    "shape of 1 GB": lambda about, table: table["latents"].update(shape=[4, 8192, 8192]),
    "negative axis": lambda about, table: table["latents"].update(shape=[4, -8, -8]),
    "fractional axis": lambda about, table: table["latents"].update(shape=[4, 8.0, 8]),
    "hole": lambda about, table: table["history.0"].update(data_offsets=[0, 1024]),
    "unknown tensor": lambda about, table: table.update(evil=table["latents"]),
    "missing latents": lambda about, table: table.pop("latents"),
    "history of another shape": lambda about, table: table["history.0"].update(shape=[4, 4, 16]),
    "offsets as text": lambda about, table: table["latents"].update(data_offsets="ab"),
    "nested 10 000 deep": lambda about, table: about.update(facts=json.loads("[" * 900 + "]" * 900)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_wellformed_lie_is_refused(attack: str) -> None:
    data = forged(ATTACKS[attack])
    tracemalloc.start()
    with pytest.raises(HandoffError) as caught:
        unpack(data)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


def test_forging_itself_is_sound() -> None:
    assert unpack(forged(lambda about, table: None)).step == 3


def test_nan_in_the_body_is_refused() -> None:
    body = lambda old: b"\x00\x00\xc0\x7f" * (len(old) // 4)  # noqa: E731
    with pytest.raises(HandoffError):
        unpack(forged(lambda about, table: None, body))


def test_length_claims_and_size_limits() -> None:
    for length in (2**63, 2**32, len(DATA)):
        with pytest.raises(HandoffError, match="claims"):
            unpack(struct.pack("<Q", length) + DATA[8:])
    with pytest.raises(HandoffError, match="at most"):
        unpack(bytes(LIMITS.trajectory_bytes + 1))


@pytest.mark.parametrize("other", ["sdxl", "inpaint"])
def test_another_family_is_refused(other: str) -> None:
    trajectory = unpack(DATA)
    trajectory.require_fit(ToyModel("sd").family)
    with pytest.raises(HandoffError, match="does not fit"):
        trajectory.require_fit(ToyModel(other).family)
    wrong = replace(ToyModel("sd").family, prediction_type="v_prediction")
    with pytest.raises(HandoffError, match="prediction"):
        trajectory.require_fit(wrong)
