"""An opened plan: threads share it, a limited number of calls run at once, constants stay on the device, weights can
change."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import numpy as np

from diffship.core.errors import DiffshipError, RunnerError
from diffship.runtimes.engines.engine import first_line
from diffship.runtimes.engines.gpu_tensor import GpuTensor
from diffship.runtimes.engines.tensorrt.constants import Constant, Constants
from diffship.runtimes.engines.tensorrt.device import Device
from diffship.runtimes.engines.tensorrt.plan import Plan
from diffship.runtimes.engines.tensorrt.pool import Pool
from diffship.runtimes.engines.tensorrt.profiles import choose_profile
from diffship.runtimes.engines.tensorrt.refit import Refit
from diffship.runtimes.engines.tensorrt.slot import Slot
from diffship.runtimes.engines.tensorrt.values import spoken_dtype

Found = TypeVar("Found")
_CLOSED = "the TensorRT model is closed; open it again"


class TensorRtSession:
    """A Session over a Plan. `inputs` and `outputs` say float32 if the plan has bfloat16; `takes` says that."""

    def __init__(self, plan: Plan, device: Device, contexts: int, wait_seconds: float) -> None:
        self.inputs: Mapping[str, str] = {name: spoken_dtype(dtype) for name, dtype in plan.inputs.items()}
        self.outputs: Mapping[str, str] = {name: spoken_dtype(dtype) for name, dtype in plan.outputs.items()}
        self.takes: Mapping[str, str] = plan.inputs
        self.gpu = device.index
        self._plan = plan
        self._device = device
        self._constants = Constants(device)
        self._pool: Pool[Slot] = Pool(lambda: Slot(plan, device, self._constants), contexts, wait_seconds)
        self._first = threading.Event()
        self._closing = threading.Lock()

    def run(self, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        """New arrays for `outputs`, in that order; a feed is a contiguous array or what `keep` returned.

        Raises:
            UnsupportedError: the plan has no profile for these shapes; the legal ranges are named.
            BusyError: all contexts stayed busy.
            RunnerError: the engine or the GPU stopped; the next call starts with a fresh context.
        """
        return self._called(feeds, lambda slot, profile: slot.run(profile, feeds, outputs))

    def run_on_gpu(self, feeds: Mapping[str, Any], outputs: Sequence[str], like: GpuTensor) -> list[GpuTensor]:
        """As `run`; a feed may be a GpuTensor of `takes` too, and outputs are new tensors beside `like`."""
        return self._called(feeds, lambda slot, profile: slot.run_on_gpu(profile, feeds, outputs, like))

    def _called(self, feeds: Mapping[str, Any], call: Callable[[Slot, int], list[Found]]) -> list[Found]:
        self._device.use()
        self._constants.sweep()
        shapes = {name: (feed.array if isinstance(feed, Constant) else feed).shape for name, feed in feeds.items()}
        profile = choose_profile(self._plan.facts.inputs, shapes)
        try:
            with self._pool.borrow() as slot:
                results = call(slot, profile)
            if not self._first.is_set():
                self._first.set()
                self._plan.save_kernels()
            return results
        except DiffshipError:
            raise
        except Exception as fault:
            raise RunnerError(f"{self._plan.label} stopped: {first_line(fault)}") from None

    def keep(self, array: np.ndarray) -> Constant:
        """A constant: copied to the device when it is first fed, and given back when nobody holds it any more."""
        return self._constants.keep(array)

    def refit(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace weights by name, between two calls; other threads wait. Graphs are captured anew.

        Raises:
            UnsupportedError, RunnerError: an unknown, missing or misshapen weight; nothing has changed then.
            RunnerError: the engine took some weights only; the session is then closed to calls.
        """
        self._device.use()
        with self._pool.alone() as slots:
            refit = Refit(self._plan, weights)
            for slot in slots:
                slot.forget()
            try:
                refit.apply()
            except BaseException:
                self._pool.shut("a refit failed half-way; open the part again")
                raise

    def close(self) -> None:
        """Wait for the calls under way and give everything back. Closing twice is fine."""
        with self._closing:
            if self._plan.engine is None:
                return
            with suppress(RunnerError):  # of a GPU that is lost; what can be given back still is
                self._device.use()
            self._pool.close(_CLOSED)
            with suppress(Exception):
                self._plan.save_kernels()
            self._constants.close()
            self._plan.close()
