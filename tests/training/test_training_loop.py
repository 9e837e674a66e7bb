"""The loop: resume to the same bits, rates, averages, divergence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from diffship.training.loop import DivergedError, Schedule, load_average, step_generator, train


class Line:
    """Fit y = 3x by a small network; every batch comes from the step's generator."""

    def __init__(self, poison_at: int = -1) -> None:
        torch.manual_seed(7)
        self.net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
        self.modules = {"net": self.net}
        self.calls = 0
        self.poison_at = poison_at

    def loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(batch, 1, generator=generator)
        loss = (self.net(x) - 3 * x).square().mean()
        self.calls += 1
        return loss * (float("nan") if self.calls == self.poison_at else 1), {"mse": loss.item()}


def _weights(task: Line) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for value in task.net.parameters()])


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path) -> None:
    whole, first, second = Line(), Line(), Line()
    schedule = Schedule(steps=40, batch=8, rate=1e-2, warmup=5, decay=10, log_every=10)
    train(whole, schedule, tmp_path / "whole")
    # The rate before the decay does not depend on `steps`, so a shorter run is a prefix of the longer one.
    train(first, Schedule(steps=17, batch=8, rate=1e-2, warmup=5, log_every=10), tmp_path / "parts")
    assert train(second, schedule, tmp_path / "parts") == 40
    assert torch.equal(_weights(whole), _weights(second))
    assert second.calls == 23


def test_the_average_is_what_a_checkpoint_gives_back(tmp_path: Path) -> None:
    task, fresh = Line(), Line()
    train(task, Schedule(steps=60, batch=8, rate=5e-2, warmup=1, ema=0.9), tmp_path)
    assert load_average(tmp_path / "state.safetensors", {"net": fresh.net}) == 60
    assert not torch.equal(_weights(task), _weights(fresh))
    x = torch.linspace(-1, 1, 16)[:, None]
    assert (fresh.net(x) - 3 * x).square().mean() < (Line().net(x) - 3 * x).square().mean() / 2


def test_thirty_steps_lower_the_loss_by_a_fifth(tmp_path: Path) -> None:
    task = Line()
    before = task.loss(256, step_generator(1, 10_000))[0].item()
    train(task, Schedule(steps=30, batch=32, rate=5e-2, warmup=1), tmp_path)
    assert task.loss(256, step_generator(1, 10_000))[0].item() < 0.8 * before


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_checkpoint(tmp_path: Path) -> None:
    train(Line(), Schedule(steps=5, batch=4, rate=1e-2), tmp_path)
    before = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(DivergedError, match="step 7"):
        train(Line(poison_at=3), Schedule(steps=20, batch=4, rate=1e-2), tmp_path)
    assert (tmp_path / "state.safetensors").read_bytes() == before


def test_rates_rise_stay_and_fall() -> None:
    schedule = Schedule(steps=100, batch=1, rate=2.0, warmup=10, decay=20)
    assert schedule.rate_at(0) == pytest.approx(0.2)
    assert schedule.rate_at(9) == schedule.rate_at(50) == schedule.rate_at(80) == 2.0
    assert schedule.rate_at(90) == pytest.approx(1.0)
    assert schedule.rate_at(99) == pytest.approx(0.1)
