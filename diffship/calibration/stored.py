"""A calibration on the disk: a folder with calibration.json and one safetensors file for each part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.calibration.observed import BANDS, BINS, LEAST_EDGE, ROWS, Observed
from diffship.core.atomic import write_file
from diffship.core.brief import brief
from diffship.core.document import read_bytes, read_json
from diffship.core.dtype import meta_of
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.lazy import lazy
from diffship.core.limits import LIMITS
from diffship.core.safetensors_file import write_safetensors
from diffship.core.strict import bounded, bounds, load, plain
from diffship.core.weights import SafetensorsWeights

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
else:
    np = lazy("numpy")

NAME = "calibration.json"
SCHEMA = 1
_LARGEST_EDGE = 128  # of float32


@dataclass(frozen=True)
@bounded
class Drawn:
    """What was drawn: prompt i from the noise of seed + i; size: side of a picture in pixels; sampler: its name."""

    prompts: tuple[str, ...]
    steps: int = field(metadata=bounds(*LIMITS.steps))
    guidance: float
    size: int
    seed: int
    sampler: str


@dataclass(frozen=True, eq=False)
class PartRanges:
    """Inputs of the layers of a part, by path. digest: sha256 (hex) over the part's source tensors."""

    digest: str
    layers: Mapping[str, Observed]


@brief
@dataclass(frozen=True, eq=False)
class Calibration:
    """What went into layers while pictures were drawn. source: the model's name."""

    source: str
    drawn: Drawn
    parts: Mapping[str, PartRanges]

    def of(self, part: str, digest: str) -> Mapping[str, Observed]:
        """The layers of `part`, whose source tensors have `digest`.

        Raises:
            ConfigError: it was not calibrated, or is of another model.
        """
        if part not in self.parts:
            known = ", ".join(self.parts)
            raise ConfigError(f"the calibration has no ranges of {part}; it has {known}. Add it to calibrate --parts")
        if self.parts[part].digest != digest:
            raise ConfigError(f"the calibration is of another {part} (of {self.source}). Run: diffship calibrate")
        return self.parts[part].layers


@dataclass(frozen=True)
@bounded
class _PartEntry:
    """A part in calibration.json. edges: of the histogram of each layer, in the order of the file's tensors."""

    digest: str
    sha256: str
    edges: dict[str, int] = field(metadata=bounds(LEAST_EDGE, _LARGEST_EDGE))


@dataclass(frozen=True)
class _Document:
    schema: int
    source: str
    drawn: Drawn
    parts: dict[str, _PartEntry]


def write_calibration(calibration: Calibration, folder: str | Path) -> None:
    """Write `calibration` into `folder`, which is made; calibration.json comes last."""
    home = Path(folder)
    home.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, part in calibration.parts.items():
        file = home / f"{name}.safetensors"
        tensors = _tensors(part)
        write_safetensors(file, {key: meta_of(array) for key, array in tensors.items()}, tensors.__getitem__)
        entries[name] = _PartEntry(part.digest, _sha256(file), {key: one.edge for key, one in part.layers.items()})
    document = _Document(SCHEMA, calibration.source, calibration.drawn, entries)
    write_file(home / NAME, json.dumps(plain(document), indent=1, ensure_ascii=False) + "\n")


def read_calibration(folder: str | Path) -> Calibration:
    """The calibration in `folder`.

    Raises:
        ConfigError: there is none, it is of a newer version, or a file is damaged or not what calibration.json says.
    """
    home = Path(folder)
    table = read_json(home / NAME, LIMITS.manifest_bytes)
    if table.get("schema") != SCHEMA:
        raise ConfigError(f"{home / NAME}: schema {str(table.get('schema'))[:40]!a} is not {SCHEMA}, which this reads")
    document = load(_Document, table, str(home / NAME))
    parts = {name: _part(home / f"{name}.safetensors", entry) for name, entry in document.parts.items()}
    return Calibration(document.source, document.drawn, parts)


def calibration_digest(folder: str | Path) -> str:
    """sha256 (hex) of calibration.json, which has the hash of every other file.

    Raises:
        ConfigError: there is none.
    """
    return hashlib.sha256(read_bytes(Path(folder) / NAME, LIMITS.manifest_bytes)).hexdigest()


def _tensors(part: PartRanges) -> dict[str, NDArray[np.generic]]:
    found: dict[str, NDArray[np.generic]] = {}
    for name, one in part.layers.items():
        for kind in _SHAPES:
            found[f"{name}.{kind}"] = getattr(one, kind)
    return found


_SHAPES = ("low", "high", "peaks", "count", "counts", "channels", "rows", "keys")


def _part(file: Path, entry: _PartEntry) -> PartRanges:
    try:
        if _sha256(file) != entry.sha256:
            raise ConfigError(f"{file} is damaged: its hash is not that in {NAME}. Run diffship calibrate again")
        weights = SafetensorsWeights(file)
        known = set(weights.names())
        wanted = {f"{name}.{kind}" for name in entry.edges for kind in _SHAPES}
        if known != wanted:
            raise ConfigError(f"{file}: {sorted(known ^ wanted)[0][:80]!a} is missing, or not in {NAME}")
        layers = {name: _observed(weights, name, edge) for name, edge in entry.edges.items()}
    except OSError as fault:
        raise ConfigError(f"{file} cannot be read: {fault.strerror}") from None
    except DiffshipError as fault:
        raise ConfigError(str(fault)) from None
    return PartRanges(entry.digest, layers)


def _observed(weights: SafetensorsWeights, name: str, edge: int) -> Observed:
    """One layer, with shapes and values that everything else relies on."""
    arrays: dict[str, Any] = {kind: np.asarray(weights.read(f"{name}.{kind}")) for kind in _SHAPES}
    calls, channels, rows = (arrays[kind].shape[:1] for kind in ("low", "channels", "keys"))
    shapes = {**dict.fromkeys(("low", "high", "peaks", "count"), calls), "channels": channels, "keys": rows}
    shapes |= {"counts": (min(calls[0], BANDS), BINS), "rows": (*rows, *channels)}
    types = {"peaks": "float64", "count": "int64", "counts": "int64", "keys": "float64"}
    for kind, array in arrays.items():
        if array.shape != shapes[kind] or array.dtype != types.get(kind, "float32") or not np.isfinite(array).all():
            raise ConfigError(f"{name}: {kind} is not what a calibration holds. Run diffship calibrate again")
    if not (arrays["count"] > 0).all() or rows[0] > ROWS or not (arrays["low"] <= arrays["high"]).all():
        raise ConfigError(f"{name}: not every step was seen. Run diffship calibrate again")
    return Observed(edge=edge, **arrays)


def _sha256(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def with_prompts(calibration: Calibration, prompts: tuple[str, ...]) -> Calibration:
    """The same ranges, said to be of `prompts`."""
    return replace(calibration, drawn=replace(calibration.drawn, prompts=prompts))
