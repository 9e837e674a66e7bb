"""The LoRA pass: low-rank changes of one or many files added into the weights, in float32, layer by layer.

What comes out is a plain model that every exporter takes. LCM-LoRA (Luo et al., arXiv 2311.05556) is such a file, TCD's
(arXiv 2402.19159) another: the result then also says which sampler it wants, how many steps, and no guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from diffship.compression.few_steps import SAMPLERS, TCD, FewSteps, as_few_steps
from diffship.compression.lora_file import Delta, LoraFile, with_deltas
from diffship.compression.lora_names import Names
from diffship.compression.lora_sampler import wanted
from diffship.compression.lora_scale import adapter_config
from diffship.compression.outline import U_NETS, Outline
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.job import Job
from diffship.core.limits import LIMITS
from diffship.core.problem import Problem
from diffship.core.strict import bounded, bounds, choices
from diffship.models.pipeline import Pipeline, recorded

OWN = "own"


@dataclass(frozen=True)
@bounded
class LoraPass:
    """Fuse LoRA files (safetensors; kohya's, diffusers' or peft's names) into the U-Net and the text encoders.

    files: one or more. weights: how much of each, 1 if not given; negative ones subtract.
    sampler: what the result is drawn with: `lcm`, `tcd`, `ddim` or `euler` (both with trailing timesteps), and guidance
    1; `own` leaves the model's. By default what a file says, in its header or by the name of a published one.
    steps: of that sampler, by default the file's, or 4. eta: share of noise that tcd draws anew, by default the file's,
    or 0.
    """

    kind: ClassVar[str] = "lora"
    networks: ClassVar[tuple[str, ...]] = U_NETS
    kept: ClassVar[bool] = False  # added while the weights are written

    files: tuple[str, ...]
    weights: tuple[float, ...] = field(default=(), metadata=bounds(-10, 10))
    sampler: str | None = field(default=None, metadata=choices(*SAMPLERS, OWN))
    steps: int | None = field(default=None, metadata=bounds(1, 50))
    eta: float | None = field(default=None, metadata=bounds(*LIMITS.eta))

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("no LoRA file is given; set files=FILE.safetensors")
        if self.weights and len(self.weights) != len(self.files):
            raise ConfigError(f"{len(self.weights)} weights for {len(self.files)} files; give one for each, or none")
        if self.eta is not None and self.sampler not in (None, TCD):
            raise ConfigError(f"eta is {self.eta:g}; it is of the sampler {TCD}, and {self.sampler} has none")
        if self.sampler == OWN and self.steps is not None:
            raise ConfigError(f"steps is {self.steps}; with sampler={OWN} the model keeps its own")

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What would stop `run`: unreadable files, keys that no layer has, shapes that do not fit, two samplers."""
        try:
            self._few_steps(self._deltas(pipeline)[1])
        except DiffshipError as fault:
            return [Problem.of("", fault)]
        return []

    def outline(self, pipeline: Pipeline) -> Outline:
        """What `run` makes: it reads no weights either."""
        return Outline(self.run(pipeline, Job()))

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with changed weights: float32 if a file changes them, as they were elsewhere."""
        deltas, files = self._deltas(pipeline)
        parts = dict(pipeline.components)
        for done, (name, changes) in enumerate(deltas.items(), 1):
            parts[name] = replace(parts[name], weights=with_deltas(parts[name].weights, changes))
            job.progress(f"lora {name}", done, len(deltas))
        layers = {name: len(changes) for name, changes in deltas.items()}
        entry = {"pass": self.kind, **asdict(self), "files": [Path(file).name for file in self.files]}
        entry["scaled_by"] = [file.scaled_by for file in files]
        how, said_by = self._few_steps(files)
        if how is not None:
            entry |= {"sampler": how.sampler, "steps": how.steps, "eta": how.eta, "sampler_from": said_by}
            job.progress(f"{said_by}: the result draws {how.steps} steps with the sampler {how.sampler}", 1, 1)
        made = recorded(replace(pipeline, components=parts), {**entry, "layers": layers})
        return made if how is None else as_few_steps(made, how)

    @property
    def beside(self) -> list[str]:
        """Files that it reads beside those that are named: peft's configs."""
        return [str(config) for file in self._paths if (config := adapter_config(file)) is not None]

    @property
    def _paths(self) -> list[Path]:
        return [Path(file).expanduser() for file in self.files]

    def _few_steps(self, files: Sequence[LoraFile]) -> tuple[FewSteps | None, str]:
        """How the result is drawn with, and what says so; None leaves the model's own sampler.

        Raises:
            ConfigError: files want different things, and no sampler is chosen; or eta is given, and not for TCD.
            SourceError: the header of a file is not legal.
        """
        if self.sampler == OWN:
            return None, ""
        added = self.weights or (1.0,) * len(files)
        told = [
            wanted(file.path, file.weights.metadata) for file, weight in zip(files, added, strict=True) if weight > 0
        ]
        found = dict(one for one in told if one is not None)
        if self.sampler is not None:
            by = f"sampler={self.sampler}"
            found = {how: by for how in found if how.sampler == self.sampler} or {FewSteps(self.sampler): by}
        asked = {self._asked(how, said): said for how, said in found.items()}
        if len(asked) > 1:
            each = "; ".join(f"{said}: {how.sampler}, {how.steps} steps" for how, said in asked.items())
            raise ConfigError(f"the LoRAs want different samplers or steps ({each}); choose: sampler=NAME steps=N")
        if not asked and (self.steps, self.eta) != (None, None):
            raise ConfigError("steps or eta without a sampler, and no file says which; set sampler=NAME")
        return next(iter(asked.items()), (None, ""))

    def _asked(self, how: FewSteps, said: str) -> FewSteps:
        """The same with the steps and the eta that are given."""
        if self.eta is not None and how.sampler != TCD:
            raise ConfigError(f"eta is {self.eta:g}; it is of the sampler {TCD}, and {said} says {how.sampler}")
        steps = how.steps if self.steps is None else self.steps
        return replace(how, steps=steps, eta=how.eta if self.eta is None else self.eta)

    def _deltas(self, pipeline: Pipeline) -> tuple[dict[str, dict[str, list[Delta]]], list[LoraFile]]:
        """{part: {tensor: changes}} of all files together, and the files."""
        kind = pipeline.family.kind
        learnt = [name for name in (kind.denoiser, *kind.text_parts) if name in pipeline.components]
        weights = {name: pipeline.components[name].weights for name in learnt}
        names = Names({name: held.names() for name, held in weights.items()}, pipeline.denoiser.config)
        found: dict[str, dict[str, list[Delta]]] = {}
        files = [LoraFile(path, names, weights) for path in self._paths]
        for file, scale in zip(files, self.weights or (1.0,) * len(files), strict=True):
            for (part, layer), delta in file.deltas(scale).items():
                found.setdefault(part, {}).setdefault(f"{layer}.weight", []).append(delta)
        ordered = {part: found[part] for part in pipeline.components if part in found}
        return ordered, files
