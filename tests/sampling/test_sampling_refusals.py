"""What a scheduler config may not say, and how the refusal reads."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling_toy import toy_for

from diffship.core.errors import ConfigError, DiffshipError, UnsupportedError
from diffship.sampling.sampler import BetasSampler
from diffship.sampling.samplers import SAMPLERS, make_sampler

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}


@pytest.mark.parametrize(
    ("name", "changes", "word"),
    [
        ("ddim", {"clip_sample": True}, "clip_sample"),
        ("lcm", {"clip_sample": True}, "clip_sample"),
        ("ddim", {"thresholding": True}, "thresholding"),
        ("dpmpp-2m", {"thresholding": True}, "thresholding"),
        ("dpmpp-2m", {"variance_type": "learned"}, "variance_type"),
        ("euler", {"interpolation_type": "log_linear"}, "interpolation_type"),
    ],
)
def test_unbuilt_options_are_named(name: str, changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UnsupportedError, match=word):
        make_sampler({**SD, **changes}, name)


@pytest.mark.parametrize("kind", [None, False, "fixed_small"])
def test_a_variance_that_is_not_learned_has_no_say_in_dpmpp(kind: object) -> None:
    made = make_sampler({**SD, "variance_type": kind}, "dpmpp-2m")
    plain = make_sampler(SD, "dpmpp-2m")
    assert np.array_equal(made.timesteps(10), plain.timesteps(10)) and made == plain


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("euler-a", {"prediction_type": "sample"}),
        ("pndm", {"prediction_type": "sample"}),
        ("ddim", {"prediction_type": "noise"}),
        ("ddim", {"beta_schedule": "sigmoid"}),
        ("ddim", {"timestep_spacing": "random"}),
        ("ddim", {"beta_start": -1.0}),
        ("ddim", {"beta_end": "0.02"}),
        ("ddim", {"num_train_timesteps": 10**9}),
        ("ddim", {"steps_offset": 1.5}),
        ("ddim", {"trained_betas": [0.1, 0.2]}),
        ("ddim", {"trained_betas": [0.5] * 999 + [1.5]}),
        ("ddim", {"trained_betas": [0.5] * 999 + [float("nan")]}),
        ("dpmpp-2m", {"final_sigmas_type": "one"}),
        ("dpmpp-2m", {"solver_type": "rk4"}),
        ("nosuch", {}),
    ],
)
def test_absurd_values_are_config_errors(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        make_sampler({**SD, **changes}, name)


def test_other_solvers_by_class_are_refused() -> None:
    base = {**SD, "_class_name": "DPMSolverMultistepScheduler"}
    with pytest.raises(UnsupportedError, match="algorithm_type"):
        make_sampler({**base, "algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"})
    with pytest.raises(ConfigError, match="LMSDiscrete"):
        make_sampler({**SD, "_class_name": "LMSDiscreteScheduler"})


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("steps", [0, -1, 151, 2.0, True, 10**30, float("inf")])
def test_steps_out_of_range(name: str, steps: Any) -> None:
    with pytest.raises(ConfigError, match="steps"):
        make_sampler({**SD, "skip_prk_steps": True}, name).calls(steps)


def test_steps_that_diffusers_refuses_too() -> None:
    with pytest.raises(ConfigError, match="at most 50"):
        make_sampler(SD, "lcm").calls(51)
    with pytest.raises(ConfigError, match="at least 4"):
        make_sampler(SD, "pndm").calls(3)
    with pytest.raises(ConfigError, match="fewer"):
        make_sampler({**SD, "num_train_timesteps": 20}, "ddim").calls(20)
    with pytest.raises(ConfigError, match="steps_offset"):
        make_sampler({**SD, "steps_offset": 100}, "ddim").calls(25)


def test_zero_snr_with_epsilon_has_no_first_step() -> None:
    sampler = make_sampler({**SD, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}, "ddim")
    with pytest.raises(ConfigError, match="zero terminal SNR"):
        sampler.coefficients(0, 10)
    sampler.coefficients(1, 10)


def test_no_such_call_or_history() -> None:
    sampler = make_sampler(SD, "dpmpp-2m")
    for step, age in ((-1, 0), (10, 0), (0, 1), (3, 2)):
        with pytest.raises(ConfigError):
            sampler.coefficients(step, 10, age)


@pytest.mark.parametrize("name", SAMPLERS)
def test_configs_survive_the_round_trip_and_diffusers(name: str) -> None:
    model = toy_for(name)
    more = {"steps_offset": 1, "skip_prk_steps": True, "prediction_type": "v_prediction"}
    sampler = make_sampler(
        {**model.scheduler, **(more if "beta_start" in model.scheduler else {}), "use_dynamic_shifting": False}, name
    )
    config = sampler.to_config()
    assert make_sampler(config) == sampler
    assert sampler.name == name
    if name == "dpmpp-sde":  # needs torchsde; test_sampling_solvers.py has its timesteps
        return
    theirs = getattr(diffusers, sampler.diffusers_class).from_config(config)
    theirs.set_timesteps(10)
    np.testing.assert_allclose(theirs.timesteps.numpy(), np.asarray(sampler.timesteps(10)), atol=2e-4)
    if isinstance(sampler, BetasSampler):
        assert np.array_equal(theirs.timesteps.numpy()[::2], np.asarray(sampler.timesteps(10))[::2])
        assert np.array_equal(theirs.alphas_cumprod.numpy(), sampler.alphas_cumprod())


def test_class_name_chooses_and_minus_infinity_is_default() -> None:
    config = {**SD, "_class_name": "DPMSolverMultistepScheduler", "lambda_min_clipped": float("-inf")}
    assert make_sampler(config).name == "dpmpp-2m"
    assert make_sampler({**config, "use_karras_sigmas": True}).name == "dpmpp-2m-karras"
    assert make_sampler({**config, "use_karras_sigmas": True}, "dpmpp-2m").name == "dpmpp-2m"


def test_without_history_a_step_is_first_order() -> None:
    base = {**SD, "_class_name": "DPMSolverMultistepScheduler"}
    second, first = make_sampler(base), make_sampler({**base, "solver_order": 1})
    for step in range(10):
        assert second.coefficients(step, 10, 0).matrix[0] == first.coefficients(step, 10, 0).matrix[0]
    plms = make_sampler({**SD, "skip_prk_steps": True}, "pndm")
    assert plms.coefficients(1, 10, 0).matrix == ((1.0, 0.0, 0.0),)
    ddim = make_sampler(SD, "ddim")
    assert np.allclose(plms.coefficients(5, 10, 0).matrix[0], ddim.coefficients(4, 10).matrix[0])


KEYS = [
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type"),
    *("timestep_spacing", "steps_offset", "rescale_betas_zero_snr", "use_karras_sigmas", "sigma_min", "sigma_max"),
    *("solver_order", "solver_type", "final_sigmas_type", "lambda_min_clipped", "original_inference_steps"),
    *("timestep_scaling", "clip_sample", "algorithm_type", "skip_prk_steps", "set_alpha_to_one", "_class_name"),
]
WORDS = ["linear", "squaredcos_cap_v2", "sample", "v_prediction", "trailing", "leading", "sigma_min", "heun", "Evil"]
VALUES = st.one_of(
    *(st.none(), st.booleans(), st.integers(-5, 2000), st.integers(), st.floats(), st.floats(0, 1)),
    *(st.sampled_from(WORDS), st.text(max_size=5), st.lists(st.floats(0, 1), max_size=3)),
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4), st.sampled_from(sorted(SAMPLERS)), st.integers(1, 60)
)
def test_any_config_steps_or_is_refused(changes: dict[str, Any], name: str, steps: int) -> None:
    try:
        sampler = make_sampler({**SD, **changes}, name)
        assert np.isfinite(sampler.init_noise_sigma(steps))
        for step in range(sampler.calls(steps)):
            made = sampler.coefficients(step, steps, sampler.memory(step, steps))
            assert all(type(entry) is float for row in made.matrix for entry in row)
    except DiffshipError:
        pass


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_legal_number_of_steps_does_not_open_the_cache_to_its_equals(name: str) -> None:
    sampler = make_sampler({**SD, "skip_prk_steps": True}, name)
    assert sampler.calls(4) >= 4
    with pytest.raises(ConfigError, match="steps"):
        sampler.calls(4.0)  # type: ignore[arg-type]
