"""Small distillations to LCMs that several files test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from distill_cases import pictures_in

from diffship.compression.lcm import LcmPass
from diffship.compression.lcm_run import make_task
from diffship.core.job import Job
from diffship.models.pipeline import Pipeline
from diffship.training.consistency_task import ConsistencyTask

SMALL: dict[str, Any] = {"batch": 4, "steps": 2, "rate": 1e-2, "prompts": ("red apple",), "cache_gib": 0.1}


def options_for(folder: Path, **more: Any) -> LcmPass:
    """A pass over six pictures; a LoRA has rank 4."""
    rank = {} if more.get("form") == "full" else {"rank": 4}
    return LcmPass(str(pictures_in(folder / "data")), **{**SMALL, **rank, **more})


def task_of(options: LcmPass, pipeline: Pipeline, folder: Path) -> ConsistencyTask:
    """The task of a pass, on the CPU, without a run around it."""
    student, teacher = options.student(pipeline), options.teacher_of(pipeline)
    job, device = Job(folder / "job"), torch.device("cpu")
    return make_task(options, student, teacher, options.pictures(pipeline), job, device, main=True)
