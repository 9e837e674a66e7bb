"""A stream with its memory and its execution contexts: what one call at a time runs in."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffship.core.errors import RunnerError
from diffship.runtimes.engines.gpu_tensor import GpuTensor
from diffship.runtimes.engines.tensorrt.constants import Constant, Constants
from diffship.runtimes.engines.tensorrt.device import Address, Device, Pinned
from diffship.runtimes.engines.tensorrt.plan import Plan
from diffship.runtimes.engines.tensorrt.values import from_native, item_bytes, to_native

KEPT_SHAPES = 8  # contexts, each with the graph of one combination of shapes
Shape = tuple[int, ...]


class Buffers:
    """Memory of one profile at its largest shapes, on the device and pinned on the host, allocated once.

    The addresses never change, so a captured graph holds as long as its shapes: that is worth more than the bytes,
    which are few (boundaries, not activations). constant: the number of the constant that lies in an input, 0 for none.
    """

    def __init__(self, sizes: Mapping[str, int], device: Device, owned: ExitStack) -> None:
        self.sizes = dict(sizes)
        self.device: dict[str, Address] = {}
        self.host: dict[str, Pinned] = {}
        self.constant = dict.fromkeys(sizes, 0)
        for name, size in sizes.items():
            self.device[name] = device.allocate(size)
            owned.callback(device.free, self.device[name])
            self.host[name] = device.pinned(size)
            owned.callback(device.free_pinned, self.host[name])


@dataclass
class Ready:
    """A context with its profile, shapes and addresses set. used: it has run, so that nothing is left to be set up."""

    context: Any
    buffers: Buffers
    outputs: dict[str, Shape]
    graph: Any = None
    used: bool = False


class Slot:
    """One call at a time; the pool sees to that."""

    def __init__(self, plan: Plan, device: Device, constants: Constants) -> None:
        self._plan = plan
        self._device = device
        self._constants = constants
        self._buffers: dict[int, Buffers] = {}
        self._ready: OrderedDict[tuple[Any, ...], Ready] = OrderedDict()
        with ExitStack() as owned:
            self._stream = device.stream()
            owned.callback(device.free_stream, self._stream)
            self._scratch = device.allocate(max(plan.scratch_bytes, 1))
            owned.callback(device.free, self._scratch)
            self._owned = owned.pop_all()

    def run(self, profile: int, feeds: Mapping[str, Any], outputs: Sequence[str]) -> list[np.ndarray]:
        """Copies in, one call, copies out; new arrays for `outputs`. After an error the slot is to be closed."""
        ready = self._called(profile, feeds)
        raw = [self._drain(ready, name) for name in outputs]
        self._device.synchronize(self._stream)
        return [
            from_native(view, self._plan.outputs[name], ready.outputs[name])
            for name, view in zip(outputs, raw, strict=True)
        ]

    def run_on_gpu(
        self, profile: int, feeds: Mapping[str, Any], outputs: Sequence[str], like: GpuTensor
    ) -> list[GpuTensor]:
        """As `run`, but outputs are new tensors beside `like`."""
        ready = self._called(profile, feeds)
        results = [self._left(ready, name, like) for name in outputs]
        self._device.synchronize(self._stream)
        return results

    def forget(self) -> None:
        """Drop contexts and graphs, which the next call makes anew; memory stays."""
        while self._ready:
            self._drop(self._ready.popitem()[1])

    def close(self) -> None:
        """Wait for what is under way and give everything back."""
        self._device.settle(self._stream)
        self.forget()
        self._owned.close()

    def _called(self, profile: int, feeds: Mapping[str, Any]) -> Ready:
        """The call is in the stream, with everything that it reads."""
        ready = self._prepared(profile, {name: _array(feed).shape for name, feed in feeds.items()})
        for name, feed in feeds.items():
            self._fill(ready.buffers, name, feed)
        self._enqueue(ready)
        return ready

    def _prepared(self, profile: int, shapes: Mapping[str, Shape]) -> Ready:
        key = (profile, *(shapes[name] for name in self._plan.inputs))
        if key in self._ready:
            self._ready.move_to_end(key)
            return self._ready[key]
        while len(self._ready) >= KEPT_SHAPES:
            self._drop(self._ready.popitem(last=False)[1])
        made = self._ready[key] = self._configured(profile, shapes)
        return made

    def _configured(self, profile: int, shapes: Mapping[str, Shape]) -> Ready:
        expect, context = self._plan.expect, self._plan.context()
        context.set_device_memory(self._scratch, max(self._plan.scratch_bytes, 1))
        expect(context.set_optimization_profile_async(profile, int(self._stream)), f"refuses profile {profile}")
        if profile not in self._buffers:
            self._buffers[profile] = self._allocated(context, profile)
        buffers = self._buffers[profile]
        outputs = self._shaped(context, shapes)
        for name, shape in outputs.items():
            if math.prod(shape) * item_bytes(self._plan.outputs[name]) > buffers.sizes[name]:
                raise RunnerError(f"output {name} {shape} is larger than at the largest inputs")
        for name, address in buffers.device.items():
            expect(context.set_tensor_address(name, address), f"refuses the memory of {name}")
        return Ready(context, buffers, outputs)

    def _allocated(self, context: Any, profile: int) -> Buffers:
        largest = {name: tuple(entry.profiles[profile]["max"]) for name, entry in self._plan.facts.inputs.items()}
        shapes = {**largest, **self._shaped(context, largest)}
        dtypes = {**self._plan.inputs, **self._plan.outputs}
        sizes = {name: math.prod(shape) * item_bytes(dtypes[name]) for name, shape in shapes.items()}
        return Buffers(sizes, self._device, self._owned)

    def _shaped(self, context: Any, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
        """Set the shapes of the inputs; those of the outputs."""
        for name, shape in shapes.items():
            self._plan.expect(context.set_input_shape(name, shape), f"refuses {name} {shape}")
        lacking = context.infer_shapes()
        if lacking:
            raise RunnerError(f"{self._plan.label} cannot tell the shapes of {', '.join(lacking)}")
        return {name: tuple(context.get_tensor_shape(name)) for name in self._plan.outputs}

    def _fill(self, buffers: Buffers, name: str, feed: Any) -> None:
        """Into the input's own memory: from the host, from a tensor, from a constant if another one lay there.

        Not bound in place: each prompt has other constants, and another address would mean another capture.
        """
        dtype, to = self._plan.inputs[name], buffers.device[name]
        if isinstance(feed, Constant):
            if buffers.constant[name] != feed.serial:
                source, size = self._constants.place(feed, dtype, self._stream)
                self._device.copy(to, source, size, self._stream)
                buffers.constant[name] = feed.serial
            return
        buffers.constant[name] = 0
        if isinstance(feed, GpuTensor):
            source = feed.address(dtype, int(self._stream))
            self._device.copy(to, source, feed.size * item_bytes(dtype), self._stream)
            return
        native = to_native(feed, dtype)
        pinned = buffers.host[name]
        pinned.view[: native.nbytes] = native.reshape(-1).view(np.uint8)
        self._device.upload(to, pinned.address, native.nbytes, self._stream)

    def _enqueue(self, ready: Ready) -> None:
        """The first call of new shapes runs as it is: it ends what setting them began, which must not be captured."""
        if self._plan.capture and ready.used and ready.graph is None:
            ready.graph = self._captured(ready.context)
        if ready.graph is not None:
            self._device.launch(ready.graph, self._stream)
        else:
            self._plan.expect(ready.context.execute_async_v3(int(self._stream)), "stopped")
        ready.used = True

    def _captured(self, context: Any) -> Any:
        """The graph of one call, or None for good if it cannot be captured: then calls go on without one."""
        asked = getattr(context, "is_stream_capturable", None)
        if asked is not None and not asked(int(self._stream)):
            self._plan.capture = False
            return None
        self._device.begin_capture(self._stream)
        accepted = False
        try:
            accepted = context.execute_async_v3(int(self._stream))
        finally:
            graph = self._device.end_capture(self._stream)
            if graph is not None and not accepted:
                self._device.free_graph(graph)
                graph = None
        if graph is None:
            self._plan.capture = False
        return graph

    def _drain(self, ready: Ready, name: str) -> np.ndarray:
        """Put the copy of an output into the stream; a view of where it will lie."""
        size = math.prod(ready.outputs[name]) * item_bytes(self._plan.outputs[name])
        pinned = ready.buffers.host[name]
        self._device.download(pinned.address, ready.buffers.device[name], size, self._stream)
        return pinned.view[:size]

    def _left(self, ready: Ready, name: str, like: GpuTensor) -> GpuTensor:
        """A new tensor beside `like`, into which the stream copies an output."""
        dtype = self._plan.outputs[name]
        made = like.empty(ready.outputs[name], dtype)
        to = made.address(dtype, int(self._stream))  # the memory may be of a tensor that its library still reads
        self._device.copy(to, ready.buffers.device[name], made.size * item_bytes(dtype), self._stream)
        return made

    def _drop(self, ready: Ready) -> None:
        if ready.graph is not None:
            self._device.free_graph(ready.graph)
        ready.context = None


def _array(feed: Any) -> Any:
    return feed.array if isinstance(feed, Constant) else feed
