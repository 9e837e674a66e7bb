"""Golden blocks: what torch gives at every point of a part, each layer fed with the reference's own input.

A fault in one block of a large network may not show at its output; at the output of its own block it does. Inputs of
layers are rounded to float8 (E4M3) times a power of two, so that they take little room, and engines in float32, float16
and bfloat16 get the very same ones; what comes out is kept as a sketch (core.sketch).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.calibration.packings import packings
from diffship.calibration.simulation import coded_inputs
from diffship.core.compare import Tolerance
from diffship.core.dtype import TensorMeta, meta_of, to_float32
from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.manifest import GoldenBlocks
from diffship.core.precision import Precision
from diffship.core.safetensors_file import write_safetensors
from diffship.core.sketch import sketch
from diffship.exporters.formats import constants, round_weights, rounding
from diffship.exporters.tolerances import exact, measured
from diffship.models.parts.component import Component
from diffship.models.parts.program import Layer, Program, Tree
from diffship.models.walks.points import OUT, layer_points, point_paths
from diffship.models.walks.stages import Stage

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

Arrays = dict[str, NDArray[np.generic]]
FED = "float8_e4m3fn"
_WAYS = ("true", "rounded", "format")


@dataclass
class _Found:
    """What one way of computing gave: sketches by point, and tensors that flow on within it alone."""

    sketches: Arrays = field(default_factory=dict)
    loose: dict[str, torch.Tensor] = field(default_factory=dict)


def block_sizes(sizes: Mapping[str, int], factor: int) -> dict[str, int]:
    """Sizes at which the blocks of a part are proved, given those of its golden calls.

    An auto-encoder is a network of local layers and one attention, so four by six latents show all of it (`factor`
    pixels each). What is fed to every layer lies in the bundle: at the size of a picture that would outweigh the part.
    """
    small = {"height": 4, "width": 6}
    found = dict(sizes)
    for axis in sizes:
        kind, _, side = axis.partition("_")
        if kind in ("latent", "sample") and side in small:
            found[axis] = small[side] * (factor if kind == "sample" else 1)
    return found


def write_blocks(
    component: Component, feeds: Mapping[str, NDArray[np.generic]], out: Path, precision: Precision, max_bytes: int
) -> GoldenBlocks | None:
    """Write `golden/<part>.blocks.safetensors` below `out`; returns None for a part whose layers are not known.

    The file holds `in.NAME` (what is fed: feeds of the part as they are, others as float8), `graph.NAME` (sketches of
    torch in float32 on the weights that `precision` stores) and, unless engines compute that exactly, `out.NAME`
    (sketches on the true weights).

    Raises:
        UnsupportedError: the part overflows in `precision`.
    """
    if component.walk is None:
        return None
    inner = component.meta.get_submodule("inner")
    walk = _Walk(component, component.program(inner), point_paths(component, inner), feeds, precision)
    walk.run(max_bytes)
    limits = walk.graph_limits(), walk.engine_limits()
    file = f"golden/{component.name}.blocks.safetensors"
    tensors, metas = walk.tensors()
    (out / "golden").mkdir(exist_ok=True)
    write_safetensors(out / file, metas, tensors.__getitem__)
    return GoldenBlocks(file, walk.scales, *limits)


class _Walk:
    """One pass over the layers of a part, each loaded once and run in up to three ways."""

    def __init__(
        self,
        component: Component,
        program: Program,
        paths: frozenset[str],
        feeds: Mapping[str, NDArray[np.generic]],
        precision: Precision,
    ) -> None:
        self.component, self.program, self.paths, self.precision = component, program, paths, precision
        self.feeds = dict(feeds)
        self.cut: dict[str, NDArray[np.generic]] = {}  # float8 bits
        self.scales: dict[str, int] = {}  # by power of two
        names = ("true",) if precision.lossless else ("true", "rounded") if precision.exact else _WAYS
        self.ways = {name: _Found() for name in names}
        self._packed = packings(component, precision)
        self._forced: dict[str, torch.Tensor] = {name: torch.from_numpy(np.array(a)) for name, a in feeds.items()}
        # the graph of a stage calls layers, so a module that no layer calls as a whole leaves no trace in it
        self._between = {} if isinstance(component, Stage) else layer_points(self.program, self.paths)

    def run(self, max_bytes: int) -> None:
        from diffship.models.walks.stages import memory_stages

        for stage in memory_stages(self.component, max_bytes):
            module = stage.module()
            names = set(stage.layers)
            layers = [layer for layer in self.program.layers if layer.name in names]
            with torch.no_grad():
                self._stage(module, layers)

    def _stage(self, module: nn.Module, layers: Sequence[Layer]) -> None:
        inner = module.get_submodule("inner")
        for layer in layers:
            self._layer(inner, layer, "true")
        if self.precision.lossless:
            return
        round_weights(module, self.precision, self._packed)
        for layer in layers:
            with constants(module, self.precision), coded_inputs(module, self.precision):
                self._layer(inner, layer, "rounded")
            if self.precision.exact:
                continue
            if self.precision.simulated:
                with coded_inputs(module, self.precision, moved=True):
                    self._layer(inner, layer, "format")
                continue
            with rounding(module, self.precision):
                self._layer(inner, layer, "format")

    def _layer(self, inner: nn.Module, layer: Layer, way: str) -> None:
        found = self.ways[way]
        given = [self._forced[name] if name in self._forced else found.loose[name] for name in layer.reads]
        called: dict[str, torch.Tensor] = {}
        hooks = [self._watch(inner, path, called) for path in self._below(inner, layer)]
        try:
            written = layer.apply(Tree(inner), *given)
        finally:
            for hook in hooks:
                hook.remove()
        for name, tensor in zip(layer.writes, written, strict=True):
            found.loose[name] = tensor
            # an output that is a module's own tensor is the same point under another name
            handed_on = any(tensor is other for other in called.values())
            if name in self._between or (name in self.program.outputs and not handed_on):
                called[name] = tensor
        for name, tensor in called.items():
            found.sketches[name] = sketch(name, tensor.numpy())
        if way == "true":
            self._force({name: found.loose[name] for name in layer.writes}, called)

    def _force(self, written: Mapping[str, torch.Tensor], called: Mapping[str, torch.Tensor]) -> None:
        """Let later layers read rounded copies of those written tensors that are points of the graph.

        A layer may write a sum under the name of one of the modules that it adds up; such a tensor is no point.
        """
        for name, tensor in written.items():
            if called.get(name) is tensor and name.endswith(OUT):
                self.cut[name], self.scales[name] = _narrow(tensor)
                wide = to_float32(self.cut[name], FED) * np.float32(2.0) ** self.scales[name]
                self._forced[name] = torch.from_numpy(wide)

    def _below(self, inner: nn.Module, layer: Layer) -> list[str]:
        roots = [path for path in layer.modules if _has(inner, path)]
        return [
            path
            for path in self.paths
            if any(path == root or path.startswith(f"{root}.") for root in roots) and _has(inner, path)
        ]

    def _watch(self, inner: nn.Module, path: str, called: dict[str, torch.Tensor]) -> Any:
        def keep(module: nn.Module, inputs: Any, named: Mapping[str, Any], output: Any) -> None:
            made = _made(output if isinstance(output, tuple) else (output,), (*inputs, *named.values()))
            # of modules that hand one tensor on, the innermost names it, as in the graph
            if len(made) == 1 and not any(made[0] is other for other in called.values()):
                called[path + OUT] = made[0]

        return inner.get_submodule(path).register_forward_hook(keep, with_kwargs=True)

    def tensors(self) -> tuple[Arrays, dict[str, TensorMeta]]:
        """What the file holds, and as which types."""
        arrays: Arrays = {f"in.{name}": array for name, array in self.feeds.items()}
        metas = {name: meta_of(array) for name, array in arrays.items()}
        for name, bits in self.cut.items():
            arrays[f"in.{name}"], metas[f"in.{name}"] = bits, TensorMeta(FED, bits.shape)
        sides = {"graph": "true" if self.precision.lossless else "rounded"}
        sides |= {} if self.precision.exact or self.precision.simulated else {"out": "true"}
        for side, way in sides.items():
            for name, array in self.ways[way].sketches.items():
                arrays[f"{side}.{name}"], metas[f"{side}.{name}"] = array, meta_of(array)
        return arrays, metas

    def graph_limits(self) -> dict[str, Tolerance]:
        """Tolerances, by point, for the graph in float32 arithmetic."""
        side = self.ways["true" if self.precision.lossless else "rounded"].sketches
        if not self.precision.inputs:
            return {name: exact(array) for name, array in side.items()}
        moved = self.ways["format"].sketches
        return {name: measured(array, moved[name]) for name, array in side.items()}

    def engine_limits(self) -> dict[str, Tolerance]:
        """Tolerances, by point, for an engine in the format; none if it computes the graph exactly (its own hold).

        Raises:
            UnsupportedError: the format turns finite values into infinity or NaN.
        """
        if self.precision.exact or self.precision.simulated:
            return {}
        true, formatted = (self.ways[way].sketches for way in ("true", "format"))
        for name, array in formatted.items():
            if not np.isfinite(array).all():
                raise UnsupportedError(
                    f"{self.component.name} overflows {self.precision.activations} at {name.removesuffix(OUT)}: "
                    "export it with --precision fp32"
                )
        return {name: measured(array, formatted[name]) for name, array in true.items()}


def _made(outputs: Sequence[Any], inputs: Sequence[Any]) -> list[torch.Tensor]:
    """The tensors that a module made; the graph knows the output of a module by its being the only one."""
    tensors = [output for output in outputs if isinstance(output, torch.Tensor)]
    return [tensor for tensor in tensors if not any(tensor is given for given in inputs)]


def _narrow(tensor: torch.Tensor) -> tuple[NDArray[np.generic], int]:
    """(float8 bits, power): 2**power times the float8 values is nearest to `tensor`; their largest lies between 128 and
    256."""
    peak = float(tensor.abs().max())
    power = max(-64, min(64, math.frexp(peak)[1] - 8)) if peak > 0 else 0
    bits = (tensor * 2.0**-power).to(torch.float8_e4m3fn).view(torch.uint8)
    return bits.contiguous().numpy(), power


def _has(inner: nn.Module, path: str) -> bool:
    owner: Any = inner
    for name in path.split("."):
        owner = getattr(owner, "_modules", {}).get(name)
        if owner is None:
            return False
    return True
