"""The lcm pass: distil a guided model into one that draws in a few steps without guidance.

Latent consistency models (Luo et al., arXiv 2310.04378) as a whole U-Net, and LCM-LoRA (arXiv 2311.05556) as low-rank
changes that other models of the same base take, too. `training.consistency` has the equations.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffship.compression.few_steps import FewSteps, as_few_steps
from diffship.compression.lcm_run import FULL, LcmOptions, embedded, train_consistency
from diffship.compression.lora_sampler import header_of
from diffship.compression.outline import U_NETS, Calls, Outline
from diffship.compression.runs import STATE
from diffship.compression.trained import (
    require_agreement,
    run_key,
    trained_schedule,
    trained_weights,
    untrainable,
)
from diffship.compression.trained_lora import check_lora_place, lora_of, with_lora
from diffship.core.errors import UnsupportedError
from diffship.core.job import Job
from diffship.core.problem import Problem, met
from diffship.core.weights import SafetensorsWeights
from diffship.models.assemble import with_denoiser
from diffship.models.pipeline import Pipeline, converted
from diffship.models.sources.opening import open_source
from diffship.sampling.samplers import CONSISTENCY
from diffship.training.checkpoint import reached
from diffship.training.consistency import PREDICTIONS
from diffship.training.distillation_report import last_figures
from diffship.training.paired import PairedPictures


class LcmPass(LcmOptions):
    """Train the U-Net on captioned pictures to draw in 1 to 8 steps; text encoders and auto-encoder stay as they are.

    Its options are those of LcmOptions.
    """

    kind: ClassVar[str] = "lcm"
    networks: ClassVar[tuple[str, ...]] = U_NETS

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What would stop `run`: a model or teacher that cannot become an LCM, data that cannot be read."""
        looks = {pipeline.family.kind.denoiser: self._check_teacher, "data": self.pictures, "": self._check_place}
        return [*self._unfit(pipeline), *met((part, partial(look, pipeline)) for part, look in looks.items())]

    def outline(self, pipeline: Pipeline) -> Outline:
        """The shapes of the result in float32, and what is computed.

        A sample takes a forward and a backward pass of the student, one forward of the target and two of the teacher.
        """
        size = (self.pixels(pipeline) / pipeline.family.default_size) ** 2
        samples = self.steps * self.batch * self.accumulate * size
        made = self.student(converted(pipeline, "float32", (pipeline.family.kind.denoiser,)))
        own = (5 if self.checkpointing else 4) * samples
        calls = (Calls(made.denoiser, own), Calls(self.teacher_of(pipeline).denoiser, 2 * samples))
        return Outline(self._finished(made, pipeline), calls)

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the averaged weights, float32, or with the averaged LoRA added, and with the LCM sampler.

        The run lives in the job's folder as `lcm-` and a digest of options, teacher, student and data; a run that was
        stopped goes on from its last checkpoint, to the same bits.

        Raises:
            DivergedError: the loss is not finite; the last good checkpoint is kept.
            SourceError: a picture is damaged.
        """
        teacher, pictures = self.teacher_of(pipeline), self.pictures(pipeline)
        job.progress(pictures.told, 1, 1)
        digests = {"teacher_digest": teacher.denoiser.digest, "data_digest": pictures.digest}
        student = self.student(pipeline)
        folder = job.folder / f"lcm-{self._key(student, teacher, digests)}"
        if reached(folder / STATE) < self.steps:
            train_consistency(self, self._finished(student, pipeline), teacher, pictures, folder, job)
        entry = {**self._entry(pipeline, folder), **digests, "pictures": len(pictures)}
        return self._finished(self._trained(student, SafetensorsWeights(folder / STATE), entry), pipeline)

    def pixels(self, pipeline: Pipeline) -> int:
        """Side of the pictures that are trained on."""
        return self.size or pipeline.family.default_size

    def pictures(self, pipeline: Pipeline) -> PairedPictures:
        """The pictures to train on. Raises SourceError if the data cannot be used."""
        return PairedPictures.open(Path(self.data).expanduser(), self.pixels(pipeline))

    def teacher_of(self, pipeline: Pipeline) -> Pipeline:
        """The teacher, no tensor read yet: the model itself, unless one is named."""
        return pipeline if self.teacher is None else open_source(self.teacher)

    def student(self, pipeline: Pipeline) -> Pipeline:
        """The pipeline with the U-Net that is trained: of the full form one that takes guidance, too."""
        return embedded(pipeline) if self.form == FULL else pipeline

    def _finished(self, made: Pipeline, pipeline: Pipeline) -> Pipeline:
        """`made` with the LCM sampler; its guidance is 1, or the teacher's own as far as that was trained."""
        teacher = self.teacher_of(pipeline)
        low, high = self.guidances(teacher)
        own = float(np.clip(teacher.family.guidance_default, low + 1, high + 1))
        guidance = own if self.form == FULL else 1.0
        return as_few_steps(made, FewSteps(guidance=guidance, original_steps=self.original_steps))

    def _trained(self, student: Pipeline, state: SafetensorsWeights, entry: dict[str, Any]) -> Pipeline:
        unet = student.denoiser
        if self.form == FULL:
            return with_denoiser(student, unet.config, trained_weights(state, unet.weights.names()), entry)
        header = header_of(FewSteps(original_steps=self.original_steps))
        return with_lora(student, lora_of(self, state, header=header), self, entry)

    def _entry(self, pipeline: Pipeline, folder: Path) -> dict[str, Any]:
        teacher = self.teacher_of(pipeline)
        low, high = self.guidances(teacher)
        unsaid = ("lora_out", "lora_precision", *(("rank", "alpha") if self.form == FULL else ()))
        said = {name: value for name, value in asdict(self).items() if name not in unsaid}
        said |= {"data": Path(self.data).name, "prompts": list(self.prompts), "rate": self.learning_rate}
        said |= {"w_min": low, "w_max": high, "teacher": str(teacher.source.get("id"))}
        return {"pass": self.kind, **said, "losses": last_figures(folder)}

    def _unfit(self, pipeline: Pipeline) -> Iterator[Problem]:
        family = pipeline.family
        if family.time_cond_dim:
            yield Problem(pipeline.family.kind.denoiser, "takes guidance as an embedding: it is an LCM already")
        elif (sampler := pipeline.scheduler.get("_class_name")) in CONSISTENCY:
            yield Problem(pipeline.family.kind.denoiser, f"has the {sampler}: it was made for a few steps already")
        yield from untrainable(pipeline, self.pixels(pipeline), self.batch, self.precision)

    def _check_teacher(self, pipeline: Pipeline) -> None:
        teacher = self.teacher_of(pipeline)
        self._require_prediction(pipeline)
        require_agreement(pipeline, teacher)
        self.guidances(teacher)

    def _require_prediction(self, pipeline: Pipeline) -> None:
        kind, alphas = pipeline.family.prediction_type, trained_schedule(pipeline).alphas_cumprod()
        if kind not in PREDICTIONS:
            raise UnsupportedError(
                f"predicts {kind}; an LCM is made of a model that predicts {' or '.join(PREDICTIONS)}"
            )
        if kind == "epsilon" and alphas[self.times(pipeline)[0]] <= 0:
            raise UnsupportedError("predicts epsilon with zero terminal SNR: no signal is left to find a picture in")

    def _check_place(self, pipeline: Pipeline) -> None:
        check_lora_place(self)

    def _key(self, student: Pipeline, teacher: Pipeline, digests: dict[str, str]) -> str:
        aside = ("data", "teacher", "lora_out", "lora_precision")
        return run_key(self, aside, self.pixels(student), student, teacher, digests)
