"""What a number format costs: torch computes as the format does, and the difference to float32 is measured.

Every operator runs in float32 and its result is rounded to the format, as 16-bit kernels do that accumulate in
float32. So it is the same on every CPU, whatever kernels that has. Weights are rounded first. Sinusoids of timesteps
and sizes stay exact, as every deployment of these networks has them; so does what is computed of integers alone (the
buckets of T5's relative positions), which code casts to float32 by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.calibration.packings import Packings, packings
from diffship.calibration.simulation import coded_inputs, unpacked
from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.precision import Precision
from diffship.models.parts.component import Component
from diffship.models.parts.filling import INNER
from diffship.models.walks.stages import memory_stages

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils import _pytree as tree
    from torch.utils import weak
    from torch.utils._python_dispatch import TorchDispatchMode
else:
    torch, tree, weak = lazy("torch"), lazy("torch.utils._pytree"), lazy("torch.utils.weak")
    TorchDispatchMode = lazy_base("torch.utils._python_dispatch", "TorchDispatchMode")

_ARITHMETIC = ("add", "sub", "rsub", "mul", "div")
# float32 has 24 bits of significand; results with 3 fewer are wrong by 8 times (18 dB) as much as float32's own
COARSE_BITS = 3
_EXACT = ("Timesteps",)  # class names of modules that compute in float32 in every deployment


def round_weights(module: nn.Module, precision: Precision, packed: Packings = MappingProxyType({})) -> None:
    """Give every float tensor of the state of `module` the value that `precision` stores for it, in place.

    packed: how weights are stored as integers, by their names in the whole part. Buffers that are computed when the
    module is made are no weights: they stay as they are.
    """
    kind = getattr(torch, precision.weights)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            packing = packed.get(name.removeprefix(INNER))
            if packing is not None:
                tensor.copy_(unpacked(tensor, packing))
            elif tensor.is_floating_point():
                tensor.copy_(tensor.to(kind).to(tensor.dtype))


@contextmanager
def rounding(module: nn.Module, precision: Precision) -> Iterator[None]:
    """Within it, every float result of every operator is rounded to `precision`, but inside exact modules of `module`.

    What an exact module gives is rounded once, where a deployment casts it. Constants are rounded as in `constants`.
    """
    with _outside_exact(module, _Format(_to(precision), results=True)):
        yield


def coarse() -> AbstractContextManager[None]:
    """Within it, every float result of every operator has COARSE_BITS fewer bits of significand than float32.

    That is what rounding does to a network, enlarged. Sinusoids of timesteps are no exception: at a timestep of 999 the
    last bit of a frequency is a ten-thousandth of the sinusoid, and engines differ there.
    """
    return _Format(_coarser, results=True)


@contextmanager
def constants(module: nn.Module, precision: Precision) -> Iterator[None]:
    """Within it, numbers that code adds or multiplies with are rounded to `precision`, as constants of a graph are."""
    with _outside_exact(module, _Format(_to(precision), results=False)):
        yield


@contextmanager
def _outside_exact(module: nn.Module, mode: _Format) -> Iterator[None]:
    exact = [part for part in module.modules() if type(part).__name__ in _EXACT]
    hooks = [part.register_forward_pre_hook(mode.pause) for part in exact]
    hooks += [part.register_forward_hook(mode.resume) for part in exact]
    try:
        with mode:
            yield
    finally:
        for hook in hooks:
            hook.remove()


class _Format(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Rounds Python floats among the operands of elementwise arithmetic, and with `results` what operators give.

    Attributes such as epsilon stay exact. A result is rounded in place if the operator wrote in place; views are passed
    on, and other results replaced. Integers that were cast to floats are exact, and so is what operators give of
    nothing else.
    """

    def __init__(self, rounded: Callable[[torch.Tensor], torch.Tensor], results: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._rounded, self._results = rounded, results
        self._paused = 0
        self._exact = weak.WeakIdKeyDictionary()  # of tensors as objects; they end while this lives

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._paused or self._of_integers(args):
            return self._kept(func(*args, **(kwargs or {})))
        if func.overloadpacket.__name__.rstrip("_") in _ARITHMETIC:
            args = tuple(float(self._rounded(torch.tensor(v))) if isinstance(v, float) else v for v in args)
        out = func(*args, **(kwargs or {}))
        aliases = [entry.alias_info for entry in func._schema.returns]
        if not self._results or any(alias is not None and not alias.is_write for alias in aliases):
            return out
        written = any(alias is not None for alias in aliases)
        return tree.tree_map(lambda value: self._round(value, written), out)

    def _of_integers(self, args: tuple[Any, ...]) -> bool:
        """Whether the operands are integers, or floats that come of nothing else."""
        tensors = [value for value in tree.tree_leaves(args) if isinstance(value, torch.Tensor)]
        return bool(tensors) and all(one in self._exact or not one.is_floating_point() for one in tensors)

    def _kept(self, out: Any) -> Any:
        if not self._paused:
            self._exact.update({value: True for value in tree.tree_leaves(out) if isinstance(value, torch.Tensor)})
        return out

    def _round(self, value: Any, written: bool) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        rounded = self._rounded(value)
        return value.copy_(rounded) if written else rounded

    def pause(self, *_: Any) -> None:
        """An exact module begins."""
        self._paused += 1

    def resume(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """An exact module ends; what the outermost gives is a result."""
        self._paused -= 1
        return self._rounded(output) if self._results and not self._paused else output


def _to(precision: Precision) -> Callable[[torch.Tensor], torch.Tensor]:
    kind: torch.dtype = getattr(torch, precision.activations)
    return lambda value: value.to(kind).to(value.dtype)


def _coarser(value: torch.Tensor) -> torch.Tensor:
    """float32 values, each the nearest that has COARSE_BITS fewer bits; half way, the larger one."""
    bits = value.contiguous().view(torch.int32)
    return ((bits + (1 << (COARSE_BITS - 1))) & -(1 << COARSE_BITS)).view(torch.float32)


def simulated_forward(
    component: Component,
    feeds: Mapping[str, NDArray[np.generic]],
    max_bytes: int,
    precision: Precision,
    moved: bool = False,
) -> dict[str, NDArray[np.generic]]:
    """Outputs of a part in `precision`, float32 arrays, with at most `max_bytes` of its weights loaded at once.

    moved: as engines differ: inputs of coded layers as in `coded_inputs`; `coarse` results if `precision` is exact.
    """
    try:
        stages: Sequence[Component] = memory_stages(component, max_bytes)
    except ConfigError:  # a stage itself cannot be cut again
        stages = [component]
    values = {name: torch.from_numpy(np.array(array)) for name, array in feeds.items()}
    packed = packings(component, precision)
    for stage in stages:
        module = stage.module()
        round_weights(module, precision, packed)
        with torch.no_grad(), _results(module, precision, moved):
            made = module(*(values[spec.name] for spec in stage.inputs))
        values.update((spec.name, tensor) for spec, tensor in zip(stage.outputs, made, strict=True))
    return {spec.name: values[spec.name].numpy() for spec in component.outputs}


def _results(module: nn.Module, precision: Precision, moved: bool) -> AbstractContextManager[None]:
    if precision.exact and moved:
        return coarse()
    return coded_inputs(module, precision, moved) if precision.simulated else rounding(module, precision)
