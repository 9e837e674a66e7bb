"""Every sampler, step by step from the same input, against diffusers' own scheduler."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from diffship.sampling.kernel import apply_matrix
from diffship.sampling.samplers import make_sampler

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
KIND = {
    "ddim": ("DDIMScheduler", {"clip_sample": False}),
    "dpmpp-2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp-2m-karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler-a": ("EulerAncestralDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", {}),
}
STEPS = (1, 2, 4, 7, 20, 25, 50)
SHAPE = (1, 4, 8, 8)


def widened(scheduler: Any) -> Any:
    """The same scheduler with its tables in float64, so that its own rounding does not count."""
    for name in ("alphas_cumprod", "sigmas", "final_alpha_cumprod"):
        table = getattr(scheduler, name, None)
        if isinstance(table, torch.Tensor):
            setattr(scheduler, name, table.double())
    return scheduler


def walk(name: str, config: dict[str, Any], steps: int, double: bool = True) -> tuple[float, float]:
    """Worst step difference over max|x|, and worst timestep difference."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = getattr(diffusers, KIND[name][0]).from_config(config)
        reference.set_timesteps(steps)
    if hasattr(reference, "set_begin_index"):
        reference.set_begin_index(0)
    sampler = make_sampler(config, name)
    assert sampler.calls(steps) == len(reference.timesteps)
    sigma = float(reference.init_noise_sigma)
    assert sampler.init_noise_sigma(steps) == pytest.approx(sigma, rel=1e-6)
    if double:
        widened(reference)
    draw = torch.Generator().manual_seed(steps)
    x = torch.randn(SHAPE, generator=draw, dtype=torch.float32) * sigma
    history: list[np.ndarray] = []
    worst, late = 0.0, 0.0
    for step, t in enumerate(reference.timesteps):
        assert len(history) == sampler.memory(step, steps)
        made = sampler.coefficients(step, steps, len(history))
        late = max(late, abs(made.timestep - float(t)))
        scaled = reference.scale_model_input(x, t)
        assert torch.allclose(scaled, x * made.input_scale, rtol=1e-6, atol=1e-6)
        output = torch.randn(SHAPE, generator=draw)
        noise_seed = 1000 + step
        extra = {"generator": torch.Generator().manual_seed(noise_seed)} if name in ("euler-a", "lcm") else {}
        wide = torch.float64 if double and name in ("ddim", "pndm") else torch.float32  # the others cast back
        following = reference.step(output.to(wide), t, x.to(wide), **extra).prev_sample.float()
        noise = torch.randn(SHAPE, generator=torch.Generator().manual_seed(noise_seed)).numpy()
        ours, *history = apply_matrix(made.matrix, x.numpy(), output.numpy(), noise, history)
        peak = max(float(x.abs().max()), float(following.abs().max()))
        worst = max(worst, float(np.abs(ours - following.numpy()).max()) / peak)
        x = following
    return worst, late


def combinations() -> list[Any]:
    out = []
    for name, prediction in itertools.product(KIND, ("epsilon", "v_prediction", "sample")):
        if prediction == "sample" and name in ("euler-a", "pndm"):
            continue
        for spacing in ("leading",) if name == "lcm" else ("leading", "linspace", "trailing"):
            out.append(pytest.param(name, prediction, spacing, id=f"{name}-{prediction}-{spacing}"))
    return out


@pytest.mark.parametrize(("name", "prediction", "spacing"), combinations())
def test_each_step_equals_diffusers(name: str, prediction: str, spacing: str) -> None:
    config = {**SD, **KIND[name][1], "prediction_type": prediction, "timestep_spacing": spacing}
    for steps in STEPS:
        worst, late = walk(name, config, steps)
        assert worst <= 1e-6, f"{steps} steps: {worst:.2e}"
        assert late == 0.0, f"{steps} steps: timesteps differ by {late}"


@pytest.mark.parametrize("name", list(KIND))
@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"trained_betas": np.linspace(0.001, 0.02, 1000).tolist()},
        {"steps_offset": 0, "set_alpha_to_one": False},
        {"set_alpha_to_one": True},
        {"prediction_type": "v_prediction", "timestep_spacing": "trailing", "rescale_betas_zero_snr": True},
        {"final_sigmas_type": "sigma_min"},
        {"solver_type": "heun"},
        {"solver_order": 1},
        {"euler_at_final": True, "final_sigmas_type": "sigma_min"},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"lambda_min_clipped": -5.1},
        {"use_karras_sigmas": True},
        {"use_karras_sigmas": True, "sigma_min": 0.1, "sigma_max": 10.0},
        {"skip_prk_steps": False},
        {"skip_prk_steps": False, "prediction_type": "v_prediction", "timestep_spacing": "linspace"},
        {"original_inference_steps": 100, "timestep_scaling": 1.0},
        {"num_train_timesteps": 500},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_config_keys_are_honoured(name: str, changes: dict[str, Any]) -> None:
    config = {**SD, **KIND[name][1], **changes}
    if name == "dpmpp-2m":  # the name promises order 2 and no Karras sigmas
        config |= {"use_karras_sigmas": False, "solver_order": 2}
    if name == "dpmpp-2m-karras":
        config |= {"use_karras_sigmas": True, "solver_order": 2}
    # torch's float32 sqrt is one ulp off on some machines, which zero-SNR betas and fractional timesteps show
    allowed = 2e-6 if "rescale_betas_zero_snr" in changes else 1e-6
    fractional = name == "euler" and "use_karras_sigmas" in changes
    for steps in (4, 7, 20):
        worst, late = walk(name, config, steps)
        assert worst <= allowed, f"{steps} steps: {worst:.2e}"
        assert late <= (1e-4 if fractional else 0.0)
