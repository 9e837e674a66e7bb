"""diffship.json: what a bundle holds, read strictly and bounded before anything it names is touched."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NoReturn

from diffship.core.brief import brief
from diffship.core.compare import Tolerance
from diffship.core.errors import BundleError, ConfigError
from diffship.core.family import Family
from diffship.core.limits import LIMITS
from diffship.core.precision import Precision, precision_of
from diffship.core.spec import TensorSpec
from diffship.core.strict import bounded, bounds, load, plain

MANIFEST_NAME = "diffship.json"
SCHEMA = 2  # 2: golden vectors of several calls, tolerances by output and by block
_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}\Z")
_SEGMENT = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.+@ -]*[A-Za-z0-9_+@-])?\Z")
_HEX = re.compile(r"[0-9a-f]{64}\Z")
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9]|lpt[0-9])(?:\..*)?\Z", re.IGNORECASE)


@dataclass(frozen=True)
class Binding:
    """How a target spells one canonical tensor: its native name, dtype and shape (ints and axis names)."""

    canonical: str
    native: str
    dtype: str
    shape: tuple[int | str, ...]


@brief
@dataclass(frozen=True)
@bounded
class GoldenBlocks:
    """References inside a part, in a bundle-relative file: `in.NAME` is fed, `graph.NAME` and `out.NAME` are sketches.

    cut: {graph tensor: power of two}. Nodes that read such a tensor are fed `in.NAME` instead, so that no block sees an
    error of an earlier one. The file's float8 values are multiplied with that power of two.
    graph: tolerance by point of the graph in float32 arithmetic, against `graph.NAME`.
    engine: tolerance by point of an engine in the part's precision, against `out.NAME`; empty for fp32.
    """

    file: str
    cut: dict[str, int] = field(metadata=bounds(-64, 64))
    graph: dict[str, Tolerance]
    engine: dict[str, Tolerance] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.graph:
            raise BundleError(f"{self.file}: block references without a point would prove nothing")


@brief
@dataclass(frozen=True)
@bounded
class Golden:
    """Inputs and fp32 reference outputs of `calls` calls at `sizes`, in a bundle-relative file.

    The file holds `K.in.NAME` and `K.out.NAME` for call K from 0 on; if `outputs` is empty it is of the form of
    schema 1, one call as `in.NAME` and `out.NAME`. outputs: tolerance by output; tolerance: the loosest of them.
    method: how they were found.
    """

    file: str
    sizes: dict[str, int] = field(metadata=bounds(1, 65536))
    tolerance: Tolerance
    calls: int = field(default=1, metadata=bounds(1, 64))
    outputs: dict[str, Tolerance] = field(default_factory=dict)
    method: dict[str, Any] = field(default_factory=dict)
    blocks: GoldenBlocks | None = None

    def __post_init__(self) -> None:
        blocks = () if self.blocks is None else (*self.blocks.graph.values(), *self.blocks.engine.values())
        if not all(limit.checks for limit in (self.tolerance, *self.outputs.values(), *blocks)):
            raise BundleError(f"{self.file}: a tolerance without limits would prove nothing")


@brief
@dataclass(frozen=True)
class GoldenTrajectory:
    """A trajectory before its first call (docs/wire-format.md), and the fp32 latents after each call (`step.1` on).

    Both are bundle-relative files; the tolerance holds at every step.
    """

    start: str
    latents: str
    tolerance: Tolerance


@brief
@dataclass(frozen=True)
class Part:
    """One compiled component. `files[0]` is what an engine opens; `bindings` only if the target renames or reshapes.

    `proof` is {"status": "proved" | "unproven", ...figures}; `extra` belongs to the target.
    """

    name: str
    files: tuple[str, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    source_digest: str
    bindings: tuple[Binding, ...] = ()
    golden: Golden | None = None
    proof: dict[str, Any] = field(default_factory=lambda: {"status": "unproven"})
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise BundleError(f"part name {self.name[:80]!a} is not lower-case letters, digits, '.', '_' or '-'")
        if not self.files or not self.inputs or not self.outputs:
            raise BundleError(f"part {self.name} has no files, no inputs or no outputs")
        if not _HEX.match(self.source_digest):
            raise BundleError(f"part {self.name}: source_digest {self.source_digest[:80]!a} is not 64 hex digits")
        blocks = None if self.golden is None else self.golden.blocks
        if blocks is not None and not blocks.engine and not (self.format.exact or self.format.simulated):
            raise BundleError(f"part {self.name}: {blocks.file} has no tolerances for an engine in {self.precision}")
        if self.proof.get("status") not in ("proved", "unproven"):
            raise BundleError(f"part {self.name}: proof status {str(self.proof.get('status'))[:40]!a} is unknown")

    @property
    def format(self) -> Precision:
        """What `precision` means; raises BundleError if this version does not know it."""
        try:
            return precision_of(self.precision)
        except ConfigError as fault:
            raise BundleError(f"part {self.name}: {fault}. A newer diffship may know it") from None


@dataclass(frozen=True)
@bounded
class FileRecord:
    """Size in bytes and sha256 (hex) of one file."""

    size: int = field(metadata=bounds(0, LIMITS.file_bytes))
    sha256: str

    def __post_init__(self) -> None:
        if not _HEX.match(self.sha256):
            raise BundleError(f"sha256 {self.sha256[:80]!a} is not 64 hex digits")


@brief
@dataclass(frozen=True)
class Manifest:
    """The whole of diffship.json. `sampler` is diffusers' scheduler config; `files` leaves diffship.json itself out.

    source: id, revision, kind; licence: id, name, link, restrictions, notices.
    """

    target: str
    family: Family
    parts: tuple[Part, ...]
    sampler: dict[str, Any] = field(default_factory=dict)
    source: dict[str, Any] = field(default_factory=dict)
    recipe: dict[str, Any] = field(default_factory=dict)
    history: list[Any] = field(default_factory=list)
    tools: dict[str, Any] = field(default_factory=dict)
    licence: dict[str, Any] = field(default_factory=dict)
    trajectory: GoldenTrajectory | None = None
    files: dict[str, FileRecord] = field(default_factory=dict)
    schema: int = SCHEMA

    def __post_init__(self) -> None:
        if not _NAME.match(self.target):
            raise BundleError(f"target {self.target[:80]!a} is not lower-case letters, digits, '.', '_' or '-'")
        names = [part.name for part in self.parts]
        if not names or len(names) != len(set(names)) or len(names) > LIMITS.bundle_parts:
            raise BundleError(f"there are no parts, too many, or two of one name: {', '.join(names)[:200] or 'none'}")
        for name in [*self.files, *self.named_files()]:
            check_path(name)
        _refuse_twins(self.files)

    def named_files(self) -> dict[str, str]:
        """Every file that a part or the trajectory names, and who names it."""
        named = {name: f"part {part.name}" for part in self.parts for name in _part_files(part)}
        if self.trajectory is not None:
            named |= dict.fromkeys((self.trajectory.start, self.trajectory.latents), "the trajectory")
        return named

    def part(self, name: str) -> Part:
        """The part called `name`. Raises BundleError, naming the parts there are."""
        for part in self.parts:
            if part.name == name:
                return part
        known = ", ".join(part.name for part in self.parts)
        raise BundleError(f"the bundle has no part {name!r}; it has {known}")

    def to_json(self) -> dict[str, Any]:
        data: dict[str, Any] = plain(self) | {"family": self.family.to_json()}
        if self.trajectory is None:
            data.pop("trajectory")
        for part in data["parts"]:
            for spec in (*part["inputs"], *part["outputs"]):
                # `exact` is left out: a compiled part already has types that hold its values
                for key in ("exact", "whole"):
                    if not spec[key]:
                        del spec[key]
            golden = part["golden"] or {}
            for key in ("calls", "outputs", "method", "blocks"):  # not in schema 1
                if golden.get(key) in (1, {}, None):
                    golden.pop(key, None)
        return {"schema": data.pop("schema"), **data}

    def to_bytes(self) -> bytes:
        """UTF-8 JSON; raises BundleError if a value is not JSON (NaN, say), or it gets too long."""
        try:
            text = json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
            data = text.encode()
        except (TypeError, ValueError, RecursionError) as fault:
            raise BundleError(f"the manifest holds something that is not JSON: {fault}") from None
        if len(data) > LIMITS.manifest_bytes:
            raise BundleError(f"the manifest takes {len(data)} bytes; the limit is {LIMITS.manifest_bytes}")
        return data


def parse_manifest(data: bytes) -> Manifest:
    """The manifest in `data`. Raises BundleError for anything that this version did not write, and says what."""
    if len(data) > LIMITS.manifest_bytes:
        raise BundleError(f"{MANIFEST_NAME} has {len(data)} bytes; the limit is {LIMITS.manifest_bytes}")
    table = _parse_json(data)
    if not isinstance(table, dict):
        raise BundleError(f"{MANIFEST_NAME} is not a table")
    schema = table.get("schema")
    if type(schema) is not int or schema < 1:
        raise BundleError(f"{MANIFEST_NAME}: schema {str(schema)[:40]!a} is not a version number; this reads {SCHEMA}")
    if schema > SCHEMA:
        raise BundleError(
            f"{MANIFEST_NAME} has schema {str(schema)[:40]}, of a newer diffship; this one reads up to {SCHEMA}. "
            "Run: pip install --upgrade diffship"
        )
    _bounded(table, "files", LIMITS.bundle_files)
    _bounded(table, "parts", LIMITS.bundle_parts)
    return load(Manifest, table, MANIFEST_NAME, BundleError)


def listed_files(data: bytes) -> frozenset[str]:
    """The files that a manifest lists, also if this version cannot open it (a value out of bounds, a newer schema). It
    counts as a manifest if it begins as every manifest does and has the size and hash of each file.

    Raises:
        BundleError: it is no manifest of diffship, or lists a path outside its folder.
    """
    table = _parse_json(data)
    files = table.get("files") if isinstance(table, dict) else None
    if not isinstance(files, dict) or not {"schema", "target", "family", "parts"} <= set(table):
        raise BundleError(f"{MANIFEST_NAME} was not written by diffship")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not {"size", "sha256"} <= set(entry):
            raise BundleError(f"{MANIFEST_NAME} was not written by diffship: {name[:80]!a} has no size or hash")
    return frozenset(map(check_path, files))


def check_path(name: str) -> str:
    """`name`, if it is a plain relative path that means the same on every system and stays inside the bundle.

    Raises:
        BundleError: absolute, `..`, backslash, drive, NUL, not ASCII, hidden, final dot or space, reserved, too long.
    """
    shown = ascii(name[:100])
    if not 0 < len(name) <= LIMITS.path_chars:
        raise BundleError(f"the path {shown} has {len(name)} characters; legal is 1 to {LIMITS.path_chars}")
    segments = name.split("/")
    if len(segments) > LIMITS.path_depth:
        raise BundleError(f"the path {shown} is deeper than {LIMITS.path_depth} folders")
    for segment in segments:
        if len(segment) > LIMITS.name_chars or not _SEGMENT.match(segment) or _RESERVED.match(segment):
            raise BundleError(
                f"the path {shown} is not legal in a bundle: it must be relative, without '..', of ASCII letters, "
                "digits, '_', '-', '+', '@', '.' and inner spaces, and no reserved name"
            )
    if name.lower() == MANIFEST_NAME:
        raise BundleError(f"{MANIFEST_NAME} cannot list itself")
    return name


def _part_files(part: Part) -> tuple[str, ...]:
    golden = part.golden
    if golden is None:
        return part.files
    return (*part.files, golden.file) if golden.blocks is None else (*part.files, golden.file, golden.blocks.file)


def _refuse_twins(files: Mapping[str, object]) -> None:
    seen: dict[str, str] = {}
    for name in files:
        other = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if other != name:
            raise BundleError(f"the paths {name!a} and {other!a} are one file on some systems")


def _bounded(table: dict[str, Any], key: str, limit: int) -> None:
    entries = table.get(key)
    if isinstance(entries, (dict, list)) and len(entries) > limit:
        raise BundleError(f"{MANIFEST_NAME}: {key} has {len(entries)} entries; the limit is {limit}")


def _parse_json(data: bytes) -> Any:
    try:
        table = json.loads(
            data.decode("utf-8"),
            object_pairs_hook=_unique,
            parse_constant=_refuse_number,
            parse_float=_finite(float, _refuse_number),
        )
        json.dumps(table, ensure_ascii=False).encode()  # refuses lone surrogates
    except (ValueError, RecursionError) as fault:
        raise BundleError(f"{MANIFEST_NAME} is not JSON: {str(fault)[:120]}") from None
    return table


def _finite(convert: Callable[[str], float], refuse: Callable[[str], NoReturn]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = convert(text)
        return value if math.isfinite(value) else refuse(text)

    return parse


def _refuse_number(text: str) -> NoReturn:
    raise BundleError(f"{MANIFEST_NAME} holds the number {text[:20]}, which is not finite")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = sorted(key for key, _ in pairs)
        twice = next(first for first, second in pairwise(names) if first == second)
        raise BundleError(f"{MANIFEST_NAME}: the key {twice[:80]!a} stands twice")
    return table
