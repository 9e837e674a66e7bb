"""The train-lora pass: a LoRA of a style or a thing, trained on captioned pictures of it, without a teacher.

Low-rank adaptation (Hu et al., arXiv 2106.09685) of the U-Net by the loss that diffusion models are trained with (Ho et
al., arXiv 2006.11239, eq. 14), as diffusers' `train_text_to_image_lora.py` has it. What comes out is added to other
models of the same base by the pass `lora`, an LCM-LoRA beside it included.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from diffship.compression.outline import U_NETS, Calls, Outline
from diffship.compression.runs import STATE
from diffship.compression.train_lora_run import LAYERS, TrainLoraOptions, train_lora
from diffship.compression.trained import run_key, trained_schedule, untrainable, unweighed
from diffship.compression.trained_lora import check_lora_place, lora_of, with_lora
from diffship.core.job import Job
from diffship.core.problem import Problem, met
from diffship.core.weights import SafetensorsWeights
from diffship.models.pipeline import Pipeline, converted
from diffship.sampling.samplers import CONSISTENCY
from diffship.training.checkpoint import reached
from diffship.training.distillation_report import last_figures
from diffship.training.paired import PairedPictures


class TrainLoraPass(TrainLoraOptions):
    """Train low-rank changes of the U-Net on captioned pictures of a style, and add them; the other parts stay.

    Its options are those of TrainLoraOptions.
    """

    kind: ClassVar[str] = "train-lora"
    networks: ClassVar[tuple[str, ...]] = U_NETS

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What would stop `run`: a model that is not trained this way, data that cannot be read."""
        looks = {pipeline.family.kind.denoiser: trained_schedule, "data": self.pictures, "": self._check_place}
        return [*self._unfit(pipeline), *met((part, partial(look, pipeline)) for part, look in looks.items())]

    def outline(self, pipeline: Pipeline) -> Outline:
        """The same shapes in float32; a forward and a backward pass of the U-Net for each sample."""
        size = (self.pixels(pipeline) / pipeline.family.default_size) ** 2
        samples = self.steps * self.batch * self.accumulate * size
        calls = (Calls(pipeline.denoiser, (4 if self.checkpointing else 3) * samples),)
        return Outline(converted(pipeline, "float32", (pipeline.family.kind.denoiser,)), calls)

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the averaged LoRA added to its U-Net, float32; sampler, steps and guidance stay.

        The run lives in the job's folder as `train-lora-` and a digest of options, model and data; a run that was
        stopped goes on from its last checkpoint, to the same bits.

        Raises:
            DivergedError: the loss is not finite; the last good checkpoint is kept.
            SourceError: a picture is damaged.
        """
        pictures = self.pictures(pipeline)
        job.progress(pictures.told, 1, 1)
        folder = job.folder / f"train-lora-{self._key(pipeline, pictures)}"
        if reached(folder / STATE) < self.steps:
            train_lora(self, pipeline, pictures, folder, job)
        lora = lora_of(self, SafetensorsWeights(folder / STATE), LAYERS[self.targets])
        return with_lora(pipeline, lora, self, self._entry(pictures, folder))

    def pixels(self, pipeline: Pipeline) -> int:
        """Side of the pictures that are trained on."""
        return self.size or pipeline.family.default_size

    def pictures(self, pipeline: Pipeline) -> PairedPictures:
        """The pictures to train on. Raises SourceError if the data cannot be used."""
        return PairedPictures.open(Path(self.data).expanduser(), self.pixels(pipeline))

    def _unfit(self, pipeline: Pipeline) -> Iterator[Problem]:
        part = pipeline.family.kind.denoiser
        if pipeline.family.time_cond_dim or pipeline.scheduler.get("_class_name") in CONSISTENCY:
            yield Problem(
                part,
                "draws in few steps, and this loss would train that away; train on the model that it was made of, and "
                "add both LoRAs to that one: --pass lora --set files=STYLE,LCM",
            )
        yield from unweighed(pipeline, self.weighting)
        yield from untrainable(pipeline, self.pixels(pipeline), self.batch, self.precision)

    def _check_place(self, pipeline: Pipeline) -> None:
        check_lora_place(self)

    def _entry(self, pictures: PairedPictures, folder: Path) -> dict[str, Any]:
        said = {name: value for name, value in asdict(self).items() if name not in ("lora_out", "lora_precision")}
        said |= {"data": Path(self.data).name, "data_digest": pictures.digest, "pictures": len(pictures)}
        return {"pass": self.kind, **said, "prompts": list(self.prompts), "losses": last_figures(folder)}

    def _key(self, pipeline: Pipeline, pictures: PairedPictures) -> str:
        aside = ("data", "lora_out", "lora_precision")
        return run_key(self, aside, self.pixels(pipeline), pipeline, pipeline, {"data_digest": pictures.digest})
