"""Golden vectors in the form of Polygraphy (NVIDIA's comparison tool), and its command that checks an engine by them.

Its own JSON: arrays are base64 of `.npy` files, and what they belong to is said by `polygraphy_class`. No pickle.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffship.core.atomic import write_file
from diffship.core.bundle import Bundle
from diffship.core.compare import Tolerance
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.manifest import Binding, Part
from diffship.core.spec import TensorSpec
from diffship.core.strict import unknown
from diffship.runtimes.engines.arrays import as_dtype, relayout
from diffship.runtimes.proof.verify import Arrays, read_golden

_RUNNERS = {"onnx": ("--onnxrt",), "tensorrt": ("--trt", "--model-type", "engine")}
_NO_PSNR = -1e3  # dB that every output has
_REFERENCE = "diffship, torch in float32"


@dataclass(frozen=True)
class PolygraphyPart:
    """What was written of one part: the command that checks it, or why there is none."""

    part: str
    command: str = ""
    reason: str = ""

    def to_json(self) -> dict[str, str]:
        return {"part": self.part, "command": self.command, "reason": self.reason}


def write_polygraphy(bundle: Bundle, out: Path, parts: Iterable[str] | None = None) -> list[PolygraphyPart]:
    """`OUT/PART/inputs.json` and `outputs.json` of every part: the inputs of each golden call, and torch's outputs.

    Files and their hashes are not looked at here. Inputs have the names, dtypes and shapes of the compiled file.

    Raises:
        ConfigError: the place is taken, or there is no such part.
        UnsupportedError: Polygraphy does not run bundles of this target.
    """
    manifest = bundle.manifest
    if manifest.target not in _RUNNERS:
        able = " and ".join(_RUNNERS)
        raise UnsupportedError(f"Polygraphy runs bundles of {able}; this one is {manifest.target}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--polygraphy {out} is taken; name a folder that is empty or not there")
    names = [part.name for part in manifest.parts]
    chosen = names if parts is None else list(parts)
    for name in chosen:
        if name not in names:
            raise ConfigError(unknown("part", name, names))
    return [_written(bundle, bundle.part(name), out) for name in chosen]


def _written(bundle: Bundle, part: Part, out: Path) -> PolygraphyPart:
    if part.golden is None:
        return PolygraphyPart(part.name, reason="no golden vectors in the bundle: it was exported with --no-verify")
    calls = read_golden(bundle, part.golden)
    bound = {binding.canonical: binding for binding in part.bindings}
    inputs, outputs = _bindings(part.inputs, bound), _bindings(part.outputs, bound)
    if any(binding.dtype == "bfloat16" for binding in inputs.values()):
        return PolygraphyPart(part.name, reason="it takes bfloat16, which numpy's files cannot hold")
    folder = out / part.name
    folder.mkdir(parents=True, exist_ok=True)
    feeds = [_native(part.inputs, inputs, given) for given, _ in calls]
    expected = [_native(part.outputs, outputs, made, cast=False) for _, made in calls]
    write_file(folder / "inputs.json", json.dumps([_arrays(feed) for feed in feeds]))
    write_file(folder / "outputs.json", json.dumps(_results(expected)))
    limits = {
        outputs[spec.name].native: part.golden.outputs.get(spec.name, part.golden.tolerance) for spec in part.outputs
    }
    model = bundle.file(part.files[0])
    return PolygraphyPart(part.name, shlex.join(command(bundle.manifest.target, model, folder, expected, limits)))


def command(
    target: str, model: Path, folder: Path, expected: Sequence[Arrays], limits: Mapping[str, Tolerance]
) -> list[str]:
    """The words of `polygraphy run` that hold `model` to the tolerance of each output; `--trt` may be added to them.

    Its elementwise check is met by an error within atol or within rtol, ours by one within their sum: never the looser
    one. Its PSNR takes the largest value as peak, ours the largest magnitude; the threshold makes up for that.
    """
    words = ["polygraphy", "run", os.fspath(model), *_RUNNERS[target]]
    words += ["--load-inputs", os.fspath(folder / "inputs.json"), "--load-outputs", os.fspath(folder / "outputs.json")]
    psnr = {
        name: limit.psnr_db + max(_peak_db(made[name]) for made in expected)
        for name, limit in limits.items()
        if limit.psnr_db is not None
    }
    elementwise = any(limit.atol is not None for limit in limits.values())
    words += ["--validate", "--compare", *(["simple"] if elementwise else []), *(["psnr"] if psnr else [])]
    # every output is named, as Polygraphy has defaults of its own for others: what has no limit passes whatever it is
    if elementwise:
        absolute = {name: math.inf if limit.atol is None else limit.atol for name, limit in limits.items()}
        words += ["--atol", *_by_output(absolute)]
        words += ["--rtol", *_by_output({name: limit.rtol for name, limit in limits.items()})]
    if psnr:
        words += ["--psnr-threshold", *_by_output({name: psnr.get(name, _NO_PSNR) for name in limits})]
    return words


def _peak_db(reference: np.ndarray) -> float:
    """What Polygraphy's PSNR of this output is above ours, in dB."""
    peak, most = float(np.abs(reference).max(initial=0.0)), float(reference.max(initial=-math.inf))
    return 20 * math.log10((most if most > 0 else 1.0) / peak) if peak else 0.0


def _by_output(values: Mapping[str, float]) -> list[str]:
    return [f"{name}:{value:.9g}" for name, value in values.items()]


def _bindings(specs: Sequence[TensorSpec], bound: Mapping[str, Binding]) -> dict[str, Binding]:
    return {spec.name: bound.get(spec.name) or Binding(spec.name, spec.name, spec.dtype, spec.shape) for spec in specs}


def _native(specs: Sequence[TensorSpec], bound: Mapping[str, Binding], arrays: Arrays, cast: bool = True) -> Arrays:
    """Arrays by the names of the compiled file, in its shapes, and (`cast`) in its dtypes."""
    found: Arrays = {}
    for spec in specs:
        binding, array = bound[spec.name], np.asarray(arrays[spec.name])
        whole = relayout(array, spec.shape, binding.shape)
        found[binding.native] = as_dtype(spec.name, whole, binding.dtype) if cast else whole
    return found


def _results(outputs: Sequence[Arrays]) -> dict[str, Any]:
    """Polygraphy's RunResults of one runner."""
    iterations = [
        {
            "outputs": {
                name: {"values": value, "polygraphy_class": "LazyArray"} for name, value in _arrays(made).items()
            },
            "runtime": None,
            "runner_name": _REFERENCE,
            "polygraphy_class": "IterationResult",
        }
        for made in outputs
    ]
    return {"lst": [[_REFERENCE, iterations]], "polygraphy_class": "RunResults"}


def _arrays(arrays: Arrays) -> dict[str, Any]:
    found = {}
    for name, array in arrays.items():
        file = io.BytesIO()
        np.lib.format.write_array(file, np.ascontiguousarray(array), allow_pickle=False)
        found[name] = {"array": base64.b64encode(file.getvalue()).decode(), "polygraphy_class": "ndarray"}
    return found
