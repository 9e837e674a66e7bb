"""The wire format: test vectors read without our code, half precision, origins, and bytes that lie."""

from __future__ import annotations

import base64
import gc
import hashlib
import json
import math
import random
import re
import struct
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_toy import ToyModel
from wire_vectors import FILE, OLD_FILE, document, pattern, reseal, told, trajectories

from diffship.core.errors import ConfigError, HandoffError
from diffship.core.family import Family
from diffship.sampling.generate import Request, start
from diffship.sampling.loop import denoise, denoiser_of
from diffship.sampling.rng import Philox
from diffship.sampling.samplers import make_sampler
from diffship.sampling.trajectory import Conditioning, Origin, Trajectory
from diffship.sampling.wire import pack, unpack

PAGE = Path(__file__).parents[2] / "docs" / "wire-format.md"
VECTORS = json.loads(FILE.read_text(encoding="utf-8"))
BY_NAME = {entry["name"]: entry for entry in VECTORS["vectors"]}


def page_reader() -> Callable[[bytes], tuple[dict[str, Any], dict[str, np.ndarray]]]:
    """`decode` of the page: it knows the format from the page alone."""
    source = re.search(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert source is not None and "diffship" not in source[1]
    names: dict[str, Any] = {}
    exec(compile(source[1], str(PAGE), "exec"), names)
    return names["decode"]  # type: ignore[no-any-return]


DECODE = page_reader()


def test_the_committed_vectors_are_those_of_the_script() -> None:
    made = json.loads(document())
    assert made["refused"] == VECTORS["refused"]
    for ours, committed in zip(made["vectors"], VECTORS["vectors"], strict=True):
        rounded = {key: (ours.pop(key), committed[key]) for key in ("next_call", "next_noise")}
        assert ours.items() <= committed.items()
        (call, call_there), (noise, noise_there) = rounded["next_call"], rounded["next_noise"]
        np.testing.assert_allclose(call["matrix"], call_there["matrix"], rtol=1e-12)
        assert (call["timestep"], call["input_scale"]) == pytest.approx(
            (call_there["timestep"], call_there["input_scale"])
        )
        np.testing.assert_allclose(noise, noise_there, rtol=1e-6)


@pytest.mark.parametrize("name", BY_NAME)
def test_the_reader_on_the_page_reads_the_vectors(name: str) -> None:
    data = base64.b64decode(BY_NAME[name]["base64"])
    assert len(data) == BY_NAME[name]["bytes"] and hashlib.sha256(data).hexdigest() == BY_NAME[name]["sha256"]
    about, tensors = DECODE(data)
    asked, dtype = trajectories()[name]
    assert (about["prompt"], about["step"], about["steps"]) == (asked.prompt, asked.step, asked.steps)
    assert about["negative_prompt"] == asked.negative_prompt and about["facts"] == asked.facts
    assert (about["origin"] is None) == (asked.origin is None)
    if asked.origin is not None:
        assert about["origin"]["digests"] == {
            part: hashlib.sha256(part.encode()).hexdigest() for part in about["origin"]["digests"]
        }
    assert tensors["latents"].dtype == np.dtype(dtype)
    np.testing.assert_array_equal(tensors["latents"], pattern((4, 8, 8), 3))
    assert [key for key in tensors if key.startswith("history")] == [f"history.{i}" for i in range(len(asked.history))]
    for i, array in enumerate(asked.history):
        np.testing.assert_array_equal(tensors[f"history.{i}"], array)
    if asked.positive is not None:
        np.testing.assert_array_equal(
            tensors["positive.encoder_hidden_states"], asked.positive["encoder_hidden_states"]
        )
    if asked.mask is not None:
        np.testing.assert_array_equal(tensors["mask"], asked.mask)


@pytest.mark.parametrize("name", BY_NAME)
def test_ours_reads_and_writes_the_vectors(name: str) -> None:
    data = base64.b64decode(BY_NAME[name]["base64"])
    trajectory = unpack(data)
    assert pack(trajectory, trajectories()[name][1]) == data
    assert trajectory.origin == trajectories()[name][0].origin


def same(ours: Trajectory, theirs: Trajectory) -> None:
    """Bit for bit: packed alike, in float32."""
    assert pack(ours) == pack(theirs)


@pytest.mark.parametrize("name", BY_NAME)
def test_schema_2_is_still_read(name: str) -> None:
    """The bytes are those that the version before wrote; its names of conditions become those of the denoiser."""
    (old,) = (entry for entry in json.loads(OLD_FILE.read_text(encoding="utf-8"))["vectors"] if entry["name"] == name)
    data, ours = base64.b64decode(old["base64"]), unpack(base64.b64decode(BY_NAME[name]["base64"]))
    assert b'"schema":"2"' in data and (b".embeddings" in data or ours.positive is None)
    theirs = unpack(data)
    # schema 2 let any shared part of any kind have a digest
    same(ours, replace(theirs, origin=ours.origin))
    assert theirs.origin is None or theirs.origin.digests.items() >= ours.origin.digests.items()


RENAMED = {
    "a name of schema 3": ("positive.embeddings", "positive.encoder_hidden_states"),
    "a name of neither": ("positive.embeddings", "positive.embedded"),
    "a pooled text of two axes": ("positive.embeddings", "positive.pooled"),
}


@pytest.mark.parametrize("case", RENAMED)
def test_schema_2_holds_what_it_ever_held(case: str) -> None:
    vectors = json.loads(OLD_FILE.read_text(encoding="utf-8"))["vectors"]
    data = base64.b64decode(next(entry for entry in vectors if entry["name"] == "dpmpp-2m-torch")["base64"])
    (length,) = struct.unpack_from("<Q", data)
    header = data[8 : 8 + length].replace(*(name.encode() for name in RENAMED[case]))
    with pytest.raises(HandoffError, match="holds 'positive"):
        unpack(reseal(struct.pack("<Q", len(header)) + header + data[8 + length :]))


@pytest.mark.parametrize("entry", VECTORS["refused"], ids=lambda entry: entry["name"].replace(" ", "-"))
def test_both_readers_refuse_what_must_be_refused(entry: dict[str, str]) -> None:
    data = base64.b64decode(entry["base64"])
    with pytest.raises(HandoffError):
        unpack(data)
    with pytest.raises(ValueError):
        DECODE(data)


def philox(key: tuple[int, int], counter: list[int]) -> list[int]:
    """Philox4x64-10 by its definition (Salmon et al. 2011, section 4.3)."""
    mask, keys = (1 << 64) - 1, list(key)
    for _ in range(10):
        low, high = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [(high >> 64) ^ counter[1] ^ keys[0], high & mask, (low >> 64) ^ counter[3] ^ keys[1], low & mask]
        keys = [(keys[0] + 0x9E3779B97F4A7C15) & mask, (keys[1] + 0xBB67AE8584CAA73B) & mask]
    return counter


def pairs(radius: float, angle: float) -> tuple[float, float]:
    return radius * math.cos(angle), radius * math.sin(angle)


@pytest.mark.parametrize("name", BY_NAME)
def test_noise_follows_from_what_the_page_says(name: str) -> None:
    about, tensors = DECODE(base64.b64decode(BY_NAME[name]["base64"]))
    noise, draw = about["noise"], about["step"] + 1
    if noise["kind"] == "philox":
        words = philox((noise["seed"], noise["image"]), [1, 0, draw, 0])[:2]
        split = [((word >> 32) + 1, word & 0xFFFFFFFF) for word in words]
        values = [
            value
            for high, low in split
            for value in pairs((-2 * math.log(high / 2**32)) ** 0.5, 2 * math.pi * low / 2**32)
        ]
    else:
        twister = random.Random()
        twister.setstate((3, (*tensors["noise.key"].tolist(), noise["pos"]), None))
        uniform = [twister.getrandbits(32) % 2**24 / 2**24 for _ in range(16)]
        values = [(-2 * math.log(1 - uniform[i])) ** 0.5 * math.cos(2 * math.pi * uniform[i + 8]) for i in range(4)]
    np.testing.assert_allclose(values, BY_NAME[name]["next_noise"], rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", BY_NAME)
def test_the_next_call_is_that_of_diffusers(name: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch = pytest.importorskip("torch")
    about, tensors = DECODE(base64.b64decode(BY_NAME[name]["base64"]))
    config = dict(about["sampler"])
    scheduler = getattr(diffusers, config.pop("_class_name")).from_config(config)
    scheduler.set_timesteps(about["steps"])
    there = BY_NAME[name]["next_call"]
    assert float(scheduler.timesteps[about["step"]]) == pytest.approx(there["timestep"])
    if len(there["matrix"]) > 1 or "history.0" in tensors:
        return  # with history a scheduler of diffusers cannot begin in the middle
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(about["step"])
    time, (x, out, noise) = scheduler.timesteps[about["step"]], there["matrix"][0]
    latents = torch.from_numpy(tensors["latents"].astype(np.float32))
    output = torch.from_numpy(pattern((4, 8, 8), 31))
    np.testing.assert_allclose(scheduler.scale_model_input(latents, time), latents * there["input_scale"], rtol=1e-6)
    after = scheduler.step(output, time, latents, generator=torch.Generator().manual_seed(1)).prev_sample
    fresh = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    np.testing.assert_allclose(after, x * latents + out * output + noise * fresh, rtol=1e-5, atol=1e-5)


def full_size(dtype: str) -> tuple[Trajectory, bytes]:
    """Half of a picture of 512 x 512 with the widths of Stable Diffusion 1."""
    draw = np.random.default_rng(0)
    text = told(draw.normal(size=(77, 768)).astype(np.float32))
    latents = draw.normal(size=(2, 4, 64, 64)).astype(np.float32)
    trajectory = Trajectory(
        latents=latents[0],
        history=(latents[1],),
        step=10,
        steps=25,
        sampler=make_sampler({"beta_schedule": "scaled_linear"}, "dpmpp-2m"),
        noise=Philox(1),
        size=(512, 512),
        guidance=7.5,
        positive=text,
        negative=text,
    )
    return trajectory, pack(trajectory, dtype)


def test_half_precision_halves_and_rounds_once() -> None:
    trajectory, data = full_size("float16")
    _, tensors = DECODE(data)
    for name in ("latents", "history.0"):
        assert tensors[name].nbytes == 32 << 10 <= 33 << 10
    assert len(data) < 0.51 * len(full_size("float32")[1])
    arrived = unpack(data)
    assert arrived.latents.dtype == np.float32
    np.testing.assert_array_equal(arrived.latents, trajectory.latents.astype(np.float16).astype(np.float32))
    np.testing.assert_array_equal(arrived.negative["encoder_hidden_states"], tensors["negative.encoder_hidden_states"])
    assert np.abs(arrived.latents - trajectory.latents).max() <= 2.0**-11 * np.abs(trajectory.latents).max()
    assert pack(unpack(pack(arrived)), "float16") == data  # what was rounded is not rounded again


def test_half_precision_refuses_what_it_cannot_hold() -> None:
    trajectory, _ = full_size("float32")
    large = replace(trajectory, latents=trajectory.latents * np.float32(1e5))
    assert unpack(pack(large)).latents.max() > 65504
    with pytest.raises(HandoffError, match=r"latents reaches .* pack float32"):
        pack(large, "float16")
    with pytest.raises(ConfigError, match="did you mean 'float16'"):
        pack(trajectory, "float15")


def test_sizes_in_pixels_stay_exact_in_half_precision() -> None:
    trajectory = start(ToyModel("sdxl"), Request("x", size=(1536, 64), steps=2))[0]
    ids = np.array([2049, 1536, 0, 0, 64, 1], np.float32)
    changed = Conditioning({**trajectory.positive, "time_ids": ids})
    arrived = unpack(pack(replace(trajectory, positive=changed), "float16"))
    np.testing.assert_array_equal(arrived.positive["time_ids"], ids)


def test_embeddings_stay_at_home_where_asked() -> None:
    model = ToyModel("sdxl")
    trajectory = start(model, Request("a frog", negative="blurry", steps=3))[0]
    small = unpack(pack(trajectory, embeddings=False))
    assert small.positive is None and small.negative is None
    assert (small.prompt, small.negative_prompt) == ("a frog", "blurry")
    assert pack(trajectory, embeddings=False) == pack(trajectory.without_conditioning())
    assert trajectory.positive is not None


def condition(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


ODD: dict[str, tuple[dict[str, np.ndarray], str]] = {
    "none of its kind": (
        {"image_embeds": condition(4)},
        r"conditioning is \['encoder_hidden_states', 'image_embeds'\]",
    ),
    "narrower": ({"encoder_hidden_states": condition(77, 7)}, r"encoder_hidden_states is \(77, 7\), .* \('any', 8\)"),
    "of another rank": ({"encoder_hidden_states": condition(8)}, r"encoder_hidden_states is \(8,\)"),
}


@pytest.mark.parametrize("case", ODD)
def test_a_condition_that_the_kind_does_not_take_is_refused(case: str) -> None:
    more, text = ODD[case]
    trajectory = start(ToyModel(), Request("a frog", steps=3))[0]
    told_more = replace(trajectory, positive=Conditioning({**trajectory.positive, **more}))
    with pytest.raises(HandoffError, match=text):
        unpack(pack(told_more))
    assert unpack(pack(replace(told_more, origin=None))).positive is not None  # shapes are all that is known then


@pytest.mark.parametrize(
    "arrays",
    [
        {"Capital": condition(4)},
        {"a.b": condition(4)},
        {"scalar": condition()},
        {"deep": condition(1, 1, 1, 1)},
        {f"n{i}": condition(1) for i in range(17)},
    ],
    ids=["capital", "dotted", "scalar", "rank-4", "seventeen"],
)
def test_what_no_reader_would_take_is_not_packed(arrays: dict[str, np.ndarray]) -> None:
    trajectory = replace(start(ToyModel(), Request("a frog", steps=3))[0], positive=Conditioning(arrays), origin=None)
    with pytest.raises(HandoffError, match="it holds"):
        pack(trajectory)


def test_latents_of_one_or_three_axes_of_space_travel() -> None:
    latents = (pattern((4, 9), 3), pattern((2, 3, 4, 5), 3))
    whole = replace(start(ToyModel(), Request("a frog", steps=3))[0], origin=None)
    for each in latents:
        np.testing.assert_array_equal(unpack(pack(replace(whole, latents=each))).latents, each)
    with pytest.raises(HandoffError, match="'latents' with 1 axes"):
        pack(replace(whole, latents=pattern((9,), 3)))


def test_the_origin_is_the_model_that_began() -> None:
    model = ToyModel("sdxl")
    origin = unpack(pack(start(model, Request("x", steps=3))[0])).origin
    assert origin.family == model.family
    assert origin.digests == {part: digest for part, digest in model.digests.items() if part != "unet"}
    model.digest = ""  # weights that change
    assert unpack(pack(start(model, Request("x", steps=3))[0])).origin == Origin(model.family)


DATA = pack(denoise(start(ToyModel(), Request("a frog", sampler="dpmpp-2m", steps=6)), denoiser_of(ToyModel()), 3)[0])
LENGTH = struct.unpack_from("<Q", DATA)[0]


def lying(change: Callable[[dict[str, Any], dict[str, Any]], Any], body: bytes | None = None) -> bytes:
    """DATA with a changed header under a checksum that is right."""
    table = json.loads(DATA[8 : 8 + LENGTH])
    about = json.loads(table["__metadata__"]["trajectory"])
    change(about, table)
    table["__metadata__"]["trajectory"] = json.dumps(about)
    header = json.dumps(table, separators=(",", ":")).encode()
    return reseal(struct.pack("<Q", len(header)) + header + (DATA[8 + LENGTH :] if body is None else body))


LIES: dict[str, Callable[[dict[str, Any], dict[str, Any]], Any]] = {
    "origin is a text": lambda about, table: about.update(origin="sd"),
    "origin without digests": lambda about, table: about["origin"].pop("digests"),
    "unknown key in the family": lambda about, table: about["origin"]["family"].update(more=1),
    "family without a name": lambda about, table: about["origin"]["family"].pop("name"),
    "absurd family": lambda about, table: about["origin"]["family"].update(latent_channels=10**9),
    "another family than the tensors": lambda about, table: about["origin"]["family"].update(text_width=768),
    "another size than the latents": lambda about, table: about.update(size=[128, 64]),
    "digest of a part that is not shared": lambda about, table: about["origin"]["digests"].update(unet="0" * 64),
    "digest in capitals": lambda about, table: about["origin"]["digests"].update(vae_decoder="A" * 64),
    "digest is a number": lambda about, table: about["origin"]["digests"].update(vae_decoder=1),
    "latents said to be whole numbers": lambda about, table: table["latents"].update(dtype="U32"),
    "a half of a tensor": lambda about, table: table["latents"].update(dtype="F16"),
    "key said to be floats": lambda about, table: table["noise.key"].update(dtype="F32"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_origin_or_dtype_is_refused(lie: str) -> None:
    assert unpack(lying(lambda about, table: None)).step == 3
    with pytest.raises(HandoffError) as caught:
        unpack(lying(LIES[lie]))
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


def test_one_file_holds_one_precision() -> None:
    _, tensors = DECODE(DATA)

    def halve_all_but_latents(about: dict[str, Any], table: dict[str, Any]) -> None:
        place = 0
        for name, entry in table.items():
            if name != "__metadata__":
                entry["dtype"] = {"F32": "F16", "U32": "U32"}[entry["dtype"]] if name != "latents" else "F32"
                size = {"F16": 2, "F32": 4, "U32": 4}[entry["dtype"]] * math.prod(entry["shape"])
                entry["data_offsets"] = [place, place + size]
                place += size

    kept = ("noise.key", "latents")
    body = b"".join((tensor if name in kept else tensor.astype("<f2")).tobytes() for name, tensor in tensors.items())
    with pytest.raises(HandoffError, match="is F16"):
        unpack(lying(halve_all_but_latents, body))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
PATHS = [
    *((key,) for key in ("step", "steps", "sampler", "size", "guidance", "prompt", "negative_prompt", "facts")),
    *(("noise",), ("origin",), ("noise", "pos"), ("noise", "spare"), ("origin", "family"), ("origin", "digests")),
    *(("sampler", key) for key in ("_class_name", "trained_betas", "num_train_timesteps", "beta_start")),
    *(("origin", "family", key) for key in ("name", "vae_factor", "size_step", "scaling_factor", "pooled_width")),
]
ENTRIES = [(name, key) for name in ("latents", "noise.key", "history.0") for key in ("dtype", "shape", "data_offsets")]


@pytest.mark.slow
@settings(max_examples=250, deadline=None)
@given(st.sampled_from(PATHS), JSON_VALUES)
def test_any_value_in_the_header_is_taken_or_refused(path: tuple[str, ...], value: Any) -> None:
    def put(about: dict[str, Any], table: dict[str, Any]) -> None:
        for key in path[:-1]:
            about = about[key]
        about[path[-1]] = value

    assert_taken_or_refused(lying(put))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(st.sampled_from(ENTRIES), JSON_VALUES)
def test_any_value_in_the_table_of_tensors_is_taken_or_refused(entry: tuple[str, str], value: Any) -> None:
    assert_taken_or_refused(lying(lambda about, table: table[entry[0]].update({entry[1]: value})))


@pytest.mark.slow
def test_two_thousand_mutated_files_are_taken_or_refused() -> None:
    draw = random.Random(0)
    taken = 0
    for _ in range(2000):
        data = bytearray(DATA)
        for _ in range(draw.randint(1, 4)):
            data[draw.choice([draw.randrange(99, 8 + LENGTH), draw.randrange(99, len(data))])] = draw.randrange(256)
        if draw.random() < 0.2:
            del data[draw.randrange(8 + LENGTH, len(data)) :]
        taken += assert_taken_or_refused(reseal(bytes(data)))
    assert 0 < taken < 2000


def assert_taken_or_refused(data: bytes) -> bool:
    """Whether `unpack` took the bytes; what it takes has a next call or an end, and fits its own family."""
    try:
        trajectory = unpack(data)
    except HandoffError:
        return False
    if not trajectory.done:
        trajectory.sampler.coefficients(trajectory.step, trajectory.steps, len(trajectory.history))
    if isinstance(trajectory.origin, Origin):
        assert isinstance(trajectory.origin.family, Family)
        trajectory.require_fit(trajectory.origin.family)
    assert unpack(pack(trajectory)).prompt == trajectory.prompt
    return True


def test_facts_that_no_reader_takes_are_not_packed() -> None:
    begun = start(ToyModel(), Request("an apple", steps=2))[0]
    room = 16 * 1024 - len(json.dumps({"note": ""}))
    assert unpack(pack(replace(begun, facts={"note": "x" * room}))).facts == {"note": "x" * room}
    with pytest.raises(HandoffError, match="facts are not a table of at most 16384 bytes"):
        pack(replace(begun, facts={"note": "x" * (room + 1)}))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: {"latents": t.latents * np.float32("nan")}, "tensor latents holds NaN or infinity"),
        (lambda t: {"guidance": float("inf")}, "guidance is inf"),
        (lambda t: {"step": 9}, "step is 9"),
    ],
)
def test_what_unpack_refuses_is_not_packed(change: Callable[[Trajectory], dict[str, Any]], said: str) -> None:
    begun = start(ToyModel(), Request("an apple", steps=2))[0]
    with pytest.raises((HandoffError, ConfigError), match=said):
        pack(replace(begun, **change(begun)))


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp-2m", "pndm", "lcm"])
def test_a_schedule_that_travelled_goes_when_its_trajectory_does(sampler: str) -> None:
    """A client may send any number of schedules with betas of their own; none of them may stay."""
    begun = start(ToyModel(), Request("a", steps=4, sampler=sampler))[0]
    betas = tuple(np.linspace(1e-4, 0.02, begun.sampler.num_train_timesteps).tolist())
    own = make_sampler({**begun.sampler.to_config(), "trained_betas": betas})
    arrived = unpack(pack(replace(begun, sampler=own)))
    first = arrived.sampler.coefficients(0, 4)
    assert arrived.sampler.coefficients(0, 4) is first, "what was computed once is kept while it is used"
    assert first == own.coefficients(0, 4) == make_sampler(own.to_config()).coefficients(0, 4)
    kept = weakref.ref(arrived.sampler)
    del arrived
    gc.collect()
    assert kept() is None
