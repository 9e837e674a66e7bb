"""The LoRA pass: low-rank changes of one or many files added into the weights, in float32, layer by layer.

What comes out is a plain model that every exporter takes. LCM-LoRA (Luo et al., arXiv 2311.05556) is such a file: with
`sampler = "lcm"` the result also says that it wants the LCM sampler, few steps and no guidance.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import ClassVar

from diffship.compression.few_steps import as_lcm
from diffship.compression.lora_file import Delta, LoraFile, with_deltas
from diffship.compression.lora_names import Names
from diffship.compression.lora_scale import adapter_config
from diffship.compression.outline import U_NETS, Outline
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.job import Job
from diffship.core.problem import Problem
from diffship.core.strict import bounded, bounds, choices
from diffship.models.pipeline import Pipeline, recorded


@dataclass(frozen=True)
@bounded
class LoraPass:
    """Fuse LoRA files (safetensors; kohya's, diffusers' or peft's names) into the U-Net and the text encoders.

    files: one or more. weights: how much of each, 1 if not given; negative ones subtract. sampler, steps: `lcm`
    records the LCM sampler in the result, with `steps` steps and guidance 1.
    """

    kind: ClassVar[str] = "lora"
    networks: ClassVar[tuple[str, ...]] = U_NETS
    kept: ClassVar[bool] = False  # added while the weights are written

    files: tuple[str, ...]
    weights: tuple[float, ...] = field(default=(), metadata=bounds(-10, 10))
    sampler: str | None = field(default=None, metadata=choices("lcm"))
    steps: int = field(default=4, metadata=bounds(1, 50))

    def __post_init__(self) -> None:
        if not self.files:
            raise ConfigError("no LoRA file is given; set files=FILE.safetensors")
        if self.weights and len(self.weights) != len(self.files):
            raise ConfigError(f"{len(self.weights)} weights for {len(self.files)} files; give one for each, or none")

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What would stop `run`: unreadable files, keys that no layer has, shapes that do not fit."""
        try:
            self._deltas(pipeline)
        except DiffshipError as fault:
            return [Problem.of("", fault)]
        return []

    def outline(self, pipeline: Pipeline) -> Outline:
        """What `run` makes: it reads no weights either."""
        return Outline(self.run(pipeline, Job()))

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with changed weights: float32 if a file changes them, as they were elsewhere."""
        deltas, scaled_by = self._deltas(pipeline)
        parts = dict(pipeline.components)
        for done, (name, changes) in enumerate(deltas.items(), 1):
            parts[name] = replace(parts[name], weights=with_deltas(parts[name].weights, changes))
            job.progress(f"lora {name}", done, len(deltas))
        layers = {name: len(changes) for name, changes in deltas.items()}
        entry = {"pass": self.kind, **asdict(self), "files": [Path(file).name for file in self.files]}
        entry["scaled_by"] = scaled_by
        made = recorded(replace(pipeline, components=parts), {**entry, "layers": layers})
        return as_lcm(made, self.steps, guidance=1.0) if self.sampler == "lcm" else made

    @property
    def beside(self) -> list[str]:
        """Files that it reads beside those that are named: peft's configs."""
        return [str(config) for file in self._paths if (config := adapter_config(file)) is not None]

    @property
    def _paths(self) -> list[Path]:
        return [Path(file).expanduser() for file in self.files]

    def _deltas(self, pipeline: Pipeline) -> tuple[dict[str, dict[str, list[Delta]]], list[str]]:
        """{part: {tensor: changes}} of all files together, and of each file where its scale is from."""
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
        return ordered, [file.scaled_by for file in files]
