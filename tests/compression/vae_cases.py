"""Small trainings of auto-encoders that several files test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distill_cases import pictures_in

from diffship.compression.vae import VaePass
from diffship.compression.vae_run import make_task
from diffship.core.job import Job
from diffship.models.pipeline import Pipeline
from diffship.training.vae_task import VaeTeaching

SMALL: dict[str, Any] = {"batch": 2, "accumulate": 1, "rate": 1e-3, "perceptual": "none", "width": 8, "disc_width": 8}
TURNS: dict[str, Any] = {"disc_start": 2, "disc_alone": 1, "disc_updates": 1, "disc_rate": 2.0}
STUDENTS: dict[str, dict[str, Any]] = {"tiny": {}, "small": {"student": "small", "decoder": (4, 8, 8, 12)}}


def options_for(folder: Path, **more: Any) -> VaePass:
    """A pass over six pictures."""
    return VaePass(str(pictures_in(folder / "data")), **{**SMALL, "steps": 2, **more})


def task_of(options: VaePass, pipeline: Pipeline, folder: Path) -> VaeTeaching:
    """The task of a pass, on the CPU, without a run around it."""
    teacher = options.teacher_of(pipeline)
    student, job = options.student_of(teacher), Job(folder / "job")
    parts = (options.pictures(pipeline), options.features(), job, torch.device("cpu"))
    return make_task(options, teacher, student, *parts, main=True)
