"""TorchRunner: a part on torch, behind the runner protocol of every engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from diffship.core.errors import RunnerError
from diffship.core.lazy import lazy
from diffship.core.runner import Array, Handle
from diffship.core.spec import TensorSpec

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.utils import dlpack
else:
    torch, dlpack = lazy("torch"), lazy("torch.utils.dlpack")


class TorchRunner:
    """Feeds by canonical name, numpy or torch or dlpack; numpy comes back if no feed was a tensor of another kind.

    A feed of one value per sample (`timestep`) may have a single one, with or without an axis.
    """

    def __init__(
        self,
        module: nn.Module,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.device = device
        self.dtype = dtype or torch.float32
        self._module: nn.Module | None = module

    def run(self, feeds: Mapping[str, Array | Handle]) -> dict[str, Array]:
        module = self._module
        if module is None:
            raise RunnerError("this runner was closed; load the part again")
        self._check_names(feeds)
        tensors = [self._tensor(spec, feeds[spec.name]) for spec in self.inputs]
        check_shapes(self.inputs, [tuple(tensor.shape) for tensor in tensors])
        with torch.inference_mode():
            results = module(*tensors)
        values = [feed for feed in feeds.values() if not isinstance(feed, Handle)]
        as_numpy = all(_is_numpy(value) for value in values)
        return {spec.name: _out(result, as_numpy) for spec, result in zip(self.outputs, results, strict=True)}

    def put(self, array: Array) -> Handle:
        tensor = _as_torch(array).to(self.device)
        return Handle(tensor, tuple(tensor.shape))

    def close(self) -> None:
        self._module = None

    def __enter__(self) -> TorchRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_names(self, feeds: Mapping[str, Array | Handle]) -> None:
        expected = [spec.name for spec in self.inputs]
        missing = [name for name in expected if name not in feeds]
        unknown = [name for name in feeds if name not in expected]
        if missing or unknown:
            faults = [f"missing {', '.join(missing)}"] if missing else []
            faults += [f"unknown {', '.join(unknown)}"] if unknown else []
            raise RunnerError(f"feeds: {'; '.join(faults)}. Expected: {', '.join(expected)}")

    def _tensor(self, spec: TensorSpec, feed: Array | Handle) -> torch.Tensor:
        tensor = _as_torch(feed.value if isinstance(feed, Handle) else feed)
        if not spec.is_float:
            if tensor.is_floating_point():
                raise RunnerError(f"tensor {spec.name}: got {tensor.dtype}, expected {spec.dtype}")
            return tensor.to(self.device, getattr(torch, spec.dtype))
        return tensor.to(self.device, torch.float32 if spec.exact else self.dtype)


def check_shapes(specs: tuple[TensorSpec, ...], shapes: list[tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the named axes; raises RunnerError if a feed does not fit. One value for all samples always fits."""
    sizes: dict[str, int] = {}
    for spec, shape in zip(specs, shapes, strict=True):
        if spec.per_sample and shape in ((), (1,)):
            continue
        sizes = spec.bind(shape, sizes)
    return sizes


def _as_torch(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    if _is_numpy(value):
        array = np.asarray(value)
        return torch.from_numpy(array if array.flags.writeable and array.flags.c_contiguous else array.copy())
    return dlpack.from_dlpack(value)


def _is_numpy(value: Any) -> bool:
    return isinstance(value, (np.ndarray, np.generic, float, int, list))


def _out(tensor: torch.Tensor, as_numpy: bool) -> Array:
    if not as_numpy:
        return tensor
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
