"""The vae pass: teach a cheap auto-encoder the latents of a KL one, and put it into the pipeline.

The tiny one is TAESD's (AutoencoderTiny), the small one a KL auto-encoder with a narrower decoder, both as Hybrid SD
(arXiv 2408.06646) trains them; `training.vae_task` has the losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from diffship import __version__
from diffship.compression.outline import Calls, Outline
from diffship.compression.runs import STATE
from diffship.compression.swap_vae import require_same_latents
from diffship.compression.trained import CADENCE, unplaced
from diffship.compression.vae_run import VaeOptions, train_vae
from diffship.compression.vae_students import NEW, SMALL, student_vae, trained_vae
from diffship.core.errors import UnsupportedError
from diffship.core.job import Job, digest_of
from diffship.core.problem import Problem, met
from diffship.core.strict import plain
from diffship.core.weights import SafetensorsWeights, source_digest
from diffship.models.assemble import with_vae
from diffship.models.parts.autoencoder import KL, decoder_widths
from diffship.models.pipeline import Module, Pipeline, recorded
from diffship.models.sources.opening import vae_of
from diffship.training.checkpoint import reached
from diffship.training.paired import PairedPictures
from diffship.training.perceptual import NONE, Perceptual
from diffship.training.vae_report import read_report
from diffship.training.vae_task import DECODER, DISCRIMINATOR, ENCODER, Turns


class VaePass(VaeOptions):
    """Train a cheap auto-encoder on pictures against a KL one; U-Net and text encoders stay as they are.

    Its options are those of VaeOptions.
    """

    kind: ClassVar[str] = "vae"
    role: ClassVar[str] = "decoder"  # whose cost a dry run tells

    def check(self, pipeline: Pipeline) -> list[Problem]:
        """What would stop `run`: a teacher or student that does not fit, data or features that cannot be read."""
        looks = (
            ("vae", partial(self._made, pipeline)),
            ("data", partial(self.pictures, pipeline)),
            ("perceptual", self.features),
        )
        return [*unplaced(pipeline, self.pixels(pipeline), self.batch, self.precision), *met(looks)]

    def outline(self, pipeline: Pipeline) -> Outline:
        """The student's shapes, and calls of both auto-encoders; the discriminator and the features come on top."""
        teacher = self.teacher_of(pipeline)
        student = self.student_of(teacher)
        made = with_vae(pipeline, student)
        return Outline(made, tuple(self._calls(teacher, made, self.turns(student))))

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        """The pipeline with the averaged auto-encoder in float32, and with its scale of latents.

        The run lives in the job's folder as `vae-` and a digest of options, teacher, student, data and features; a run
        that was stopped goes on from its last checkpoint, to the same bits.

        Raises:
            ConfigError: the teacher has other latents than the model.
            DivergedError: the loss is not finite; the last good checkpoint is kept.
            SourceError: a picture is damaged.
        """
        teacher, pictures, features = self.teacher_of(pipeline), self.pictures(pipeline), self.features()
        if self.teacher is not None:
            require_same_latents(pipeline, teacher)
        job.progress(f"{pictures.told}; captions are not looked at", 1, 1)
        student = self.student_of(teacher)
        theirs = [half.digest for half in (teacher.encoder, teacher.decoder)]
        digests = {"teacher_digest": digest_of(theirs), "data_digest": pictures.digest}
        folder = job.folder / f"vae-{self._key(teacher, student, features, digests)}"
        if reached(folder / STATE) < self.steps:
            train_vae(self, teacher, student, pictures, features, folder, job)
        report = read_report(folder)
        made = with_vae(pipeline, trained_vae(student, SafetensorsWeights(folder / STATE)))
        entry = {**self._entry(pipeline, features), **digests, "pictures": len(pictures), "report": report}
        if self.student == SMALL:
            entry["decoder"] = list(decoder_widths(made.decoder.config))
        before, after = (one.decoder.parameters for one in (teacher, made))
        counts = {"decoder_parameters_before": before, "decoder_parameters": after}
        return recorded(made, {**entry, **counts})

    def pixels(self, pipeline: Pipeline) -> int:
        """Side of the pictures that are trained on."""
        return self.size or pipeline.family.default_size

    def pictures(self, pipeline: Pipeline) -> PairedPictures:
        """The pictures to train on. Raises SourceError if the data cannot be used."""
        return PairedPictures.open(Path(self.data).expanduser(), self.pixels(pipeline))

    def features(self) -> Perceptual:
        """What pictures are compared by. Raises SourceError if the features that are named cannot be used."""
        return Perceptual.find(self.perceptual if self.w_perceptual else NONE)

    def teacher_of(self, pipeline: Pipeline) -> Pipeline:
        """`pipeline` with the teacher's auto-encoder, no tensor read yet.

        Raises:
            UnsupportedError: the teacher is no AutoencoderKL.
            ConfigError: its latents are of another shape.
        """
        found = pipeline if self.teacher is None else with_vae(pipeline, vae_of(self.teacher, pipeline.family.kind))
        name = found.decoder.class_name
        if name != KL:
            raise UnsupportedError(
                f"the teacher is an {name}, which learnt from another one; name an {KL}: teacher=SOURCE"
            )
        return found

    def student_of(self, teacher: Pipeline) -> Module:
        """Class, config and first weights of what is trained.

        Raises:
            ConfigError, SourceError, UnsupportedError: the student does not fit the teacher, or cannot be read.
        """
        return student_vae(self.student, teacher, self.width, self.decoder, self.seed)

    def _made(self, pipeline: Pipeline) -> None:
        teacher = self.teacher_of(pipeline)
        with_vae(pipeline, self.student_of(teacher))

    def _calls(self, teacher: Pipeline, made: Pipeline, turns: Turns) -> Iterator[Calls]:
        size = (self.pixels(made) / made.family.default_size) ** 2
        samples = self.batch * self.accumulate * size
        counts = {part: turns.learnt(part, self.steps) for part in (ENCODER, DECODER, DISCRIMINATOR)}
        filtered = counts[DECODER] / self.filter_every if self.filter_every else 0.0
        taught = counts[DECODER] + counts[DISCRIMINATOR] if self.target == "teacher" else 0
        ours, theirs = made.components, teacher.components
        yield Calls(ours[DECODER], samples * (3 * counts[DECODER] + counts[DISCRIMINATOR] + filtered))
        if turns.encoder:
            yield Calls(ours[ENCODER], samples * 3 * counts[ENCODER])
        yield Calls(theirs[DECODER], samples * (taught + filtered))
        yield Calls(theirs[ENCODER], samples * (self.colour * self.steps + filtered))

    def _entry(self, pipeline: Pipeline, features: Perceptual) -> dict[str, Any]:
        unsaid = {NEW: ("decoder",), SMALL: ("width",)}.get(self.student, ("decoder", "width"))
        said = {name: value for name, value in asdict(self).items() if name not in unsaid}
        said |= {"data": Path(self.data).name}
        said |= {"perceptual": features.network, "perceptual_digest": features.digest}
        said |= {"student": Path(self.student).name if Path(self.student).expanduser().is_dir() else self.student}
        if self.teacher is None:
            said["teacher"] = str(pipeline.source.get("id"))
        return {"pass": self.kind, **said}

    def _key(self, teacher: Pipeline, student: Module, features: Perceptual, digests: dict[str, str]) -> str:
        aside = (*CADENCE, "data", "teacher", "student", "perceptual")
        options = {name: value for name, value in plain(self).items() if name not in aside}
        vae = [teacher.decoder.config, student.class_name, student.config]
        first = source_digest(student.weights)
        facts = [__version__, options, digests, features.network, features.digest, plain(vae), first]
        return digest_of([*facts, self.pixels(teacher)])[:40]
