"""Tensors of a module that its weight files do not list one by one: tied weights, and buffers that are computed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy, lazy_base

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.overrides import TorchFunctionMode
else:
    torch = lazy("torch")
    TorchFunctionMode = lazy_base("torch.overrides", "TorchFunctionMode")

INNER = "inner."  # every part wraps its network in an attribute of this name


def tied(module: nn.Module) -> list[tuple[str, ...]]:
    """Groups of names in the state of `module` that are one tensor: T5's table of tokens is also its encoder's."""
    names: dict[int, list[str]] = defaultdict(list)
    for name, tensor in module.state_dict(keep_vars=True).items():
        names[id(tensor)].append(name)
    return [tuple(group) for group in names.values()]


def sources(module: nn.Module, known: Collection[str]) -> dict[str, str]:
    """{name in the state: name in the weights}, given the names that the weights have.

    Files hold one of several tied names. A tensor that has none of its names there keeps its own.
    """
    found: dict[str, str] = {}
    for group in tied(module):
        plain = [name.removeprefix(INNER) for name in group]
        held = next((name for name in plain if name in known), None)
        found.update((name, held or own) for name, own in zip(group, plain, strict=True))
    return found


def computed_names(module: nn.Module) -> list[str]:
    """Buffers that no weight file holds (`persistent=False`), such as position tables."""
    state = module.state_dict(keep_vars=True)
    return [name for name, _ in module.named_buffers() if name not in state]


def computed(module: nn.Module, build: Callable[[], nn.Module], label: str) -> dict[str, torch.Tensor]:
    """Values of the computed buffers of `module` in their own dtype, from a second `build()` that holds no weights.

    Raises:
        UnsupportedError: a buffer has no values then either.
    """
    names = computed_names(module)
    if not names:
        return {}
    with torch.no_grad(), _EmptyOnMeta():
        buffers = dict(build().named_buffers())
    for name in names:
        if buffers[name].is_meta:
            raise UnsupportedError(f"{label}: the buffer {name} has no values that its config alone gives")
    return {name: buffers[name] for name in names}


class _EmptyOnMeta(TorchFunctionMode):
    """Tensors without values take no memory, as weights before they are loaded; what is computed has its values."""

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = dict(kwargs or {})
        if func is torch.empty:
            given["device"] = "meta"
        return func(*args, **given)
