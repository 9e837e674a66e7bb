"""The checkpoint of a training run: `state.safetensors` with weights, their averages and AdamW's moments."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.errors import SourceError
from diffship.core.lazy import lazy
from diffship.training.saving import reading, replace_tensors, save_tensors

if TYPE_CHECKING:
    import torch
    from safetensors import torch as tensor_file
    from torch import Tensor, nn
else:
    torch, tensor_file = lazy("torch"), lazy("safetensors.torch")

REMEDY = "Remove it, and the same command trains from the beginning"


def reached(state: Path) -> int:
    """The step of a checkpoint, 0 if there is none. Raises SourceError: it is damaged."""
    if not state.exists():
        return 0
    with reading(state, REMEDY) as file:
        return int(_about(file, state)["step"])


def load_average(state: Path, modules: Mapping[str, nn.Module]) -> int:
    """Fill modules with the averaged weights of a checkpoint; returns its step. Raises SourceError: it is damaged."""
    with reading(state, REMEDY) as file, torch.no_grad():
        for name, value in parameters_of(modules).items():
            value.copy_(_tensor(file, state, f"average/{name}", value.shape))
        return int(_about(file, state)["step"])


def save_start(state: Path, modules: Mapping[str, nn.Module]) -> None:
    """A checkpoint of step 0 that holds the modules as they are, without moments."""
    parameters = {name: value.detach() for name, value in parameters_of(modules).items()}
    state.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"{kind}/{name}": value.clone() for kind in ("live", "average") for name, value in parameters.items()}
    save_tensors(tensor_file.save_file, tensors, state, {"state": json.dumps({"step": 0})})


def parameters_of(modules: Mapping[str, nn.Module]) -> dict[str, nn.Parameter]:
    """{module/name: weight} of all that is trained, in a fixed order."""
    return {
        f"{name}/{key}": value
        for name, module in modules.items()
        for key, value in module.named_parameters()
        if value.requires_grad
    }


def write_state(
    state: Path, about: Mapping[str, Any], parameters: Mapping[str, Any], average: Mapping[str, Any], optimizer: Any
) -> None:
    """Weights, averages and moments, with what `about` notes, in place of the checkpoint before."""
    tensors = {f"live/{name}": value.detach().contiguous() for name, value in parameters.items()}
    tensors |= {f"average/{name}": value.contiguous() for name, value in average.items()}
    for name, value in parameters.items():
        for key, moment in optimizer.state.get(value, {}).items():
            tensors[f"{key}/{name}"] = moment.contiguous()
    replace_tensors(tensors, state, {"state": json.dumps(about)})


def read_state(
    state: Path, parameters: Mapping[str, Any], average: Mapping[str, Any], optimizer: Any
) -> dict[str, Any]:
    """Fill weights, averages and moments; returns what else the checkpoint notes. Raises SourceError: it is damaged."""
    with reading(state, REMEDY) as file, torch.no_grad():
        keys = set(file.keys())
        for name, value in parameters.items():
            value.copy_(_tensor(file, state, f"live/{name}", value.shape))
            average[name].copy_(_tensor(file, state, f"average/{name}", value.shape))
            for key, shape in (("step", ()), ("exp_avg", value.shape), ("exp_avg_sq", value.shape)):
                if f"{key}/{name}" in keys:
                    held = _tensor(file, state, f"{key}/{name}", shape).to(value.device)
                    # fused AdamW walks through memory: moments must lie as their weight does (channels last, say)
                    optimizer.state[value][key] = held if key == "step" else torch.empty_like(value).copy_(held)
        return _about(file, state)


def _about(file: Any, state: Path) -> dict[str, Any]:
    """What a checkpoint notes beside its tensors: the step, and the scaler of a run in fp16."""
    try:
        found: dict[str, Any] = json.loads(file.metadata()["state"])
        int(found["step"])
        return found
    except (TypeError, KeyError, ValueError):
        raise SourceError(f"{state} is no checkpoint of a training run: its header notes no step") from None


def _tensor(file: Any, state: Path, name: str, shape: Sequence[int]) -> Tensor:
    if name not in file.keys():
        raise SourceError(f"{state} has no tensor {name}: it is of another run")
    found: Tensor = file.get_tensor(name)
    if tuple(found.shape) != tuple(shape):
        raise SourceError(f"{state}: {name} has shape {tuple(found.shape)}, this run needs {tuple(shape)}")
    return found
