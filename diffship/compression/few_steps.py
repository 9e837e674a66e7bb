"""What a model is told after it was made for few steps: the LCM sampler, how many steps, and which guidance."""

from __future__ import annotations

from dataclasses import replace

from diffship.models.pipeline import OWN, Pipeline, own_facts
from diffship.models.sources.arch_configs import lcm_scheduler

FEW_STEPS = ("LCMScheduler", "TCDScheduler")  # of models that were distilled to a few steps


def as_lcm(pipeline: Pipeline, steps: int, guidance: float, original_steps: int = 50) -> Pipeline:
    """`pipeline` with the LCM sampler over its own betas, drawing `steps` steps with `guidance` unless told otherwise.

    `original_steps` are those that consistency was distilled on: the sampler's timesteps are some of theirs.
    """
    own = {**own_facts(pipeline.model_index), "steps_default": steps, "guidance_default": guidance}
    index = {**pipeline.model_index, OWN: own, "scheduler": ["diffusers", "LCMScheduler"]}
    index |= pipeline.family.kind.few_steps_index(pipeline.family)
    scheduler = {**lcm_scheduler(pipeline.scheduler), "original_inference_steps": original_steps}
    family = replace(pipeline.family, steps_default=steps, guidance_default=guidance)
    return replace(pipeline, scheduler=scheduler, model_index=index, family=family)
