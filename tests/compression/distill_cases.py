"""Pictures with captions and small distillations that several files test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from diffship.compress import compress
from diffship.compression.distill import DistillPass
from diffship.compression.distill_run import make_task
from diffship.compression.layout import LayoutPass
from diffship.core.job import Job
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.training.distillation import DistillationTask
from diffship.training.distillation_pairs import feature_pairs
from diffship.training.paired import PairedPictures

SMALL: dict[str, Any] = {"batch": 4, "accumulate": 1, "rate": 1e-3, "ema": 0.9, "prompts": ("red apple",)}


def pictures_in(folder: Path, count: int = 6, size: int = 64) -> Path:
    """Noisy coloured squares, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(3)
    for index in range(count):
        pixels = draw.integers(0, 256, (size, size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"picture {index}", encoding="utf-8")
    return folder


def student_of(teacher: Pipeline, layout: str = "bk-tiny") -> Pipeline:
    return compress(teacher, [LayoutPass(layout)])


def task_of(options: DistillPass, student: Pipeline, job: Job, teacher: Pipeline | None = None) -> DistillationTask:
    """The task of a pass, on the CPU, without a run around it."""
    teacher = teacher or options.teacher_of(student)
    pairs = feature_pairs(options.features, student.components["unet"], teacher.components["unet"])
    pictures = PairedPictures.open(options.data, options.pixels(student))
    return make_task(options, student, teacher, pictures, pairs, job, torch.device("cpu"), main=True)


def tiny_task(folder: Path, **options: Any) -> DistillationTask:
    """`arch:tiny-sd` teaches its bk-tiny layout on six pictures."""
    made = DistillPass(str(pictures_in(folder / "data")), **{**SMALL, **options})
    return task_of(made, student_of(open_source("arch:tiny-sd")), Job(folder / "job"))
