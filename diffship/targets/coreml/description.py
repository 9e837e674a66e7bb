"""What a package says of itself: inputs, outputs, metadata, and how many operations of each kind its program has.

A package (.mlpackage) is read from its protobuf, a compiled model (.mlmodelc) from its metadata.json, as Xcode and
`xcrun coremlcompiler` write it.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffship.core.errors import BundleError
from diffship.core.limits import LIMITS
from diffship.core.protobuf import fields, first_text, message, numbers, string
from diffship.targets.coreml.package import COMPILED, MODEL
from diffship.targets.coreml.program import read_program

_DESCRIPTION, _INPUT, _OUTPUT, _METADATA, _USER = 2, 1, 10, 100, 100
_TYPE, _ARRAY = 3, 5  # of FeatureDescription; of FeatureType
_DTYPES: Mapping[int, str] = {65568: "float32", 65600: "float64", 131104: "int32", 131080: "int8", 65552: "float16"}
_HISTOGRAM = re.compile(r"(?:Ios\d+\.)?(\w+)\Z")
_METADATA_BYTES = 16 << 20


@dataclass(frozen=True)
class Feature:
    """An input or output: element type ("float16", or "" if it is no array) and shape."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Description:
    """Inputs and outputs by name in the order of the file, texts by key, and operations by kind."""

    inputs: Mapping[str, Feature]
    outputs: Mapping[str, Feature]
    metadata: Mapping[str, str] = field(default_factory=dict)
    operations: Mapping[str, int] = field(default_factory=dict)


def describe(path: Path) -> Description:
    """What the package, or the compiled model, at `path` says of itself.

    Raises:
        BundleError: it is damaged.
        UnsupportedError: it holds another kind of model than a program.
    """
    if path.suffix == COMPILED:
        return _compiled(path / "metadata.json")
    model = path / MODEL
    if not model.is_file():
        raise BundleError(f"{path.name} has no {MODEL}")
    program = read_program(model)  # bounds the size of the file first
    inputs, outputs, metadata = dict[str, Feature](), dict[str, Feature](), dict[str, str]()
    for number, _, value in fields(_description(model)):
        if number in (_INPUT, _OUTPUT):
            name, feature = _feature(message(value))
            (inputs if number == _INPUT else outputs)[name] = feature
        elif number == _METADATA:
            pairs = [message(held) for n, _, held in fields(message(value)) if n == _USER]
            metadata |= {first_text(pair, 1): first_text(pair, 2) for pair in pairs}
    kinds = Counter(operation.kind for operation in program.operations if operation.kind != "const")
    return Description(inputs, outputs, metadata, dict(kinds))


def _description(model: Path) -> memoryview:
    for number, _, value in fields(memoryview(model.read_bytes())):
        if number == _DESCRIPTION:
            return message(value)
    raise BundleError(f"{model.name} describes no inputs and outputs")


def _feature(data: memoryview) -> tuple[str, Feature]:
    name, feature = "", Feature("", ())
    for number, _, value in fields(data):
        if number == 1:
            name = string(value)
        elif number == _TYPE:
            for kind, _, held in fields(message(value)):
                if kind == _ARRAY:
                    feature = _array(message(held))
    return name, feature


def _array(data: memoryview) -> Feature:
    shape, dtype = list[int](), ""
    for number, _, value in fields(data):
        if number == 1:
            shape += numbers(value)
        elif number == 2 and isinstance(value, int):
            dtype = _DTYPES.get(value, "")
    return Feature(dtype, tuple(shape))


def _compiled(path: Path) -> Description:
    if not path.is_file() or path.stat().st_size > _METADATA_BYTES:
        raise BundleError(f"{path.parent.name} has no metadata.json, or a huge one: compile it again")
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        entry = table[0] if isinstance(table, list) else table
        sides = [{one["name"]: _schema(one) for one in entry.get(key, [])} for key in ("inputSchema", "outputSchema")]
        counts = entry.get("mlProgramOperationTypeHistogram", {})
        kinds = Counter({_kind(name): int(count) for name, count in counts.items()})
        texts = {str(key): str(text) for key, text in entry.get("userDefinedMetadata", {}).items()}
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError) as fault:
        raise BundleError(f"{path.parent.name}/metadata.json is damaged: {str(fault)[:120]}") from None
    return Description(sides[0], sides[1], texts, dict(kinds))


def _schema(entry: Mapping[str, Any]) -> Feature:
    shape = json.loads(entry.get("shape") or "[]")
    return Feature(str(entry.get("dataType", "")).lower(), tuple(int(size) for size in shape[: LIMITS.tensor_rank]))


def _kind(name: str) -> str:
    """`einsum` of `Ios16.einsum`."""
    match = _HISTOGRAM.match(name)
    return match[1] if match else name
