"""The samplers of every family over random legal configs, call by call, against diffusers' own schedulers."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import math
import random
import re
import types
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sampling_oracle import CHOICES, HALF_WAY, MODULES, SDE, SIGMAS, allowed, drawn, scheduler_class, walk
from sampling_toy import OTHERS, toy_for

from diffship.core.errors import ConfigError, UnsupportedError
from diffship.sampling.generate import Request, settings, start
from diffship.sampling.samplers import SAMPLERS, make_sampler
from diffship.sampling.sigmas import beta_quantile
from diffship.sampling.wire import pack, unpack

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def quantiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours stand for scipy's, which another test holds against an integral."""
    beta = types.SimpleNamespace(ppf=lambda share, a, b: beta_quantile(share))
    for module in MODULES:
        monkeypatch.setattr(module, "is_scipy_available", lambda: True, raising=False)
        monkeypatch.setattr(module, "scipy", types.SimpleNamespace(stats=types.SimpleNamespace(beta=beta)), False)
        monkeypatch.setattr(module, "randn_tensor", None, raising=False)  # `stepped` sets it, and this takes it back


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOICES)
def test_every_call_equals_diffusers(name: str) -> None:
    taken = 0
    for seed in range(5 if CHOICES[name] in (HALF_WAY, SIGMAS) else 14):  # these make 1000 steps when they are made
        draw = random.Random(f"{name} {seed}")
        config, steps = drawn(name, draw), draw.choice((1, 2, 3, 4, 5, 6, 7, 9, 12, 14, 15, 16, 20))
        reference, mu = scheduler_class(name).from_config(dict(config)), None
        try:
            sampler = make_sampler(config)
            if config.get("use_dynamic_shifting"):
                sampler = sampler.sized(draw.choice((256, 1024, 4096)))
                mu = sampler.mu
            worst, late = walk(reference, sampler, steps, seed, mu, draw.choice((1.0, 1.0, 0.6)) if steps > 2 else 1.0)
        except (ConfigError, UnsupportedError) as refused:
            assert re.search("final_sigmas_type|solver_order is 3|shift_terminal", str(refused)), (config, steps)
            continue
        taken += 1
        assert worst <= allowed(config), (worst, config, steps)
        assert late <= 2e-4, (late, config, steps)
    assert taken >= 5


def test_unipc_is_refused_where_stock_gets_nan_and_nowhere_else() -> None:
    refused = 0
    keys = {"predict_x0": (True, False), "lower_order_final": (True, False), "final_sigmas_type": ("zero", "sigma_min")}
    for order, kind, *values in itertools.product((1, 2, 3), ("bh1", "bh2"), *keys.values()):
        config = {"_class_name": "UniPCMultistepScheduler", "solver_order": order, "solver_type": kind}
        config |= dict(zip(keys, values, strict=True))
        reference, x = scheduler_class("UniPCMultistepScheduler").from_config(config), torch.ones(1, 4)
        reference.set_timesteps(4)
        try:
            for t in reference.timesteps:
                x = reference.step(0.1 * x, t, x).prev_sample
        except torch.linalg.LinAlgError:  # of order 3, in place of NaN
            x = x * torch.nan
        try:
            sampler = make_sampler(config)
            [sampler.coefficients(step, 4, sampler.memory(step, 4)) for step in range(4)]
        except ConfigError:
            refused += 1
            assert not torch.isfinite(x).all(), config
        else:
            assert torch.isfinite(x).all(), config
    assert 0 < refused < 48


# What is not to be carried in a config: it has no say without a key that is refused, or none in the steps.
MOOT = {
    *("dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range", "flow_shift", "time_shift_type"),
    *("shift_terminal", "noise_sampler_seed"),
}
MOOT_IN = {
    "LCMScheduler": {"set_alpha_to_one"},  # the last step is to no noise whatever it says
    "TCDScheduler": {"set_alpha_to_one"},
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_key_of_diffusers_class_is_carried_or_refused(name: str) -> None:
    sampler = make_sampler(toy_for(name).scheduler, name)
    kind = scheduler_class(sampler.diffusers_class)
    keys = {key: one for key, one in inspect.signature(kind.__init__).parameters.items() if key != "self"}
    carried = {field.name: field for field in fields(sampler)}
    left = keys.keys() - carried.keys() - sampler.refused.keys() - MOOT - MOOT_IN.get(kind.__name__, set())
    assert not left
    absent = type(sampler).from_config({"clip_sample": False})
    for key in keys.keys() & carried.keys():
        said, ours = keys[key].default, getattr(absent, key)
        infinite = isinstance(said, float) and math.isinf(said)
        assert ours == (None if infinite else tuple(said) if isinstance(said, list) else said), key


def test_the_page_tells_the_class_of_every_sampler() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    rows = [line.split("|") for line in page.splitlines() if re.match(r"\| `.*Scheduler`", line)]
    told = {name: (cells[2], cells[4]) for cells in rows for name in re.findall(r"`([a-z0-9-]+)`", cells[1])}
    assert told.keys() == SAMPLERS.keys()
    for name, (kind, noisy) in told.items():
        sampler = make_sampler(toy_for(name).scheduler, name).sized(1024)
        assert f"`{sampler.diffusers_class}`" in kind
        drawn = any(sampler.coefficients(step, 6, sampler.memory(step, 6)).noisy for step in range(sampler.calls(6)))
        assert noisy.strip().startswith("yes" if drawn else ("no", "if"))


def test_beta_quantiles_are_those_of_the_distribution() -> None:
    """The share below a quantile, by Gauss's rule in u = t^0.6, where the density is smooth."""
    nodes, weights = np.polynomial.legendre.leggauss(60)
    mass = math.gamma(0.6) ** 2 / math.gamma(1.2)
    for share in (0.001, 0.05, 0.2, 0.4, 0.5):
        top = beta_quantile(share) ** 0.6
        u = (nodes + 1) / 2 * top
        found = (weights / 2 * top * (1 - u ** (1 / 0.6)) ** -0.4).sum() / 0.6 / mass
        assert found == pytest.approx(share, rel=1e-9)
        assert beta_quantile(1 - share) == pytest.approx(1 - beta_quantile(share), rel=1e-12)
    assert (beta_quantile(0.0), beta_quantile(1.0)) == (0.0, 1.0)


SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}


@pytest.mark.parametrize(("size", "tokens"), [((512, 512), 1024), ((1024, 768), 3072)])
def test_a_request_settles_the_shift_for_the_size_of_its_picture(size: tuple[int, int], tokens: int) -> None:
    """Levels are e^mu / (e^mu + 1 / t - 1), and mu is on the line from (256, 0.5) to (4096, 1.15)."""
    model = toy_for("flow-heun")
    trajectory = start(model, Request("x", sampler="flow-heun", size=size, steps=5))[0]
    mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
    t = np.linspace(1.0, 0.001, 5)
    levels = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    assert trajectory.sampler.mu == pytest.approx(mu)
    np.testing.assert_allclose(trajectory.sampler.timesteps(5)[::2], 1000 * levels, rtol=1e-6)
    assert unpack(pack(trajectory)).sampler == trajectory.sampler
    assert "spacing" not in settings(trajectory)
    with pytest.raises(ConfigError, match="size of the picture is not settled"):
        make_sampler(model.scheduler).coefficients(0, 5)


def test_heun_on_a_shifted_flow_is_heuns_method() -> None:
    """The network's output is linear in x and t, and the end is that of the method written out."""
    sampler = make_sampler({**SD3, "base_shift": 0.7, "max_shift": 1.3}, "flow-heun").sized(1600)
    s = sampler.noise_levels(6)

    def slope(x: np.ndarray, t: float) -> np.ndarray:
        return 0.8 * x - 1.5 * t + 0.2

    ours = expected = np.linspace(-2, 2, 9)
    history: list[np.ndarray] = []
    for call in range(sampler.calls(6)):
        now = sampler.coefficients(call, 6, len(history))
        columns = [ours, slope(now.input_scale * ours, now.timestep / 1000), None, *history]
        ours, *history = (sum(w * column for w, column in zip(row, columns, strict=True) if w) for row in now.matrix)
    for begin, end in itertools.pairwise(s):
        first = slope(expected, begin)
        second = slope(expected + (end - begin) * first, end) if end else first
        expected = expected + (end - begin) * (first + second) / 2
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    assert sampler.calls(6) == 11


@pytest.mark.parametrize("name", ["dpmpp-sde", "heun", "kdpm2", "kdpm2-a"])
def test_two_calls_are_one_step_of_what_begins_later_and_of_what_lost_its_history(name: str) -> None:
    sampler = make_sampler(toy_for(name).scheduler, name)
    assert sampler.begins_at(0.5, 10) == 10 and sampler.calls(10) == 19
    assert sampler.noising(10, 10) == (1.0, sampler.noise_levels(10)[5])
    clean, noise = np.full(4, 0.3), np.array([-1.0, 0.5, 2.0, 0.1])
    x = clean + sampler.noising(10, 10)[1] * noise
    for call in range(10, 19):  # an ideal network, which knows the picture, leads to it; and no call has history
        now = sampler.coefficients(call, 10)
        level = 1 / now.input_scale**2 - 1
        output = (x - clean) / level**0.5
        x = sum(w * column for w, column in zip(now.matrix[0], (x, output, 0 * noise), strict=True))
    np.testing.assert_allclose(x, clean, atol=1e-9)


@pytest.mark.parametrize(
    ("config", "name", "words"),
    [
        (OTHERS["flow"], "euler", ("use_dynamic_shifting", "flow-euler, flow-heun")),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler"}, "ddim", ("_class_name", "flow-euler, flow-heun")),
        (OTHERS["edm"], "unipc", ("sigma_data", "edm-dpmpp, edm-euler")),
        (OTHERS["edm"], "flow-euler", ("sigma_data", "flow matching")),
        ({"_class_name": "DDIMScheduler"}, "edm-euler", ("_class_name", "EDM")),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, None, ("use_flow_sigmas", "flow-euler")),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, None, ("invert_sigmas",)),
        ({"_class_name": "EDMDPMSolverMultistepScheduler", "solver_order": 3, "algorithm_type": SDE}, None, ("order",)),
        ({"_class_name": "HeunDiscreteScheduler", "clip_sample": True}, None, ("clip_sample",)),
        ({"_class_name": "DDPMScheduler"}, None, ("clip_sample", "absent")),
        ({"_class_name": "UniPCMultistepScheduler", "solver_p": "DDIMScheduler"}, None, ("solver_p",)),
    ],
)
def test_other_noise_and_options_that_are_not_carried_are_refused(
    config: dict[str, Any], name: str | None, words: tuple[str, ...]
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        make_sampler(config, name)
    assert all(word in str(caught.value) for word in ("scheduler_config.json", *words))


@pytest.mark.parametrize(
    ("config", "word"),
    [
        ({"_class_name": "HeunDiscreteScheduler", "use_karras_sigmas": True, "use_beta_sigmas": True}, "only one"),
        ({"_class_name": "KDPM2DiscreteScheduler", "prediction_type": "sample"}, "prediction"),
        ({"_class_name": "UniPCMultistepScheduler", "solver_order": 4}, "solver_order"),
        ({"_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "learned"}, "variance_type"),
        ({"_class_name": "DDPMScheduler", "clip_sample": False, "beta_schedule": "laplace"}, "beta_schedule"),
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 1.0, "rho": 0.0}, "rho"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "time_shift_type": "cubic"}, "time_shift_type"),
    ],
)
def test_values_that_diffusers_refuses_or_that_are_not_built_name_the_key(config: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        make_sampler(config)


FIRST = ("ddim", "dpmpp-2m", "dpmpp-2m-karras", "euler", "euler-a", "lcm", "pndm")
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False}
DIGEST = "0c19a3fb762c34e02e6f7e18a829b678e3ae126de358bf40162b1b6a1f2b1a33"


def test_the_first_samplers_step_as_they_always_did() -> None:
    """A digest of what the seven samplers of 0.1.0 did at commit 2729a12, before the process stood beside the sampler.

    Made by this very loop there. Ten digits: the last ones of logarithms and powers differ between machines.
    """
    digest = hashlib.sha256()
    more = ({}, {"timestep_spacing": "trailing"}, ZERO_SNR, {"final_sigmas_type": "sigma_min"})
    for name, prediction, keys in itertools.product(FIRST, ("epsilon", "v_prediction"), more):
        config = {**SD, "steps_offset": 1, "skip_prk_steps": True, "prediction_type": prediction, **keys}
        sampler = make_sampler(config, name)
        for step in range(sampler.calls(9)):
            for age in range(sampler.memory(step, 9) + 1):
                now = sampler.coefficients(step, 9, age)
                values = (now.input_scale, now.timestep, *(entry for row in now.matrix for entry in row))
                digest.update(" ".join(f"{value + 0.0:.9e}" for value in values).encode())
    assert digest.hexdigest() == DIGEST
