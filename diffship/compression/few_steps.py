"""What a model is told after it was made for few steps: its sampler, how many steps, and which guidance."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffship.models.pipeline import OWN, Pipeline, own_facts
from diffship.models.sources.arch_configs import lcm_scheduler

LCM, TCD = "lcm", "tcd"
_TRAILING = {"ddim": "DDIMScheduler", "euler": "EulerDiscreteScheduler"}  # of students of DDIM's or Euler's steps
SAMPLERS = (LCM, TCD, *_TRAILING)


@dataclass(frozen=True)
class FewSteps:
    """How a distilled model is drawn with. sampler: one of SAMPLERS; `ddim` and `euler` with trailing timesteps.

    guidance: None leaves the model's own. eta: the share of noise that TCD draws anew. original_steps: those that
    consistency was distilled on; timesteps of LCM and TCD are some of theirs.
    """

    sampler: str = LCM
    steps: int = 4
    guidance: float | None = 1.0
    eta: float = 0.0
    original_steps: int = 50

    def scheduler(self, own: Mapping[str, Any]) -> dict[str, Any]:
        """The scheduler config, over the betas and the prediction type of `own`."""
        if self.sampler in _TRAILING:
            calm = {"clip_sample": False}  # what DDIM would do if `own` says nothing of it, and other classes never do
            return {**calm, **own, "_class_name": _TRAILING[self.sampler], "timestep_spacing": "trailing"}
        made = {**lcm_scheduler(own), "original_inference_steps": self.original_steps}
        return made if self.sampler == LCM else {**made, "_class_name": "TCDScheduler", "eta": self.eta}


def as_few_steps(pipeline: Pipeline, how: FewSteps) -> Pipeline:
    """`pipeline` with the sampler of `how`, and its steps and guidance as defaults."""
    scheduler = how.scheduler(pipeline.scheduler)
    guidance = pipeline.family.guidance_default if how.guidance is None else how.guidance
    own = {**own_facts(pipeline.model_index), "steps_default": how.steps, "guidance_default": guidance}
    index = {**pipeline.model_index, OWN: own, "scheduler": ["diffusers", scheduler["_class_name"]]}
    index |= pipeline.family.kind.few_steps_index(pipeline.family)
    family = replace(pipeline.family, steps_default=how.steps, guidance_default=guidance)
    return replace(pipeline, scheduler=scheduler, model_index=index, family=family)
