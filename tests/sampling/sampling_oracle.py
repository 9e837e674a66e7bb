"""Random legal configs of diffusers' schedulers, and a walk through each beside ours, call by call."""

from __future__ import annotations

import importlib
import inspect
import math
import random
import sys
import types
from collections.abc import Mapping
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffship.sampling.sampler import Sampler

SHAPE = (1, 2, 4, 4)
TABLES = ("alphas_cumprod", "sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down")
SPACED = {"timestep_spacing": ("linspace", "leading", "trailing"), "steps_offset": (0, 1)}
RESPACED = {
    "grid": ({}, {}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True}),
    "ends": ({}, {}, {"sigma_min": 0.1, "sigma_max": 10.0}),
}
BETAS = {
    "betas": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
    ),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
}
SDE = "sde-dpmsolver++"
FINAL = {"final_sigmas_type": ("zero", "sigma_min")}
DPM = {
    "solver_order": (1, 2, 3),
    "solver_type": ("midpoint", "heun", "bh2"),
    "lower_order_final": (True, False),
    **FINAL,
    "algorithm_type": ("dpmsolver++", SDE),
}
SIGMAS = {**BETAS, **SPACED, **RESPACED}
HALF_WAY = {**SIGMAS, "prediction_type": ("epsilon", "v_prediction")}
EDM = {
    "sigma_min": (0.002, 0.02),
    "sigma_max": (80.0, 120.0),
    "sigma_data": (0.5, 1.0),
    "sigma_schedule": ("karras", "exponential"),
    "prediction_type": ("epsilon", "v_prediction"),
    "rho": (7.0, 5.0),
}
SHIFTED = {"shift": (1.0, 3.0), "num_train_timesteps": (1000, 500)}
# by class: the values of each key, or of several keys that go together
CHOICES: dict[str, Mapping[str, tuple[Any, ...]]] = {
    "DDPMScheduler": {
        **BETAS,
        **SPACED,
        "clip_sample": (False,),
        "variance_type": ("fixed_small", "fixed_small_log", "fixed_large"),
    },
    "DEISMultistepScheduler": {**SIGMAS, "solver_order": (1, 2, 3), "lower_order_final": (True, False)},
    "DPMSolverMultistepScheduler": {**SIGMAS, **DPM, "euler_at_final": (True, False), "use_lu_lambdas": (False, True)},
    "DPMSolverSDEScheduler": HALF_WAY,
    "DPMSolverSinglestepScheduler": {**BETAS, **RESPACED, **DPM},
    "EDMDPMSolverMultistepScheduler": {
        **EDM,
        **DPM,
        # the last step of noise at sigma_min is the root of one float32 rounding
        "algorithm_type": ({"algorithm_type": "dpmsolver++"}, {"algorithm_type": SDE, "final_sigmas_type": "zero"}),
    },
    "EDMEulerScheduler": {**EDM, **FINAL},
    "EulerDiscreteScheduler": {**SIGMAS, **FINAL},
    "FlowMatchEulerDiscreteScheduler": {
        **SHIFTED,
        "grid": RESPACED["grid"],
        "use_dynamic_shifting": (False, True),
        "time_shift_type": ("exponential", "linear"),
        "shift_terminal": (None, 0.1),
        "stochastic_sampling": (False, False, True),
    },
    "FlowMatchHeunDiscreteScheduler": SHIFTED,
    "HeunDiscreteScheduler": SIGMAS,
    "KDPM2AncestralDiscreteScheduler": HALF_WAY,
    "KDPM2DiscreteScheduler": HALF_WAY,
    "TCDScheduler": {**BETAS, "eta": (0.0, 0.3, 1.0), "original_inference_steps": (50, 100)},
    "UniPCMultistepScheduler": {
        **SIGMAS,
        **FINAL,
        "solver_order": (1, 2, 3),
        "solver_type": ("bh1", "bh2"),
        "predict_x0": (True, True, False),
        "lower_order_final": (True, True, False),
        "disable_corrector": ([], [0, 1]),
        "zero_snr": ({}, {"rescale_betas_zero_snr": True}),
    },
}


def _modules() -> list[Any]:
    """The files of diffusers' schedulers; that of torchsde's too, without torchsde."""
    names = (
        *(
            "ddim",
            "ddpm",
            "deis_multistep",
            "dpmsolver_multistep",
            "dpmsolver_sde",
            "dpmsolver_singlestep",
            "edm_euler",
        ),
        *("edm_dpmsolver_multistep", "euler_ancestral_discrete", "euler_discrete", "flow_match_euler_discrete"),
        *("flow_match_heun_discrete", "heun_discrete", "k_dpm_2_ancestral_discrete", "k_dpm_2_discrete", "lcm", "pndm"),
        *("tcd", "unipc_multistep"),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))  # its tree is never asked for
        return [importlib.import_module(f"{diffusers.__name__}.schedulers.scheduling_{name}") for name in names]


MODULES = _modules()


def scheduler_class(name: str) -> Any:
    return next(getattr(module, name) for module in MODULES if hasattr(module, name))


def drawn(name: str, draw: random.Random) -> dict[str, Any]:
    """A random legal config of a class, which it names."""
    config: dict[str, Any] = {"_class_name": name}
    for key, values in CHOICES[name].items():
        value = draw.choice(values)
        config |= value if isinstance(value, dict) else {key: value}
    return config


def walk(
    reference: Any, sampler: Sampler, steps: int, seed: int, mu: float | None = None, strength: float = 1.0
) -> tuple[float, float]:
    """(worst difference of a call over the largest value, worst difference of a timestep), each call from one input."""
    begin = sampler.begins_at(strength, steps)
    if getattr(sampler, "rescale_betas_zero_snr", False):  # in float32 on nearly zero: every processor has its own
        ours = torch.tensor(sampler.process.schedule.alphas_cumprod())
        ours[-1] = reference.alphas_cumprod[-1]  # which it has set to 2^-24
        torch.testing.assert_close(reference.alphas_cumprod, ours, rtol=1e-6, atol=1e-7)
        reference.alphas_cumprod = ours
    reference.set_timesteps(steps, **({} if mu is None else {"mu": mu}))
    if hasattr(reference, "set_begin_index"):
        reference.set_begin_index(begin)  # as pipelines do, for timesteps that stand twice
    assert sampler.calls(steps) == len(reference.timesteps)
    sigma = float(reference.init_noise_sigma) if hasattr(reference, "init_noise_sigma") else 1.0
    assert sampler.init_noise_sigma(steps) == pytest.approx(sigma, rel=1e-6)
    for table in TABLES:
        if isinstance(getattr(reference, table, None), torch.Tensor):
            setattr(reference, table, getattr(reference, table).double())
    numbers = np.random.default_rng(seed)
    x, history, worst, late = numbers.standard_normal(SHAPE) * sigma, [], 0.0, 0.0
    for step in range(begin, len(reference.timesteps)):
        t = reference.timesteps[step]
        output, noise = numbers.standard_normal(SHAPE), numbers.standard_normal(SHAPE)
        assert len(history) == sampler.memory(step, steps) or 0 < begin
        made = sampler.coefficients(step, steps, len(history))
        late = max(late, abs(made.timestep - float(t)))
        scaled = getattr(reference, "scale_model_input", lambda sample, _: sample)(torch.tensor(x), t)
        np.testing.assert_allclose(made.input_scale * x, scaled.numpy(), rtol=2e-6, atol=1e-9)
        following = stepped(reference, sampler, torch.tensor(output), t, torch.tensor(x), noise, made, history)
        assert np.isfinite(following).all(), f"stock is not finite at step {step}, and this is drawn"
        columns = [x, output, noise, *history]
        rows = [sum(w * column for w, column in zip(row, columns, strict=True)) for row in made.matrix]
        peak = max(float(np.abs(array).max()) for array in (x, following, *history))
        worst = max(worst, float(np.abs(rows[0] - following).max()) / peak)
        x, history = following, rows[1:]
    return worst, late


def allowed(config: Mapping[str, Any]) -> float:
    """The difference of a call that diffusers' own roundings explain: its tables are float32, by the processor's logs.

    Noise that is the root of a difference between two levels multiplies them, most of all where both are sigma_min.
    """
    last = config.get("algorithm_type") == SDE and config.get("final_sigmas_type") == "sigma_min"
    return 1e-5 if last or "Ancestral" in config["_class_name"] else 1e-6


def stepped(
    reference: Any, sampler: Sampler, output: Any, t: Any, x: Any, noise: Any, made: Any, history: Any
) -> np.ndarray:
    """diffusers' next sample, with `noise` wherever it draws."""
    vars(sys.modules[type(reference).__module__])["randn_tensor"] = lambda shape, **_: torch.tensor(noise)
    more = {"eta": sampler.eta} if "eta" in inspect.signature(reference.step).parameters else {}
    if type(reference).__name__ == "DPMSolverSDEScheduler":
        fresh = noise
        if history:  # the whole step's noise, of which the first call drew the first part
            reference.noise_sampler = lambda s, end: torch.tensor(whole(history[1], fresh, float(s), float(end)))
        else:
            reference.noise_sampler = lambda s, end: torch.tensor(fresh)
    return reference.step(output, t, x, **more).prev_sample.double().numpy()


def whole(first: np.ndarray, second: np.ndarray, s: float, end: float) -> np.ndarray:
    middle = math.exp((math.log(s) + math.log(end)) / 2)
    return (math.sqrt(s - middle) * first + math.sqrt(middle - end) * second) / math.sqrt(s - end)
