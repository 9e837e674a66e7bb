"""One LoRA file: its tensors paired by layer, checked against the model, and added when its weights are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffship.compression.lora_names import Names, Place, naming
from diffship.compression.lora_scale import read_notes
from diffship.core.dtype import TensorMeta
from diffship.core.errors import ConfigError, SourceError
from diffship.core.sniff import also
from diffship.core.weights import Derived, SafetensorsWeights, Weights, to_float32

Array = NDArray[np.generic]
_LISTED, _LISTED_CHARACTERS = 5, 300  # names that a message has


@dataclass(frozen=True)
class Delta:
    """A change of rank `rank` of one weight: `scale * up @ down`, read from `source` when it is applied."""

    source: Weights = field(repr=False, compare=False)
    down: str
    up: str
    scale: float

    @property
    def alive(self) -> bool:
        """Whether it can change anything: neither matrix is zero. The scale is not asked, which a user may set to 0."""
        return all(np.any(to_float32(self.source.read(name), self.source.meta(name).dtype)) for name in self._matrices)

    @property
    def _matrices(self) -> tuple[str, str]:
        return self.down, self.up

    def of(self, shape: Sequence[int]) -> NDArray[np.float32]:
        """The change, float32, in the weight's `shape`; convolutions are (out, in, kh, kw)."""
        down, up = (to_float32(self.source.read(name), self.source.meta(name).dtype) for name in self._matrices)
        product = up.reshape(len(up), -1) @ down.reshape(len(down), -1)
        return (product * np.float32(self.scale)).reshape(tuple(shape))


class LoraFile:
    """A file of low-rank changes of `model`, the weights of its parts.

    Raises:
        ConfigError: it is not there, or a folder.
        SourceError: not safetensors; no tensors, or some of no elements; keys that no layer of the model has, or that
            change one in another way (all are counted, the first ones named); peft's file without the config that says
            alpha.
    """

    def __init__(self, path: Path, names: Names, model: Mapping[str, Weights]) -> None:
        if not path.is_file():
            raise ConfigError(f"{path} is not a file; a LoRA is one .safetensors file{also(path)}")
        self.path, self._model = path, model
        self.weights = SafetensorsWeights(path)
        self._layers: dict[tuple[str, str], dict[str, str]] = {}
        self._require_values()
        places = {key: names.find(key) for key in self.weights.names()}
        unknown = [key for key, place in places.items() if place is None]
        places |= self._told_by_shape({key: names.parts_of(key) for key in unknown})
        unknown = [key for key in unknown if places[key] is None]
        strange = [key for key in unknown if not names.of_a_layer(key)]
        if strange:
            hint = f": {told}" if (told := naming(strange)) else ""
            raise SourceError(f"{path.name}: {_some('key', strange)} belong to no layer of this model{hint}")
        if unknown:
            raise SourceError(
                f"{path.name}: {_some('key', unknown)} change layers in another way than a LoRA does, whose tensors "
                "are down, up and alpha; LoHa, LoKr, DoRA, biases and norms cannot be fused"
            )
        for key, place in places.items():
            if place is not None:
                self._add(place, key)
        self._notes = read_notes(path, self.weights.names(), self.weights.metadata)

    def _require_values(self) -> None:
        empty = [name for name in self.weights.names() if not np.prod(self.weights.meta(name).shape)]
        if self.weights.names() and not empty:
            return
        found = f"{_some('tensor', empty)} of no elements" if empty else "no tensors"
        raise SourceError(
            f"{self.path.name} has {found}: its rank is 0, or its parameters lay on several GPUs when it was saved. "
            "Gather them (DeepSpeed: stage3_gather_16bit_weights_on_model_save) and save it again"
        )

    def _told_by_shape(self, owners: Mapping[str, Mapping[str, Place]]) -> dict[str, Place]:
        """Places of keys that several parts have and that name none: the one part whose shapes fit all of them, or the
        part that the file's folder is called by, as peft writes one folder for each."""
        shared = {key: found for key, found in owners.items() if len(found) > 1}
        if not shared:
            return {}
        parts = set.intersection(*(set(found) for found in shared.values()))
        fitting = [part for part in parts if all(self._reaches(key, found[part]) for key, found in shared.items())]
        named = [part for part in fitting if part == self.path.absolute().parent.name]
        if len(named or fitting) != 1:
            raise SourceError(
                f"{self.path.name}: {_some('key', list(shared))} name no part, and {' and '.join(sorted(parts))} have "
                "such layers: put the file into a folder that is called as the part is"
            )
        return {key: found[(named or fitting)[0]] for key, found in shared.items()}

    def _reaches(self, key: str, place: Place) -> bool:
        shape, weight = self.weights.meta(key).shape, self._model[place.part].meta(f"{place.layer}.weight").shape
        if place.role == "alpha":
            return True
        return shape[0] == weight[0] if place.role == "up" else shape[1:2] == weight[1:2]

    def _add(self, place: Place, key: str) -> None:
        roles = self._layers.setdefault((place.part, place.layer), {})
        if place.role in roles:
            raise SourceError(f"{self.path.name}: {roles[place.role]} and {key} are the same tensor of one layer")
        roles[place.role] = key

    @property
    def scaled_by(self) -> str:
        """Where the scale of the changes is from; a change without alpha has that of its rank."""
        if any("alpha" in roles for roles in self._layers.values()):
            return "its alphas"
        return " and ".join(sorted({note.where for note in self._notes.parts.values()})) or "nothing: alpha is the rank"

    def deltas(self, scale: float) -> dict[tuple[str, str], Delta]:
        """{(part, layer): Delta} of the whole file.

        Raises:
            SourceError: half of a pair is missing, a shape does not fit the layer, or all changes are zero.
        """
        self._require_used_notes()
        found, wrong = {}, []
        for (part, layer), roles in self._layers.items():
            problem = self._problem(roles, self._model[part].meta(f"{layer}.weight").shape)
            if problem:
                wrong.append(f"{part}.{layer} ({problem})")
                continue
            rank = self.weights.meta(roles["down"]).shape[0]
            factor = scale * self._factor(part, layer, roles, rank)
            found[part, layer] = Delta(self.weights, roles["down"], roles["up"], factor)
        if wrong:
            raise SourceError(
                f"{self.path.name}: {_some('layer', wrong)} do not fit this model: is it of another family?"
            )
        if not any(delta.alive for delta in found.values()):
            raise SourceError(f"{self.path.name} changes nothing: in every pair one matrix is zero. Was it trained?")
        return found

    def _require_used_notes(self) -> None:
        if any("alpha" in roles for roles in self._layers.values()):
            return
        for part, note in self._notes.parts.items():
            idle = note.idle(layer for owner, layer in self._layers if part in ("", owner))
            if idle:
                raise SourceError(
                    f"{note.where}: {_some('name', idle)} of alpha_pattern are of no layer of the file, so how "
                    "strongly it changes the model is not known; give the file that it was made of"
                )

    def _problem(self, roles: Mapping[str, str], shape: tuple[int, ...]) -> str:
        missing = [role for role in ("down", "up") if role not in roles]
        if missing:
            return f"no {missing[0]} matrix"
        down, up = (self.weights.meta(roles[role]).shape for role in ("down", "up"))
        if len(down) < 2 or len(up) < 2 or down[0] != up[1]:
            return f"ranks differ: down {down}, up {up}"
        fits = up[0] == shape[0] and np.prod(down[1:]) == np.prod(shape[1:]) and np.prod(up[2:], initial=1) == 1
        return "" if fits else f"weight {shape}, down {down}, up {up}"

    def _factor(self, part: str, layer: str, roles: Mapping[str, str], rank: int) -> float:
        if "alpha" in roles:
            return self._alpha(roles) / rank
        noted = self._notes.of(part)
        return 1.0 if noted is None else noted.of(layer, rank)

    def _alpha(self, roles: Mapping[str, str]) -> float:
        value = to_float32(self.weights.read(roles["alpha"]), self.weights.meta(roles["alpha"]).dtype)
        if value.size != 1 or not np.isfinite(value).all():
            raise SourceError(f"{self.path.name}: {roles['alpha']} is not one number")
        return float(value.reshape(()))


def _some(what: str, names: Sequence[str]) -> str:
    """How many, and the first ones, as far as a sentence has room for them; a long one is cut in its middle."""
    told = [_short(name) for name in names[:_LISTED]]
    while len(told) > 1 and sum(map(len, told)) > _LISTED_CHARACTERS:
        told.pop()
    more = f" and {len(names) - len(told)} more" if len(names) > len(told) else ""
    return f"{len(names)} {what}s ({', '.join(told)}{more})"


def _short(name: str) -> str:
    half = _LISTED_CHARACTERS // 2
    return name if len(name) <= _LISTED_CHARACTERS else f"{name[: half - 3]}...{name[-half:]}"


class _Fused(Derived):
    def __init__(self, weights: Weights, changes: Mapping[str, Sequence[Delta]]) -> None:
        super().__init__(weights)
        self._changes = changes

    def meta(self, name: str) -> TensorMeta:
        meta = self._weights.meta(name)
        return TensorMeta("float32", meta.shape) if name in self._changes else meta

    def read(self, name: str) -> Array:
        array = self._weights.read(name)
        changes = self._changes.get(name)
        if changes is None:
            return array
        total = to_float32(array, self._weights.meta(name).dtype).copy()
        for change in changes:
            total += change.of(total.shape)
        if not np.isfinite(total).all():
            raise ConfigError(f"tensor {name} has NaN or infinite values after fusing; is a LoRA file damaged?")
        return total


def with_deltas(weights: Weights, changes: Mapping[str, Sequence[Delta]]) -> Weights:
    """`weights` plus all changes of each tensor, added in float32 when it is read; changed tensors stay float32.

    Rounding to half precision is for whoever writes them: small changes would be lost on the way.
    """
    return _Fused(weights, changes)
