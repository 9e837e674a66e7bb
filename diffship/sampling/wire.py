"""A Trajectory as bytes, the only wire there is: a safetensors body under a checksummed JSON header.

The whole is a valid safetensors file. Its `__metadata__` holds `sha256`, of all bytes with those 64 digits read as
zeros, `schema` and `trajectory` (JSON). Every claim is checked against the bytes at hand before an array is made.
docs/wire-format.md describes it for readers in other languages, with test vectors.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import ConfigError, DiffshipError, HandoffError
from diffship.core.family import Family
from diffship.core.limits import LIMITS, check_range
from diffship.core.reading import PLAIN, Reading
from diffship.core.registry import kinds
from diffship.core.strict import unknown
from diffship.sampling.control import Controlled
from diffship.sampling.matrix import MAX_HISTORY
from diffship.sampling.rng import Noise, Philox, TorchGenerator, TorchNoise
from diffship.sampling.samplers import make_sampler
from diffship.sampling.tokenizer import check_prompt
from diffship.sampling.trajectory import Conditioning, Origin, Trajectory, as_numpy

SCHEMA = "3"
READ = ("2", SCHEMA)
DTYPES = ("float32", "float16")
_FRONT = b'{"__metadata__":{"sha256":"'
_DIGITS = slice(8 + len(_FRONT), 8 + len(_FRONT) + 64)
_HEADER_BYTES = 256 << 10
_FACTS_BYTES = 16 << 10
_KEYS = {"step", "steps", "sampler", "size", "guidance", "prompt", "negative_prompt", "facts", "noise", "origin"}
_CONTROLS = "controls"
_LATER = {"reading", _CONTROLS}  # there only if prompts are read in another way, and if a ControlNet acts
_DTYPES: dict[str, np.dtype[Any]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "U32": np.dtype("<u4")}
_CODES = {dtype.newbyteorder("="): code for code, dtype in _DTYPES.items()}
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_SIDES = ("positive", "negative")
_KEY = "noise.key"
_LATENTS = (
    "latents",
    "mask",
    "masked_latents",
    "init_latents",
    "init_noise",
    *(f"history.{i}" for i in range(MAX_HISTORY)),
)
_CONDITION = re.compile(rf"({'|'.join(_SIDES)})\.([a-z][a-z0-9_]{{0,63}})\Z")
_CONTROL = re.compile(r"control\.[0-9]\Z")
_MOST_CONDITIONS = 16  # on both sides together
_RANKS = (2, 4)  # of latents; those of a video have four axes
_CONDITION_RANKS = (1, 3)
# what schema 2 called a condition -> its name, and its rank there
_SCHEMA_2 = {"embeddings": ("encoder_hidden_states", 2), "pooled": ("text_embeds", 1), "time_ids": ("time_ids", 1)}


def pack(trajectory: Trajectory, dtype: str = "float32", embeddings: bool = True) -> bytes:
    """The bytes of a trajectory; in float32 and with embeddings `unpack` gives it back bit for bit.

    `float16` halves latents, history, mask and embeddings and rounds them: the picture is then close, not equal.
    Without `embeddings` only the prompts travel, and the receiver encodes them.

    Raises:
        HandoffError: it or its facts are larger than the limit, it holds NaN or infinity, values that float16 cannot
            hold, or conditions of names or ranks that do not travel.
        ConfigError: another dtype, or a step or guidance that `unpack` would refuse.
    """
    if dtype not in DTYPES:
        raise ConfigError(unknown("dtype", dtype, DTYPES))
    noise, tensors = _noise_out(trajectory.noise)
    tensors |= _tensors(trajectory if embeddings else trajectory.without_conditioning())
    _require_legal({name: array.shape for name, array in tensors.items()})
    _require_finite(tensors)
    check_range("step", trajectory.step, 0, trajectory.sampler.calls(trajectory.steps))
    check_range("guidance", trajectory.guidance, *LIMITS.guidance)
    if dtype == "float16":
        whole = _whole()
        tensors = {name: array if name in whole else _halved(name, array) for name, array in tensors.items()}
    about: dict[str, Any] = {
        "step": trajectory.step,
        "steps": trajectory.steps,
        "sampler": trajectory.sampler.to_config(),
        "size": list(trajectory.size),
        "guidance": trajectory.guidance,
        "prompt": trajectory.prompt,
        "negative_prompt": trajectory.negative_prompt,
        "facts": _facts(trajectory.facts),
        "noise": noise,
        "origin": _origin_out(trajectory.origin),
        **({"reading": trajectory.reading.to_json()} if trajectory.reading != PLAIN else {}),
    }
    if trajectory.controls:
        about[_CONTROLS] = [_control_out(control) for control in trajectory.controls]
    return _seal(about, tensors)


def unpack(data: bytes) -> Trajectory:
    """The trajectory of `pack`.

    Raises:
        HandoffError: the bytes are damaged, too large, of another schema, contradict themselves, or say what no
            sampler does.
    """
    try:
        trajectory = _build(*_open(data))
        if trajectory.origin is not None:
            trajectory.require_fit(trajectory.origin.family)
        return trajectory
    except HandoffError:
        raise
    except DiffshipError as fault:
        raise HandoffError(f"trajectory: {fault}") from None
    except (KeyError, ValueError, TypeError, AttributeError, OverflowError, RecursionError) as fault:
        raise HandoffError(f"trajectory: malformed ({type(fault).__name__}: {str(fault)[:80]})") from None


def _seal(about: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> bytes:
    metadata = {"sha256": "0" * 64, "schema": SCHEMA, "trajectory": json.dumps(about, allow_nan=False)}
    table: dict[str, Any] = {"__metadata__": metadata}
    place = 0
    for name, array in tensors.items():
        code = _CODES[array.dtype]
        table[name] = {"dtype": code, "shape": list(array.shape), "data_offsets": [place, place + array.nbytes]}
        place += array.nbytes
    header = json.dumps(table, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    if len(header) > _HEADER_BYTES or 8 + len(header) + place > LIMITS.trajectory_bytes:
        raise HandoffError(
            f"the trajectory takes {len(header) + place} bytes; at most {LIMITS.trajectory_bytes} travel"
        )
    blob = bytearray(struct.pack("<Q", len(header)) + header)
    for array in tensors.values():
        blob += array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
    blob[_DIGITS] = hashlib.sha256(blob).hexdigest().encode()
    return bytes(blob)


def _open(data: bytes) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    if len(data) > LIMITS.trajectory_bytes:
        _refuse(f"it has {len(data)} bytes; at most {LIMITS.trajectory_bytes} are read")
    if len(data) < _DIGITS.stop or data[8 : 8 + len(_FRONT)] != _FRONT:
        _refuse(f"these {len(data)} bytes are not one")
    (length,) = struct.unpack_from("<Q", data)
    if length > min(_HEADER_BYTES, len(data) - 8):
        _refuse(f"its header claims {length} bytes; {len(data) - 8} are here, the limit is {_HEADER_BYTES}")
    zeroed = hashlib.sha256(data[: _DIGITS.start] + b"0" * 64)
    zeroed.update(memoryview(data)[_DIGITS.stop :])
    if zeroed.hexdigest().encode() != data[_DIGITS]:
        _refuse("it is damaged: the checksum does not match. Send it again")
    table = _json(data[8 : 8 + length].decode("utf-8"))
    metadata = table.pop("__metadata__")
    schema = metadata.get("schema")
    if schema not in READ:
        _refuse(f"its schema is {str(schema)[:20]!r}; this version reads {' and '.join(map(repr, READ))}")
    about = _json(metadata["trajectory"])
    if not isinstance(about, dict) or set(about) - _LATER != _KEYS:
        _refuse("its header does not have the keys of a trajectory")
    table = _from_schema_2(table) if schema == "2" else table
    return about, _arrays(table, memoryview(data)[8 + length :])


def _from_schema_2(table: Mapping[str, Any]) -> dict[str, Any]:
    """The table of tensors with the conditions called as the denoiser calls them; they had fixed names and ranks."""
    renamed: dict[str, Any] = {}
    for name, claim in table.items():
        side, _, field = name.partition(".")
        given = field if side in _SIDES else ""
        to, rank = _SCHEMA_2.get(given, (given, 1 if name == _KEY else 3))
        if given not in ("", *_SCHEMA_2) or len(claim["shape"]) != rank:
            _refuse(f"it holds {name[:40]!a} with {len(claim['shape'])} axes")
        renamed[f"{side}.{to}" if given else name] = claim
    return renamed


def _arrays(table: Mapping[str, Any], body: memoryview) -> dict[str, NDArray[Any]]:
    arrays, place, whole = {}, 0, _whole()
    _require_legal({name: claim["shape"] for name, claim in table.items()})
    for name, claim in table.items():
        shape, (begin, end) = claim["shape"], claim["data_offsets"]
        if claim["dtype"] not in _DTYPES:
            _refuse(f"tensor {name} has the dtype {str(claim['dtype'])[:10]!a}")
        if claim["dtype"] not in _legal_codes(name, table, whole):
            _refuse(f"tensor {name} is {claim['dtype']}")
        for side in shape:
            check_range(f"axis of {name}", side, 1, 1 << 20)
        dtype = _DTYPES[claim["dtype"]]
        if begin != place or end - begin != dtype.itemsize * math.prod(shape) or end > len(body):
            _refuse(f"tensor {name} claims bytes {begin}..{end} of {len(body)} for shape {shape}")
        flat = np.frombuffer(body[begin:end], dtype)
        arrays[name] = flat.astype(np.uint32 if dtype.kind == "u" else np.float32).reshape(shape)
        place = end
    if place != len(body):
        _refuse(f"{len(body) - place} bytes are left over behind its tensors")
    return arrays


def _require_legal(shapes: Mapping[str, Sequence[int]]) -> None:
    """Raises HandoffError for a tensor that no trajectory has, or one of another rank than it has there."""
    if sum(_CONDITION.match(name) is not None for name in shapes) > _MOST_CONDITIONS:
        _refuse(f"it holds more than {_MOST_CONDITIONS} conditions")
    for name, shape in shapes.items():
        if not _legal_rank(name, len(shape), len(shapes["latents"])):
            _refuse(f"it holds {name[:40]!a} with {len(shape)} axes")


def _legal_rank(name: str, rank: int, latents: int) -> bool:
    """Whether a tensor of this name may be there and have so many axes; `latents` is how many those have."""
    if name == _KEY:
        return rank == 1
    if _CONTROL.match(name):
        return rank == 3
    if name in _LATENTS:
        return _RANKS[0] <= rank <= _RANKS[1] and rank == latents
    return _CONDITION.match(name) is not None and _CONDITION_RANKS[0] <= rank <= _CONDITION_RANKS[1]


def _whole() -> set[str]:
    """Tensors that 16 bits do not hold: sizes in pixels and the like, and a generator's state."""
    return {_KEY, *(f"{side}.{name}" for side in _SIDES for kind in kinds().values() for name in kind.exact_conditions)}


def _legal_codes(name: str, table: Mapping[str, Any], whole: Collection[str]) -> tuple[str, ...]:
    """What a tensor may be stored in; all that may be halved have the dtype of the latents."""
    if name in whole:
        return ("U32",) if name == _KEY else ("F32",)
    code = table["latents"]["dtype"]
    return (code,) if code in ("F32", "F16") else ()


def _build(about: Mapping[str, Any], tensors: dict[str, NDArray[Any]]) -> Trajectory:
    sampler = make_sampler(about["sampler"])
    steps, latents = check_range("steps", about["steps"], *LIMITS.steps), tensors["latents"]
    step = check_range("step", about["step"], 0, sampler.calls(steps))
    history = tuple(tensors[f"history.{i}"] for i in range(sum(name.startswith("history.") for name in tensors)))
    if step < sampler.calls(steps):
        sampler.coefficients(step, steps, len(history))
    sides = [check_range("side", side, *LIMITS.size_px) for side in about["size"]]
    if len(sides) != 2 or any(array.shape != latents.shape for array in history):
        _refuse("its size or history does not fit its latents")
    _require_finite(tensors)
    return Trajectory(
        latents=latents,
        step=step,
        steps=steps,
        sampler=sampler,
        noise=_noise_in(about["noise"], tensors.get(_KEY)),
        size=(sides[0], sides[1]),
        guidance=float(check_range("guidance", about["guidance"], *LIMITS.guidance)),
        positive=_condition("positive", tensors),
        negative=_condition("negative", tensors),
        history=history,
        mask=tensors.get("mask"),
        masked_latents=tensors.get("masked_latents"),
        init_latents=tensors.get("init_latents"),
        init_noise=tensors.get("init_noise"),
        controls=_controls_in(about.get(_CONTROLS, []), tensors, sampler.calls(steps)),
        prompt=check_prompt(about["prompt"]),
        negative_prompt=None if about["negative_prompt"] is None else check_prompt(about["negative_prompt"]),
        facts=_facts(about["facts"]),
        origin=_origin_in(about["origin"]),
        reading=Reading.from_json(about.get("reading", {})),
    )


def _require_finite(tensors: Mapping[str, NDArray[Any]]) -> None:
    for name, array in tensors.items():
        if array.dtype == np.float32 and not np.isfinite(array).all():
            _refuse(f"tensor {name} holds NaN or infinity")


def _tensors(trajectory: Trajectory) -> dict[str, NDArray[Any]]:
    named = {
        "latents": trajectory.latents,
        **{f"history.{i}": array for i, array in enumerate(trajectory.history)},
        "mask": trajectory.mask,
        "masked_latents": trajectory.masked_latents,
        "init_latents": trajectory.init_latents,
        "init_noise": trajectory.init_noise,
    }
    named |= {f"control.{i}": control.image for i, control in enumerate(trajectory.controls)}
    for side, condition in (("positive", trajectory.positive), ("negative", trajectory.negative)):
        named |= {f"{side}.{name}": array for name, array in (condition or {}).items()}
    return {name: as_numpy(array) for name, array in named.items() if array is not None}


def _halved(name: str, array: NDArray[Any]) -> NDArray[np.float16]:
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    if not np.isfinite(half).all():
        raise HandoffError(f"tensor {name} reaches {np.abs(array).max():g}, which float16 cannot hold: pack float32")
    return half


def _condition(side: str, tensors: Mapping[str, NDArray[Any]]) -> Conditioning | None:
    matches = {name: _CONDITION.match(name) for name in tensors}
    found = {match[2]: tensors[name] for name, match in matches.items() if match is not None and match[1] == side}
    return Conditioning(found) if found else None


def _control_out(control: Controlled) -> dict[str, Any]:
    keys = ("name", "scale", "first", "stop", "guess")
    return {key: getattr(control, key) for key in keys}


def _controls_in(entries: object, tensors: Mapping[str, NDArray[Any]], calls: int) -> tuple[Controlled, ...]:
    pictures = sorted(name for name in tensors if _CONTROL.match(name))
    if not isinstance(entries, list) or pictures != [f"control.{i}" for i in range(len(entries))]:
        _refuse("its controls are not a list with a picture each")
    if len(entries) > LIMITS.controls:
        _refuse(f"it has {len(entries)} controls; at most {LIMITS.controls} act at once")
    return tuple(_control_in(entry, tensors[name], calls) for entry, name in zip(entries, pictures, strict=True))


def _control_in(entry: Any, image: NDArray[Any], calls: int) -> Controlled:
    if not isinstance(entry, dict) or set(entry) != {"name", "scale", "first", "stop", "guess"}:
        _refuse("a control does not have the keys of one")
    if not (isinstance(entry["name"], str) and 0 < len(entry["name"]) <= 32 and isinstance(entry["guess"], bool)):
        _refuse("a control has no name of at most 32 characters, or its guess is neither true nor false")
    scale = float(check_range("control scale", entry["scale"], *LIMITS.control_scale))
    first, stop = (check_range(f"control {key}", entry[key], 0, calls) for key in ("first", "stop"))
    return Controlled(entry["name"], image, scale, first, stop, entry["guess"])


def _noise_out(noise: Noise) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    if isinstance(noise, TorchNoise):
        return {"kind": "torch", "pos": noise.pos, "spare": noise.spare}, {_KEY: noise.key}
    if isinstance(noise, Philox):
        return {"kind": "philox", "seed": noise.seed, "image": noise.image}, {}
    raise ConfigError(f"noise of type {type(noise).__name__} does not travel; use torch or philox")


def _noise_in(about: Mapping[str, Any], key: NDArray[Any] | None) -> Noise:
    if about["kind"] == "torch" and key is not None:
        return TorchNoise(*TorchGenerator.from_state(key, about["pos"], about["spare"]).state())
    if about["kind"] == "philox" and key is None:
        return Philox(about["seed"], about["image"])
    _refuse("its noise is of no known kind")


def _origin_out(origin: Origin | None) -> dict[str, Any] | None:
    if origin is None:
        return None
    return {"family": origin.family.to_json(), "digests": dict(sorted(origin.digests.items()))}


def _origin_in(about: object) -> Origin | None:
    if about is None:
        return None
    if not isinstance(about, dict) or set(about) != {"family", "digests"} or not isinstance(about["digests"], dict):
        _refuse("its origin is not a table of family and digests")
    shared = {part for kind in kinds().values() for part in kind.shared_parts}
    for part, digest in about["digests"].items():
        if part not in shared or not isinstance(digest, str) or not _HEX.match(digest):
            _refuse(f"its origin has a digest of {part[:40]!a} that is not 64 hex digits of a part that is shared")
    return Origin(Family.from_json(about["family"]), about["digests"])


def _facts(facts: object) -> dict[str, Any]:
    if not isinstance(facts, dict) or len(json.dumps(facts)) > _FACTS_BYTES:
        _refuse(f"its facts are not a table of at most {_FACTS_BYTES} bytes")
    return facts


def _json(text: str) -> Any:
    return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant, parse_float=_number)


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _constant(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        _refuse("a key stands twice in its header")
    return table


def _constant(text: str) -> NoReturn:
    _refuse(f"its header holds {text}")


def _refuse(reason: str) -> NoReturn:
    raise HandoffError(f"trajectory: {reason}")
