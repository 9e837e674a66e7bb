"""The reference engine: diffusers folders and other sources in torch. The one file here that knows torch, `models`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

from diffship.core.errors import MissingExtra, UnsupportedError
from diffship.core.lazy import need
from diffship.core.load_options import PREDICTIONS, LoadOptions
from diffship.core.strict import bounded, bounds, choices
from diffship.runtimes.engines.engine import Probe, Session, first_line, installed, package_version
from diffship.sampling.model import Model


@dataclass(frozen=True)
@bounded
class TorchRunner:
    """Options of torch. `threads`: 0 leaves torch's own choice, which holds for the whole process. `base` supplies the
    parts that a source lacks; the last three say how it is read (`core.load_options.LoadOptions`)."""

    name: ClassVar[str] = "torch"
    extra: ClassVar[str] = "torch"
    targets: ClassVar[frozenset[str]] = frozenset({"diffusers"})

    device: str = field(default="cpu", metadata=choices("cpu", "cuda", "mps"))
    threads: int = field(default=0, metadata=bounds(0, 1024))
    base: str | None = None
    vae: str | None = None
    ema: bool = False
    prediction: str | None = field(default=None, metadata=choices(*PREDICTIONS))

    def open(self, files: Sequence[Path]) -> Session:
        raise UnsupportedError("engine torch opens a diffusers folder as a whole; pass that folder to open_model")

    def open_model(self, source: str, change: Callable[[Any], Any] | None = None) -> Model:
        """A diffusers folder, a checkpoint in one file, a hub id or `arch:NAME` as a Model; `change` makes another
        pipeline of its pipeline.

        Raises:
            MissingExtra: torch or diffusers is not installed.
            UnsupportedError: this torch has no such device.
            SourceError: the source cannot be read.
        """
        from diffship.models.clip_skip import with_clip_skip
        from diffship.models.model import PipelineModel
        from diffship.models.parts.component import unused
        from diffship.models.sources.opening import open_source, require_source

        require_source(source)
        for package in ("torch", "diffusers", "transformers"):
            if not installed(package):
                raise MissingExtra(package, "torch")
        import torch

        if self.device not in _devices(torch):
            raise UnsupportedError(f"this torch has no {self.device}; it has {', '.join(_devices(torch))}")
        if self.threads:
            torch.set_num_threads(self.threads)
        loading = LoadOptions(self.vae, self.ema, self.prediction)
        pipeline = open_source(source, base=self.base, loading=loading)
        model = PipelineModel(with_clip_skip(change(pipeline) if change else pipeline), self.device)
        model.notes = (*model.notes, *unused(model.pipeline.components.values()))
        return cast(Model, model)

    def gate_bytes(self, file_bytes: int, precision: str) -> int:
        return 2 * file_bytes

    @classmethod
    def probe(cls) -> Probe:
        install = "pip install 'diffship[torch]' (docs/install.md says how to choose the small CPU build)"
        missing = [package for package in ("torch", "diffusers", "transformers") if not installed(package)]
        if missing:
            return Probe(cls.name, False, reason=f"{', '.join(missing)} is not installed", install=install)
        try:
            torch = need("torch")
        except (ImportError, OSError) as fault:
            return Probe(
                cls.name, False, package_version("torch"), (), f"torch does not start: {first_line(fault)}", install
            )
        return Probe(cls.name, True, torch.__version__, _devices(torch))


def _devices(torch: Any) -> tuple[str, ...]:
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    return tuple(name for name, works in there.items() if works)
