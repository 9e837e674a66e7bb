"""torch.export of a component whose weights do not exist: every tensor is fake, only shapes and dtypes are real.

A part is traced at three sets of sizes, twice with make_fx; a number that differs between the traces is a free size.
That takes about half of the time of one trace with symbolic sizes, most of which sympy spends on the shapes behind
strided convolutions. Two sets would do for numbers that follow an axis; the third shows those that only seem to, such
as `min(height, 100)`.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from typing import TYPE_CHECKING, Any

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy, lazy_base
from diffship.core.precision import Precision
from diffship.core.spec import TensorSpec
from diffship.exporters.onnx.retrace import NO_EFFECT, Feed, Twins, by_name, retraced
from diffship.models.parts.component import assign
from diffship.models.parts.filling import computed_names, tied

if TYPE_CHECKING:
    import torch
    from torch._subclasses import fake_tensor
    from torch.nn import Module
else:
    torch, fake_tensor = lazy("torch"), lazy("torch._subclasses.fake_tensor")
    Module = lazy_base("torch.nn", "Module")

LIFTED = ("aten.lift_fresh.default", "aten.lift_fresh_copy.default")  # a constant becomes a tensor of the program
# multiples of an axis's smallest size in each trace; no two axes, halves or products of axes have one ratio. All but
# the first have a multiple of 8 and one less than that, which tells `h // 4` from `(h + 1) // 4`. Small: a VAE's
# tensors must stay below 2**31 elements, from where on diffusers takes another way
_RATIOS = ((3, 17, 2), (7, 16, 31), (15, 8, 37), (23, 48, 71), (39, 32, 47))


@dataclass(frozen=True)
class Capture:
    """program: at the first sizes. twins: what each of its nodes is at all sizes, the first included."""

    program: torch.export.ExportedProgram
    twins: Mapping[torch.fx.Node, tuple[torch.fx.Node, ...]]


def capture(
    module: torch.nn.Module,
    inputs: Sequence[TensorSpec],
    sizes: Sequence[Mapping[str, int]],
    precision: Precision,
    known: Collection[str],
) -> Capture:
    """What `module` (on the meta device) computes at all `sizes`: one program, whose numbers may depend on a size.

    Parameters have the dtype of `precision.activations`, inputs and outputs those of its ports. Operators that are not
    `known` (such as `aten.linear.default`) are taken apart, as far as torch can.

    Raises:
        UnsupportedError: torch.export cannot follow the module's Python code, or it computes other operations at
            other sizes.
    """
    inner, outer = (getattr(torch, name) for name in (precision.activations, precision.ports))
    own = copy.deepcopy(module).eval().requires_grad_(False)
    with _quiet(), fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        part = _as_fake(own, inner)
        casts = [spec.is_float and not spec.exact for spec in inputs]
        fake = _Positional(part) if inner == outer else _Between(part, casts, inner, outer)
        ports = [precision.port(spec) for spec in inputs]
        first, *others = (tuple(_feed(port, chosen) for port in ports) for chosen in sizes)
        program = _export(fake, first)
        if any(_is_unknown(node, known) for node in program.graph.nodes):
            table = _decompositions(known)
            programs = [one.run_decompositions(table) for one in (program, *(_export(fake, feed) for feed in others))]
            return Capture(programs[0], _joined(programs[0], [by_name(programs[0], one) for one in programs[1:]]))
        return Capture(program, _joined(program, [_twins(program, fake, feed) for feed in others]))


def _twins(program: torch.export.ExportedProgram, module: torch.nn.Module, feed: Feed) -> Twins:
    found = retraced(program, module, feed)
    # a program that torch.export cleaned up is compared with one that it cleaned up, too
    return by_name(program, _export(module, feed)) if found is None else found


def _joined(program: torch.export.ExportedProgram, twins: Sequence[Twins]) -> dict[Any, tuple[Any, ...]]:
    common = [node for node in program.graph.nodes if all(node in other for other in twins)]
    return {node: (node, *(other[node] for other in twins)) for node in common}


def _decompositions(known: Collection[str]) -> Any:
    table = torch.export.default_decompositions()
    for operator in list(table):
        if str(operator) in known:
            del table[operator]
    return table


def _is_unknown(node: torch.fx.Node, known: Collection[str]) -> bool:
    name = str(node.target)
    meant = name in known or name in LIFTED or name.startswith(NO_EFFECT)
    return isinstance(node.target, torch._ops.OpOverload) and not meant


def trace_sizes(smallest: Mapping[str, int]) -> tuple[dict[str, int], ...]:
    """Three legal sizes for each axis, with ratios of its own, so that no two axes, halves or products look alike."""
    axes = sorted(smallest.items(), key=_by_axis)
    ratios = [ratio for ratio, _ in zip(chain(_RATIOS, _further_ratios()), axes, strict=False)]
    steps = {axis: 1 if axis == "sequence_length" else least for axis, least in axes}
    return tuple(
        {axis: ratio[i] * steps[axis] for (axis, _), ratio in zip(axes, ratios, strict=True)} for i in range(3)
    )


def _further_ratios() -> Iterator[tuple[int, int, int]]:
    """Primes above those of _RATIOS, three by three."""
    primes = (n for n in count(53) if all(n % d for d in range(2, int(n**0.5) + 1)))
    while True:
        yield next(primes), next(primes), next(primes)


def _by_axis(item: tuple[str, int]) -> tuple[int, str]:
    # the sequence comes before axes of other names: a text encoder has 77 positions, and ratios grow
    kinds = ("batch", "height", "width", "sequence")
    return next((place for place, kind in enumerate(kinds) if kind in item[0]), len(kinds)), item[0]


def _export(module: torch.nn.Module, feeds: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    try:
        return torch.export.export(module, feeds, strict=False)
    except Exception as fault:
        reason = " ".join(str(fault).split())[:240]
        raise UnsupportedError(f"torch.export cannot follow this part: {reason}") from fault


class _Positional(Module):
    """Names of the wrapped module's parameters get the prefix `part.`; buffers and inputs keep their order."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, *feeds: torch.Tensor) -> Any:
        return self.part(*feeds)


class _Between(_Positional):
    """A part in dtype `inner` with inputs and outputs in `outer`; inputs that `casts` leaves out stay as they are."""

    def __init__(self, part: torch.nn.Module, casts: Sequence[bool], inner: torch.dtype, outer: torch.dtype) -> None:
        super().__init__(part)
        self._casts, self._inner, self._outer = tuple(casts), inner, outer

    def forward(self, *feeds: torch.Tensor) -> Any:
        pairs = zip(feeds, self._casts, strict=True)
        found = self.part(*(x.to(self._inner) if cast else x for x, cast in pairs))
        return tuple(x.to(self._outer) for x in found) if isinstance(found, tuple) else found.to(self._outer)


def _as_fake(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """`module` with fake CPU tensors in place of its own; called inside a FakeTensorMode.

    Its weights have `dtype`, tied ones stay tied, and computed buffers keep their own dtype.
    """
    state = module.state_dict(keep_vars=True)
    for group in tied(module):
        tensor = _blank(state[group[0]], dtype)
        for name in group:
            tensor = assign(module, name, tensor)
    for name in computed_names(module):
        assign(module, name, torch.empty_like(module.get_buffer(name), device="cpu"))
    return module


def _blank(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype)


def _feed(port: TensorSpec, sizes: Mapping[str, int]) -> torch.Tensor:
    return torch.zeros(port.resolve(sizes), dtype=getattr(torch, port.dtype))


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        yield
