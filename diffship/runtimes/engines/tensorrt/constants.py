"""Constants of a session on the device: copied there once, given back when nobody holds them any more."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections import deque
from contextlib import suppress
from typing import Any

import numpy as np

from diffship.core.errors import RunnerError
from diffship.runtimes.engines.tensorrt.device import Address, Device
from diffship.runtimes.engines.tensorrt.values import item_bytes, to_native


class Constant:
    """What `keep` gives: a host array, and the number under which its copy on the device is known."""

    __slots__ = ("__weakref__", "array", "owner", "serial")

    def __init__(self, owner: Constants, array: np.ndarray, serial: int) -> None:
        self.owner = owner
        self.array = array
        self.serial = serial


class Constants:
    """All constants of one session.

    The garbage collector may drop a Constant at any moment, in the middle of a capture too, where freeing memory is not
    allowed: then it is only noted, and `sweep` frees it between two calls.
    """

    def __init__(self, device: Device) -> None:
        self._device = device
        self._serials = itertools.count(1)
        self._addresses: dict[tuple[int, str], Address] = {}
        self._abandoned: deque[int] = deque()
        self._lock = threading.Lock()

    def keep(self, array: np.ndarray) -> Constant:
        constant = Constant(self, array, next(self._serials))
        weakref.finalize(constant, self._abandoned.append, constant.serial).atexit = False
        return constant

    def place(self, constant: Constant, dtype: str, stream: Any) -> tuple[Address, int]:
        """(address, bytes) of the constant as `dtype`; the first time it is copied there, through `stream`."""
        if constant.owner is not self:
            raise RunnerError("a constant of another session was fed; keep it in the session that runs it")
        with self._lock:
            address = self._addresses.get((constant.serial, dtype))
            if address is None:
                address = self._uploaded(to_native(constant.array, dtype), stream)
                self._addresses[constant.serial, dtype] = address
        return address, constant.array.size * item_bytes(dtype)

    def sweep(self) -> None:
        """Free what nobody holds any more."""
        with suppress(IndexError):
            while True:
                self._free(self._abandoned.popleft())

    def close(self) -> None:
        for serial in {serial for serial, _ in self._addresses}:
            self._free(serial)

    def _uploaded(self, native: np.ndarray, stream: Any) -> Address:
        address = self._device.allocate(native.nbytes)
        try:
            self._device.upload(address, native.ctypes.data, native.nbytes, stream)
            self._device.synchronize(stream)  # other streams read it next
        except RunnerError:
            self._device.settle(stream)  # a copy into it may be under way
            self._device.free(address)
            raise
        return address

    def _free(self, serial: int) -> None:
        with self._lock:
            keys = [key for key in self._addresses if key[0] == serial]
            addresses = [self._addresses.pop(key) for key in keys]
        for address in addresses:
            self._device.free(address)
