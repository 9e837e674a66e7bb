"""One run of a pass that trains a U-Net: its steps, and the curve and pictures that show how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffship.compression.runs import MIXED, Paced, schedule
from diffship.core.job import Job
from diffship.models.pipeline import Pipeline
from diffship.training.distillation_report import InTraining, Look, Report
from diffship.training.loop import Task, train

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


class UNetTask(Task, Protocol):
    """What is trained: a task of the training loop whose student draws the pictures of the report."""

    @property
    def student(self) -> nn.Module: ...


class Mixed(Paced, Protocol):
    """The options of a run, with the precision in which it computes."""

    @property
    def precision(self) -> str: ...


def fit(
    task: UNetTask,
    options: Mixed,
    rate: float,
    pipeline: Pipeline,
    look: Look,
    folder: Path,
    job: Job,
    label: str,
    device: torch.device,
    follow: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> None:
    """Train `task` until `options.steps`, from the checkpoint in `folder` if there is one.

    rate: the learning rate. pipeline: what draws with the student. look: which pictures are drawn. label: of the
    progress that `job` reports. follow: as `training.loop.train` has it, which also says what is raised.

    Writes `state.safetensors`, `curve.jsonl`, `curve.png` and `validation-STEP.png`.
    """
    model = InTraining(pipeline, task.student, str(device))
    train(
        task,
        schedule(options, rate),
        folder,
        validate=Report(model, look, folder, lambda text: job.progress(text, 1, 1)),
        precision=MIXED[options.precision],
        progress=lambda step, steps: job.progress(label, step, steps),
        follow=follow,
    )
