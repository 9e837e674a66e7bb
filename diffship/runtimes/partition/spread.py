"""Spread: the weights of a loaded network, each on the devices whose stages use it and nowhere else, for a while."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Any

from diffship.core.errors import RunnerError, UnsupportedError
from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch, nn = lazy("torch"), lazy("torch.nn")


class Spread:
    """`whole` is a module on one device, its home. Stages that run elsewhere are moved there with `on`; `give_up` then
    frees at home what no stage at home uses, and `restore` brings it back, bit for bit.

    While weights are given up, the parameters of `whole` are the same objects and empty, so that the module keeps its
    device and dtype; reading its `state_dict` (which saving does) raises UnsupportedError. If it is moved or cast
    meanwhile, what comes back follows.
    """

    def __init__(self, whole: nn.Module) -> None:
        self._whole = whole
        self._copies: dict[str, dict[int, torch.Tensor]] = {}  # by device, then by id of the tensor at home
        self._away: dict[int, nn.Parameter] = {}
        self._guard: Any = None

    def on(self, stage: nn.Module, device: torch.device) -> nn.Module:
        """`stage`, whose tensors are those of `whole`, on another device; a tensor of two stages is there once."""
        held = self._copies.setdefault(str(device), {})
        for tensor in _tensors(stage):
            if id(tensor) not in held:
                held[id(tensor)] = _copied(tensor, device)
        return copy.deepcopy(stage, {**held})  # in place of these tensors a deep copy takes what it is told

    def give_up(self, kept: Iterable[nn.Module]) -> None:
        """Free at home every parameter that has a copy elsewhere and that none of the stages `kept` at home uses."""
        used = {id(tensor) for stage in kept for tensor in _tensors(stage)}
        lent = {key for held in self._copies.values() for key in held} - used
        # a quantized tensor of another class cannot be emptied in place: it stays, and is there twice
        away = [one for one in self._whole.parameters() if id(one) in lent and type(one.data) is torch.Tensor]
        if away:
            self._guard = self._whole.register_state_dict_pre_hook(_refuse)  # type: ignore[no-untyped-call]
        for parameter in away:
            self._away[id(parameter)] = parameter
            with _kind_of(parameter):
                parameter.data = torch.empty(0, dtype=parameter.dtype, device=parameter.device)

    def restore(self) -> None:
        """Bring back what was given up, one parameter after the other, and drop the copies. If it is stopped, it can be
        called again, and goes on.

        Raises:
            RunnerError: a device did not give them back, or home has no room; they are then still on that device.
        """
        faults = [fault for key in list(self._away) if (fault := self._return(key)) is not None]
        self._copies = {}
        if self._guard is not None:
            self._guard.remove()
            self._guard = None
        if faults:
            raise RunnerError(
                f"{len(faults)} tensors of the U-Net could not come back to {self._whole_device()}: {faults[0]}. They "
                "are on the device of their stage; free memory, and move the pipeline with pipeline.to(...)"
            )

    def _return(self, key: int) -> Exception | None:
        """Bring back one parameter; the fault if that fails, after which it lies where its stage had it."""
        parameter = self._away[key]
        held = next(held for held in self._copies.values() if key in held)
        fault: Exception | None = None
        with _kind_of(parameter):
            try:
                parameter.data = held[key].detach().to(parameter.device, parameter.dtype)
            except RuntimeError as raised:
                parameter.data, fault = held[key].detach(), raised
        del self._away[key]  # not before it is back: Ctrl-C may fall between any two lines
        for other in self._copies.values():
            other.pop(key, None)
        return fault

    def _whole_device(self) -> str:
        return str(next(self._whole.parameters()).device)


def _tensors(stage: nn.Module) -> Iterator[torch.Tensor]:
    return chain(stage.parameters(), stage.buffers())


def _copied(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    with _kind_of(tensor):
        made = tensor.detach().to(device)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _kind_of(tensor: torch.Tensor) -> Any:
    """Within it, tensors are made that can be trained if this one can: in a caller's inference_mode they could not."""
    return torch.inference_mode(tensor.is_inference())


def _refuse(*_: object) -> None:
    raise UnsupportedError(
        "the U-Net's weights are on the devices of its stages; leave the AsyncDenoiser to read or save them"
    )
