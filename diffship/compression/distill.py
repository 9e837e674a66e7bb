"""The distill pass: train the U-Net to give what its teacher gives, so that it recovers what the passes before it cost.

Losses, feature pairs and hyperparameters are those of BK-SDM (arXiv 2305.15798), Hybrid SD (2408.06646) and KOALA
(2312.04005); `training.distillation` has the equation.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from diffship.compression.distill_run import DistillOptions, train_student
from diffship.compression.outline import U_NETS, Calls, Outline
from diffship.compression.runs import STATE
from diffship.compression.trained import require_agreement, run_key, trained_weights, untrainable, unweighed
from diffship.core.errors import ConfigError
from diffship.core.job import Job
from diffship.core.problem import Problem, met
from diffship.core.weights import SafetensorsWeights
from diffship.models.assemble import with_denoiser
from diffship.models.pipeline import Pipeline, converted
from diffship.models.sources.opening import open_source
from diffship.sampling.samplers import CONSISTENCY
from diffship.training.checkpoint import reached
from diffship.training.distillation_pairs import feature_pairs
from diffship.training.distillation_report import last_figures
from diffship.training.paired import PairedPictures


class DistillPass(DistillOptions):
    """Train the U-Net on captioned pictures against a frozen teacher; text encoders and auto-encoder stay as they are.

    Its options are those of DistillOptions.
    """

    kind: ClassVar[str] = "distill"
    networks: ClassVar[tuple[str, ...]] = U_NETS

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What would stop `run`: another family of teacher, features that do not pair, data that cannot be read."""
        looks = {pipeline.family.kind.denoiser: self._check_teacher, "data": self.pictures}
        return [*self._unfit(pipeline), *met((part, partial(look, pipeline)) for part, look in looks.items())]

    def outline(self, pipeline: Pipeline) -> Outline:
        """The same shapes in float32; forward and backward passes of the student, forward passes of the teacher.

        Raises:
            ConfigError: the teacher would undo what the passes before this one did.
        """
        teacher = self.teacher_of(pipeline)
        _require_kin(pipeline, teacher, self.teacher is None)
        size = (self.pixels(pipeline) / pipeline.family.default_size) ** 2
        samples = self.steps * self.batch * self.accumulate * size
        passes = 4 if self.checkpointing else 3
        calls = [Calls(pipeline.denoiser, passes * samples)]
        if self.w_out or (self.w_feat and self.features != "none"):
            calls.append(Calls(teacher.denoiser, samples))
        return Outline(converted(pipeline, "float32", (pipeline.family.kind.denoiser,)), tuple(calls))

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the averaged weights of the trained U-Net, float32.

        The run lives in the job's folder as `distill-` and a digest of options, teacher, student and data; a run that
        was stopped goes on from its last checkpoint, to the same bits.

        Raises:
            DivergedError: the loss is not finite; the last good checkpoint is kept.
            SourceError: a picture is damaged.
        """
        teacher, pictures = self.teacher_of(pipeline), self.pictures(pipeline)
        job.progress(pictures.told, 1, 1)
        digests = {"teacher_digest": teacher.denoiser.digest, "data_digest": pictures.digest}
        folder = job.folder / f"distill-{self._digest(pipeline, teacher, digests)}"
        if reached(folder / STATE) < self.steps:
            train_student(self, pipeline, teacher, pictures, folder, job)
        unet = pipeline.denoiser
        weights = trained_weights(SafetensorsWeights(folder / STATE), unet.weights.names())
        entry: dict[str, Any] = {"pass": self.kind, **asdict(self), "data": Path(self.data).name, **digests}
        entry |= {"teacher": str(teacher.source.get("id")), "pictures": len(pictures), "prompts": list(self.prompts)}
        entry["losses"] = last_figures(folder)
        return with_denoiser(pipeline, unet.config, weights, entry)

    def pixels(self, pipeline: Pipeline) -> int:
        """Side of the pictures that are trained on."""
        return self.size or pipeline.family.default_size

    def pictures(self, pipeline: Pipeline) -> PairedPictures:
        """The pictures to train on. Raises SourceError if the data cannot be used."""
        return PairedPictures.open(Path(self.data).expanduser(), self.pixels(pipeline))

    def teacher_of(self, pipeline: Pipeline) -> Pipeline:
        """The teacher, no tensor read yet.

        Raises:
            ConfigError: none is named, and the model's own source is a folder or file of which only the name is known.
            SourceError: it cannot be read.
        """
        if self.teacher is not None:
            return open_source(self.teacher)
        source = pipeline.source
        base = source.get("base") or {}
        for one in (source, base):
            if one.get("kind") in ("folder", "file"):
                raise ConfigError(
                    f"the model was read from a {one['kind']} ({one.get('id')}); name the teacher: teacher=SOURCE"
                )
        return open_source(str(source["id"]), base=base.get("id"), revision=source.get("revision"))

    def _unfit(self, pipeline: Pipeline) -> Iterator[Problem]:
        part = pipeline.family.kind.denoiser
        family = pipeline.family
        if family.time_cond_dim:
            yield Problem(
                part,
                "takes guidance as an embedding (LCM); distill first, and make it an LCM afterwards",
            )
        yield from unweighed(pipeline, self.weighting)
        yield from untrainable(pipeline, self.pixels(pipeline), self.batch, self.precision)

    def _check_teacher(self, pipeline: Pipeline) -> None:
        teacher = self.teacher_of(pipeline)
        _require_kin(pipeline, teacher, self.teacher is None)
        require_agreement(pipeline, teacher)
        feature_pairs(self.features, pipeline.denoiser, teacher.denoiser)
        self.timesteps(teacher)

    def _digest(self, pipeline: Pipeline, teacher: Pipeline, digests: dict[str, str]) -> str:
        return run_key(self, ("data", "teacher"), self.pixels(pipeline), pipeline, teacher, digests)


def _require_kin(student: Pipeline, teacher: Pipeline, default: bool) -> None:
    """Raises ConfigError if learning from `teacher` takes back a LoRA that is fused into the student."""
    fused = [entry for entry in student.history[len(teacher.history) :] if entry.get("pass") in ("lora", "train-lora")]
    if default and fused:
        made_of = fused[0].get("files") or [fused[0].get("data")]
        raise ConfigError(
            f"a LoRA ({', '.join(map(str, made_of))[:200]}) was fused before, and the teacher, "
            "the source without it, would train it away. Distill first and fuse afterwards; or save the source with "
            "the LoRA (--pass lora -o DIR) and name it: teacher=DIR"
        )
    ours, theirs = (str(one.scheduler.get("_class_name")) for one in (student, teacher))
    if ours in CONSISTENCY and theirs not in CONSISTENCY:
        raise ConfigError(
            f"the model draws in few steps ({ours}), and its teacher {teacher.source.get('id')} does not ({theirs}): "
            "what learns from it needs all steps again. Distill first and make it an LCM afterwards"
        )
