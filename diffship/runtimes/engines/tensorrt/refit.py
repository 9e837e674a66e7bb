"""Put other weights into a loaded engine: a fine-tune or a LoRA without a build, or the weights of a stripped plan."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffship.core.dtype import FLOATS, TensorMeta, from_float32, stored, to_float32
from diffship.core.errors import ConfigError, RunnerError, UnsupportedError
from diffship.core.strict import unknown
from diffship.runtimes.engines.tensorrt.plan import Plan
from diffship.runtimes.engines.tensorrt.values import NATIVE
from diffship.targets.tensorrt.libraries import journal


class Refit:
    """New weights, checked whole when this is made; `apply` changes the engine."""

    def __init__(self, plan: Plan, weights: Mapping[str, np.ndarray]) -> None:
        """Nothing is changed here.

        Raises:
            UnsupportedError: the plan was not built for it.
            RunnerError: an unknown name, a missing one, a wrong shape, or values that do not fit the plan's type.
        """
        if not plan.facts.refit:
            raise UnsupportedError(
                "this plan's weights are fixed. Run: diffship export SOURCE --to tensorrt --refit -o DIR"
            )
        self._plan = plan
        self._refitter = plan.trt.Refitter(plan.engine, journal(plan.trt))
        legal = set(self._refitter.get_all_weights())
        if not weights:
            raise RunnerError(f"no weights are given; the plan takes {len(legal)}: {', '.join(sorted(legal))[:200]}")
        for name in weights:
            if name not in legal:
                raise RunnerError(unknown("weight", name, legal))
        # TensorRT reads the arrays when they are applied: they must live as long
        self._arrays = {name: self._native(name, array) for name, array in weights.items()}
        for name, array in self._arrays.items():
            self._set(name, array)
        missing = sorted(self._refitter.get_missing_weights())
        if missing:
            shown = ", ".join(missing)[:200]
            raise RunnerError(f"{len(missing)} weights are missing that go with those given: {shown}")

    def apply(self) -> None:
        """No call may be under way. On RunnerError the engine holds some weights of either kind, and is lost."""
        plan = self._plan
        plan.expect(self._refitter.refit_cuda_engine(), "did not take all weights; open the part again")

    def _native(self, name: str, array: np.ndarray) -> np.ndarray:
        """`array` in the plan's type: rounded from another float type, taken as it is from its own."""
        prototype = self._refitter.get_weights_prototype(name)
        dtype = NATIVE.get(prototype.dtype.name)
        if dtype is None:
            raise UnsupportedError(f"weight {name} is {prototype.dtype.name}; a refit takes {', '.join(NATIVE)}")
        told = self._plan.facts.weights.get(name)
        fits = array.shape == told.shape if told is not None else array.size == prototype.size
        if not fits:
            legal = told.shape if told is not None else f"{prototype.size} values"
            raise RunnerError(f"weight {name} has shape {array.shape}; the plan takes {legal}")
        try:
            return np.ascontiguousarray(_cast(array, dtype))
        except ConfigError as fault:
            raise RunnerError(f"weight {name}: {fault}") from None

    def _set(self, name: str, array: np.ndarray) -> None:
        code = self._refitter.get_weights_prototype(name).dtype
        weights = self._plan.trt.Weights(code, array.ctypes.data, array.size)
        self._plan.expect(self._refitter.set_named_weights(name, weights), f"refuses weight {name}")


def _cast(array: np.ndarray, dtype: str) -> np.ndarray:
    meta = TensorMeta(dtype, array.shape)
    if array.dtype == meta.storage or array.dtype.name == dtype or array.dtype.name not in FLOATS:
        return stored(array, meta)
    return from_float32(to_float32(array), dtype)
