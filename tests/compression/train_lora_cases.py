"""A small training of a LoRA that several tests look at."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from distill_cases import pictures_in

from diffship.compression.train_lora import TrainLoraPass
from diffship.compression.train_lora_run import make_task
from diffship.core.job import Job
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.training.distillation import DistillationTask

SMALL: dict[str, Any] = {"rank": 3, "batch": 4, "steps": 2, "rate": 1e-2, "prompts": ("red apple",), "cache_gib": 0.1}


def tiny() -> Pipeline:
    """`arch:tiny-sd`, which draws in two steps, so that pictures of a validation take no time."""
    made = open_source("arch:tiny-sd")
    return replace(made, family=replace(made.family, steps_default=2))


def options_for(folder: Path, **more: Any) -> TrainLoraPass:
    """A pass over six pictures."""
    return TrainLoraPass(str(pictures_in(folder / "data")), **{**SMALL, **more})


def task_of(options: TrainLoraPass, pipeline: Pipeline, folder: Path) -> DistillationTask:
    """The task of a pass, on the CPU, without a run around it."""
    job, device = Job(folder / "job"), torch.device("cpu")
    return make_task(options, pipeline, options.pictures(pipeline), job, device, main=True)
