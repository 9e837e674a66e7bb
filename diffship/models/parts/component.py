"""Component: one part of a pipeline as specs, a module on the meta device, and weights that are read when needed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffship.core.brief import brief
from diffship.core.errors import ConfigError, DiffshipError, SourceError, UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.problem import Problem
from diffship.core.spec import TensorSpec
from diffship.core.weights import TensorMeta, Weights, count_parameters, source_digest
from diffship.models.parts.examples import draw
from diffship.models.parts.filling import INNER, computed, computed_names, sources, tied

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from torch import nn

    from diffship.models.parts.program import Program
    from diffship.models.parts.runner import TorchRunner
else:
    np = lazy("numpy")
    torch, nn = lazy("torch"), lazy("torch.nn")

SHOWN = 8  # unused tensors that are named


@brief
@dataclass(frozen=True)
class Component:
    """A part under its canonical name, with the canonical inputs and outputs that every engine keeps.

    `build()` makes the part on the current default device (meta, fake or real); its forward takes the inputs as
    positional tensors in the order of `inputs` and returns a tuple in the order of `outputs`. Its parameters are called
    `inner.` + the name in `weights`. `smallest` holds the least legal size of every named axis. `text_type` is the
    `model_type` of a part that transformers reads; None for one of diffusers.

    `shares` names a part with the very same weights, in whose folder and over whose data a target may store this one.

    `walk(component, inner)` gives the layers of `inner` (the network below `inner.`, on any device) in the order in
    which they run; a part without one is never cut. Run one after the other, they compute what the part computes.
    """

    name: str
    class_name: str
    config: Mapping[str, Any]
    build: Callable[[], nn.Module] = field(repr=False, compare=False)
    weights: Weights = field(repr=False, compare=False)
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    smallest: Mapping[str, int] = field(default_factory=dict)
    template: Callable[[], nn.Module] | None = field(default=None, repr=False, compare=False)
    walk: Callable[[Component, nn.Module], Program] | None = field(default=None, repr=False, compare=False)
    text_type: str | None = None
    shares: str | None = None

    @property
    def meta(self) -> nn.Module:
        """The part on the meta device, new with every access (about a second for SDXL); it has shapes and no values."""
        if self.template is not None:
            return self.template()
        with reading(self.name, self.class_name), torch.device("meta"):
            return self.build().eval()

    @property
    def parameters(self) -> int:
        """How many numbers its weights hold."""
        return count_parameters(self.weights)

    @property
    def digest(self) -> str:
        """sha256 over the source tensors (core.weights.source_digest); reads every one of them."""
        return source_digest(self.weights)

    @property
    def overflows_half(self) -> bool:
        """Whether its config says that float16 is too narrow for what it computes, as SDXL's VAE has it."""
        return bool(self.config.get("force_upcast"))

    def program(self, inner: nn.Module | None = None) -> Program:
        """The layers of the part with their tensors, over `inner`, or over one built on the meta device.

        Raises:
            ConfigError: its layers are not known.
        """
        if self.walk is None:
            raise ConfigError(f"{self.name} ({self.class_name}) cannot be cut: its layers are unknown")
        return self.walk(self, self.meta.get_submodule("inner") if inner is None else inner)

    def smallest_sizes(self) -> dict[str, int]:
        """Axis name -> smallest legal size."""
        return dict(self.smallest)

    def example(self, seed: int, sizes: Mapping[str, int] | None = None) -> dict[str, NDArray[np.generic]]:
        """Plausible feeds, equal for equal seed and sizes; axes that `sizes` leaves out have their smallest size."""
        known = {**self.smallest, **(sizes or {})}
        rng = np.random.Generator(np.random.PCG64(seed))
        return {spec.name: draw(spec, known, rng, self.config) for spec in self.inputs}

    def module(self, device: str = "cpu", dtype: torch.dtype | str | None = None) -> nn.Module:
        """The part with its weights, filled tensor by tensor, in `dtype` (float32 by default).

        Raises:
            SourceError: a tensor is missing or has another shape than the config asks for.
        """
        module = self.meta
        label = f"{self.name} ({self.class_name})"
        for name, tensor in computed(module, self.build, label).items():
            assign(module, name, tensor.to(device))
        fill(module, self.weights, device, torch_dtype(dtype), label)
        return module.eval()

    def load(self, device: str = "cpu", dtype: torch.dtype | str | None = None) -> TorchRunner:
        """A runner on torch; float feeds are cast to `dtype`, exact ones stay float32."""
        from diffship.models.parts.runner import TorchRunner

        kind = torch_dtype(dtype)
        return TorchRunner(self.module(device, kind), self.inputs, self.outputs, device, kind)


@contextmanager
def reading(part: str, class_name: str) -> Iterator[None]:
    """For a block that uses a config: an error of Python, diffusers or transformers over an impossible value becomes a
    SourceError."""
    try:
        yield
    except (DiffshipError, MemoryError):
        raise
    except Exception as fault:  # the libraries have kinds of their own
        why = f"{type(fault).__name__}: {' '.join(str(fault).split())[:200]}"
        raise SourceError(f"{part}: its config makes no {class_name}; {why}") from fault


def torch_dtype(dtype: torch.dtype | str | None) -> torch.dtype:
    """`float16` or torch.float16 -> torch.float16; None -> torch.float32."""
    if dtype is None:
        return torch.float32
    kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(kind, torch.dtype):
        raise TypeError(f"{dtype!r} is not a torch dtype")
    return kind


def weight_metas(module: nn.Module, dtype: str = "float32") -> dict[str, TensorMeta]:
    """{name without `inner.`: TensorMeta} of everything that a part loads; of tied tensors, the first name alone."""
    state = module.state_dict()
    types = {name: dtype if tensor.is_floating_point() else f"{tensor.dtype}"[6:] for name, tensor in state.items()}
    return {name.removeprefix(INNER): TensorMeta(types[name], tuple(state[name].shape)) for name, *_ in tied(module)}


def fill(module: nn.Module, weights: Weights, device: str, dtype: torch.dtype, label: str) -> None:
    """Replace every meta tensor of `module` by its weight, one at a time, so that nothing is held twice.

    Tied tensors stay tied. Buffers that no weight file holds must have their values already (`filling.computed`).

    Raises:
        SourceError: a tensor is missing or has another shape, or tied ones differ in the weights.
        UnsupportedError: a buffer that no weight file holds has no values.
    """
    known = set(weights.names())
    expected, source = module.state_dict(), sources(module, known)
    missing = [name for name in expected if source[name] not in known]
    if missing:
        raise SourceError(f"{label}: {len(missing)} tensors are missing from its weights, first {missing[0]!r}")
    _refuse_computed(module, label)
    for group in tied(module):
        tensor, empty = read_tensor(weights, source[group[0]]), expected[group[0]]
        if tensor.shape != empty.shape:
            raise SourceError(
                f"{label}: {group[0]} has shape {tuple(tensor.shape)}, its config asks for {tuple(empty.shape)}"
            )
        _refuse_untied(weights, known, group, tensor, label)
        filled = tensor.to(device=device, dtype=dtype if tensor.is_floating_point() else None)
        for name in group:
            filled = assign(module, name, filled)


def weight_problems(component: Component) -> list[Problem]:
    """Tensors of a part that its weights lack, or have in another shape; no weight is read."""
    known, module = set(component.weights.names()), component.meta
    problems, source_of = [], sources(module, known)
    for name, tensor in module.state_dict().items():
        source = source_of[name]
        if source not in known:
            problems.append(Problem(component.name, f"its weights have no tensor {source!r}"))
        elif component.weights.meta(source).shape != tuple(tensor.shape):
            found = component.weights.meta(source).shape
            problems.append(
                Problem(component.name, f"{source} has shape {found}, its config asks for {tuple(tensor.shape)}")
            )
    return problems


def unexpected(module: nn.Module, weights: Weights) -> list[str]:
    """Tensors of `weights` that `module` does not take."""
    return sorted(set(weights.names()) - {name.removeprefix(INNER) for name in module.state_dict()})


def unused(components: Iterable[Component]) -> list[str]:
    """A sentence for each part whose weights have tensors that it does not take."""
    found = {component.name: unexpected(component.meta, component.weights) for component in components}
    return [unused_text(name, len(names), names[:SHOWN]) for name, names in found.items() if names]


def unused_text(part: str, count: int, first: Sequence[str]) -> str:
    return f"{part} does not take {count} tensors of its weight files: {', '.join(first)}"


def _refuse_computed(module: nn.Module, label: str) -> None:
    """Raises UnsupportedError for a buffer without a name in the state that is still on the meta device."""
    for name in computed_names(module):
        if module.get_buffer(name).is_meta:
            raise UnsupportedError(f"{label}: the buffer {name} is computed when the part is made, and was not")


def _refuse_untied(weights: Weights, known: set[str], group: Sequence[str], tensor: torch.Tensor, label: str) -> None:
    """Raises SourceError if the weights hold tensors under several names of `group` that are not equal."""
    held = [name.removeprefix(INNER) for name in group if name.removeprefix(INNER) in known]
    for other in held[1:]:
        if not torch.equal(read_tensor(weights, other), tensor):
            raise SourceError(f"{label}: {held[0]} and {other} are one tensor by its config, and differ in its weights")


def read_tensor(weights: Weights, name: str) -> torch.Tensor:
    """One weight as a torch tensor of its own type; shares memory with the array that was read."""
    meta, array = weights.meta(name), weights.read(name)
    if not array.flags.writeable:
        array = array.copy()
    if meta.dtype in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        bits = np.int16 if meta.dtype == "bfloat16" else np.uint8
        kind: torch.dtype = getattr(torch, meta.dtype)
        return torch.from_numpy(array.view(bits)).view(kind)
    return torch.from_numpy(array)


def assign(module: nn.Module, name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Replace the parameter or buffer `name` of `module` by `tensor`; returns the object that is there now, which tied
    names then share."""
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if leaf not in owner._parameters:
        owner._buffers[leaf] = tensor
        return tensor
    held = tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor, requires_grad=False)
    owner._parameters[leaf] = held
    return held
