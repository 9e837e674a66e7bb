"""One shell for every engine: a Part's specs and native bindings in front of a bare session."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, TypeAlias, cast

import numpy as np

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError, RunnerError, UnsupportedError
from diffship.core.manifest import Binding, Part
from diffship.core.runner import Array, Handle
from diffship.core.spec import TensorSpec
from diffship.core.strict import unknown
from diffship.runtimes.engines.arrays import as_dtype, describe_nonfinite, giver, host, relayout, spread
from diffship.runtimes.engines.engine import Session, choose_engine, make_engine
from diffship.runtimes.engines.gpu_tensor import GpuSession, GpuTensor, on_gpu

Seen: TypeAlias = "np.ndarray | GpuTensor"


def open_runner(bundle: Bundle, part: str | Part, engine: str | None = None, **options: Any) -> PartRunner:
    """A part of an opened bundle in an engine (default: the first installed one that reads the bundle's target).

    Options are the fields of the engine's class. The result is a Runner and a context manager.

    Raises:
        UnsupportedError: the engine does not read this target, or is not installed.
        RunnerError: the engine refuses the file.
        BundleError: the file's inputs are not those of the manifest.
    """
    entry = bundle.part(part) if isinstance(part, str) else part
    target = bundle.manifest.target
    chosen = make_engine(choose_engine(target, engine), options)
    session = chosen.open([bundle.file(name) for name in entry.files])
    return PartRunner(entry, session, steps_of(bundle, entry))


def steps_of(bundle: Bundle, part: Part) -> dict[str, int]:
    """{axis: step} for axes whose size must be a multiple of `step`: the latent sides of a U-Net, which halves them on
    every level."""
    family, staging = bundle.manifest.family, bundle.manifest.staging
    names = (family.kind.denoiser,) if staging is None else staging.stages
    return family.kind.axis_steps(family) if part.name in names else {}


class Kept:
    """A constant of one runner: in host memory, and on the device in every dtype that a feed has asked for."""

    def __init__(self, owner: PartRunner, array: np.ndarray) -> None:
        self.owner = owner
        self.array = array
        self.native: dict[tuple[str, str], Any] = {}


class PartRunner:
    """A Runner over a Session: checks, casts, renames and reshapes on the way in and out; see `Runner`."""

    def __init__(self, part: Part, session: Session, steps: Mapping[str, int] | None = None) -> None:
        self.name = part.name
        self.inputs: tuple[TensorSpec, ...] = part.inputs
        self.outputs: tuple[TensorSpec, ...] = part.outputs
        self._steps = dict(steps or {})
        self._session: Session | None = session
        self._lock = threading.Lock()
        bindings = {binding.canonical: binding for binding in part.bindings}
        self._specs = {spec.name: spec for spec in part.inputs}
        self._bound = {spec.name: _binding(spec, bindings) for spec in (*part.inputs, *part.outputs)}
        self._as_is = all(self._bound[spec.name].shape == spec.shape for spec in (*part.inputs, *part.outputs))
        try:
            self._check_session(session)
        except BundleError:
            self.close()
            raise

    def __enter__(self) -> PartRunner:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def run(self, feeds: Mapping[str, Array | Handle]) -> dict[str, Array]:
        """One call; see `Runner.run`. Outputs are finite, or RunnerError names the part and the output.

        A tensor that lies on the GPU of the engine does not leave it if the engine can take it there (TensorRT);
        then outputs are tensors there, too.
        """
        session = self._open_session()
        self._check_names(feeds)
        arrays = {name: self._seen(session, name, feed) for name, feed in feeds.items()}
        sizes = self._bind(arrays)
        natives = [self._bound[spec.name].native for spec in self.outputs]
        native = {
            self._bound[name].native: self._native(session, name, feeds[name], arrays[name], sizes) for name in feeds
        }
        like = next((array for array in arrays.values() if isinstance(array, GpuTensor)), None)
        if like is None:
            return self._give(session.run(native, natives), feeds, arrays)
        found = cast(GpuSession, session).run_on_gpu(native, natives, like)
        return {
            spec.name: self._finite(spec, result.as_dtype(spec.name, spec.dtype), arrays).tensor
            for spec, result in zip(self.outputs, found, strict=True)
        }

    def put(self, array: Array) -> Handle:
        """Keep a copy of `array` on the device; it may stand for a feed of this runner, in any thread."""
        self._open_session()
        copy = np.array(host("(constant)", array), order="C")
        return Handle(Kept(self, copy), copy.shape)

    def refit(self, weights: Mapping[str, np.ndarray]) -> None:
        """Replace weights by the engine's names, between two calls; other threads wait.

        Raises:
            UnsupportedError: the engine cannot, or its file was not made for it (TensorRT: `--refit`).
            RunnerError: a weight is missing, misshapen or not finite; nothing has changed then.
        """
        refit = getattr(self._open_session(), "refit", None)
        if refit is None:
            raise UnsupportedError(f"part {self.name}: this engine keeps the weights of its file; open another bundle")
        refit(weights)

    def close(self) -> None:
        """Release the engine; calls that are under way in other threads finish first. Closing twice is fine."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close()

    def _open_session(self) -> Session:
        session = self._session
        if session is None:
            raise RunnerError(f"part {self.name}: the runner is closed; open it again")
        return session

    def _check_session(self, session: Session) -> None:
        for side, specs in ((session.inputs, self.inputs), (session.outputs, self.outputs)):
            for spec in specs:
                native = self._bound[spec.name].native
                if native not in side:
                    raise BundleError(f"part {self.name}: the model has no {native!r}; it has {', '.join(side)[:200]}")
        extra = set(session.inputs) - {self._bound[spec.name].native for spec in self.inputs}
        if extra:
            raise BundleError(f"part {self.name}: the model wants {sorted(extra)}, which the manifest does not list")

    def _check_names(self, feeds: Mapping[str, object]) -> None:
        missing = [name for name in self._specs if name not in feeds]
        if missing:
            raise RunnerError(f"part {self.name}: missing feed {', '.join(missing)}; it takes {', '.join(self._specs)}")
        for name in feeds:
            if name not in self._specs:
                raise RunnerError(f"part {self.name}: {unknown('feed', name, self._specs)}")

    def _seen(self, session: Session, name: str, feed: Array | Handle) -> Seen:
        gpu = getattr(session, "gpu", None)
        if gpu is not None and self._as_is and not isinstance(feed, Handle) and on_gpu(feed, gpu):
            return GpuTensor(feed)
        return self._host(name, feed)

    def _host(self, name: str, feed: Array | Handle) -> np.ndarray:
        if not isinstance(feed, Handle):
            return host(name, feed)
        kept = feed.value
        if not isinstance(kept, Kept) or kept.owner is not self:
            raise RunnerError(f"feed {name} is a handle of another runner; use put() of the {self.name} runner")
        return kept.array

    def _bind(self, arrays: Mapping[str, Seen]) -> dict[str, int]:
        sizes: dict[str, int] = {}
        single = []
        for name, array in arrays.items():
            if len(self._specs[name].shape) == 1 and array.size == 1:
                single.append(name)
            else:
                sizes = self._specs[name].bind(array.shape, sizes)
        for name in single:
            if not sizes.keys() >= set(self._specs[name].axes()):
                sizes = self._specs[name].bind((1,), sizes)
        for axis, size in sizes.items():
            self._check_axis(axis, size)
        return sizes

    def _check_axis(self, axis: str, size: int) -> None:
        if size < 1:
            raise RunnerError(f"part {self.name}: axis {axis} is {size}; it must be at least 1")
        step = self._steps.get(axis, 1)
        if size % step:
            below = max(size // step * step, step)
            raise UnsupportedError(
                f"part {self.name}: {axis} is {size}; it takes multiples of {step}: the nearest are "
                f"{below} and {below + step}"
            )

    def _native(self, session: Session, name: str, feed: Array | Handle, array: Seen, sizes: Mapping[str, int]) -> Any:
        spec, binding = self._specs[name], self._bound[name]
        if isinstance(array, GpuTensor):
            return self._placed(array, spec, sizes).as_dtype(name, cast(GpuSession, session).takes[binding.native])
        dtype = session.inputs[binding.native]
        whole = spread(spec, array, sizes)
        if not isinstance(feed, Handle):
            return as_dtype(name, relayout(whole, spec.shape, binding.shape), dtype)
        key = (name, f"{dtype}{whole.shape}")
        kept = feed.value.native
        if key not in kept:
            kept[key] = session.keep(as_dtype(name, relayout(whole, spec.shape, binding.shape), dtype))
        return kept[key]

    def _placed(self, array: GpuTensor, spec: TensorSpec, sizes: Mapping[str, int]) -> GpuTensor:
        """One value for the whole batch as one value per sample, as `spread` does it."""
        return array.spread(spec.resolve(sizes)) if len(spec.shape) == 1 and array.size == 1 else array

    def _give(
        self, results: Sequence[np.ndarray], feeds: Mapping[str, Array | Handle], arrays: Mapping[str, Seen]
    ) -> dict[str, Array]:
        give = giver(feeds.values())
        given = {}
        for spec, result in zip(self.outputs, results, strict=True):
            self._check_finite(spec, result, arrays)
            shaped = relayout(result, self._bound[spec.name].shape, spec.shape)
            given[spec.name] = give(shaped.astype(spec.dtype, copy=False))
        return given

    def _finite(self, spec: TensorSpec, result: GpuTensor, arrays: Mapping[str, Seen]) -> GpuTensor:
        if not result.finite():
            self._check_finite(spec, host(spec.name, result.tensor), arrays)
        return result

    def _check_finite(self, spec: TensorSpec, result: np.ndarray, arrays: Mapping[str, Seen]) -> None:
        bad = describe_nonfinite(result)
        if bad:
            raise RunnerError(f"part {self.name}: output {spec.name} has {bad}{self._blame(arrays)}")

    def _blame(self, arrays: Mapping[str, Seen]) -> str:
        plain = {  # numpy has no bfloat16
            name: host(name, a.as_dtype(name, "float32").tensor) if isinstance(a, GpuTensor) else a
            for name, a in arrays.items()
        }
        found = {name: describe_nonfinite(array) for name, array in plain.items()}
        named = [f"{name} had {bad}" for name, bad in found.items() if bad]
        return f"; feed {', '.join(named)}" if named else "; all feeds were finite: weights or precision are at fault"


def _binding(spec: TensorSpec, bindings: Mapping[str, Binding]) -> Binding:
    return bindings.get(spec.name) or Binding(spec.name, spec.name, spec.dtype, spec.shape)
