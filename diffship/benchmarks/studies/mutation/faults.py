"""Faults of one module, made with hooks and attributes, so that its path and its place in the graph stay.

Each takes the module and a variant. Hooks get the module that they run in as an argument: exporters copy modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.lazy import lazy, lazy_base

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn import Module, functional
else:
    torch, nn, functional = lazy("torch"), lazy("torch.nn"), lazy("torch.nn.functional")
    Module = lazy_base("torch.nn", "Module")

_EPSILON = 1e-2


def times(factor: float, module: nn.Module, variant: str) -> object:
    """The output times `factor`; for "input", the module's input is added, so that `factor` 0 leaves it alone."""
    return module.register_forward_hook(partial(_scaled_output, factor, variant), with_kwargs=True)


def _scaled_output(factor: float, variant: str, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    first = output[0] if isinstance(output, tuple) else output
    kept = first * factor  # what is inside stays in the graph: the proof must see its figures, not its absence
    if variant == "input":
        kept = kept + (args[0] if args else kwargs["hidden_states"])
    return (kept, *output[1:]) if isinstance(output, tuple) else kept


def scaled(module: nn.Module, variant: str) -> object:
    return module.register_forward_hook(partial(_scaled_output, float(variant), ""), with_kwargs=True)


def drop_skip(module: nn.Module, variant: str) -> object:
    return module.register_forward_pre_hook(partial(_without_last, int(variant)))


def _without_last(channels: int, module: nn.Module, args: Any) -> Any:
    hidden, skip = args[0][:, :-channels], args[0][:, -channels:]
    return (torch.cat([hidden, skip * 0.0], dim=1), *args[1:])


def exchange_skips(module: nn.Module, variant: str) -> object:
    first, second = (int(index) for index in variant.split(","))
    return module.register_forward_pre_hook(partial(_exchanged, first, second), with_kwargs=True)


def _exchanged(first: int, second: int, module: nn.Module, args: Any, kwargs: Any) -> Any:
    given = list(kwargs["res_hidden_states_tuple"])
    given[first], given[second] = given[second], given[first]
    return args, {**kwargs, "res_hidden_states_tuple": tuple(given)}


def columns(module: nn.Module, variant: str) -> object:
    return module.register_forward_hook(_as_columns)


def _as_columns(module: nn.Module, args: Any, output: torch.Tensor) -> torch.Tensor:
    batch, channels, height, width = output.shape
    return output.reshape(batch, channels, width, height).transpose(2, 3)


def flip_waves(module: Any, variant: str) -> None:
    module.flip_sin_to_cos = not module.flip_sin_to_cos


def epsilon(module: Any, variant: str) -> None:
    module.eps = _EPSILON


def other_groups(module: Any, variant: str) -> None:
    module.num_groups = int(variant)


def not_causal(module: nn.Module, variant: str) -> object:
    return module.register_forward_pre_hook(_with_all_keys, with_kwargs=True)


def _with_all_keys(module: nn.Module, args: Any, kwargs: Any) -> Any:
    return args, {**kwargs, "is_causal": False}


def _tanh(gate: torch.Tensor) -> torch.Tensor:
    return functional.gelu(gate, approximate="tanh")


def _erf(gate: torch.Tensor) -> torch.Tensor:
    return functional.gelu(gate)


def _quick(gate: torch.Tensor) -> torch.Tensor:
    return gate * torch.sigmoid(1.702 * gate)


FORMS: Mapping[str, Callable[[torch.Tensor], torch.Tensor]] = {"tanh": _tanh, "quick": _quick, "erf": _erf}


def other_gelu(module: Any, variant: str) -> None:
    if type(module).__name__ == "GEGLU":
        module.gelu = FORMS[variant]
    else:
        module.activation_fn = _Gelu(variant)


class _Gelu(Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, gate: torch.Tensor) -> torch.Tensor:
        return FORMS[self.form](gate)


def ignore_input(module: nn.Module, variant: str) -> object:
    index, _, start = variant.partition(",")
    return module.register_forward_pre_hook(partial(_zero_input, int(index), int(start or 0)))


def _zero_input(index: int, start: int, module: nn.Module, args: Any) -> Any:
    given = args[index]
    spoilt = given * 0.0 if not start else torch.cat([given[..., :start], given[..., start:] * 0.0], dim=-1)
    return (*args[:index], spoilt, *args[index + 1 :])
