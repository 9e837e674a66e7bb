"""The loop: resume to the same bits, rates, averages, divergence."""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffship.core import quiet
from diffship.core.errors import BusyError, Cancelled, SourceError
from diffship.training import loop
from diffship.training.checkpoint import load_average, reached
from diffship.training.loop import DivergedError, Schedule, step_generator, train


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


class Picture(Line):
    """A convolution whose weights lie channels last, as those of a U-Net in training do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.SiLU(), nn.Conv2d(6, 2, 3)).to(
            memory_format=torch.channels_last
        )
        self.modules = {"net": self.net}

    def loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(batch, 3, 6, 6, generator=generator).contiguous(memory_format=torch.channels_last)
        return (self.net(x) - x[:, :2, 2:4, 2:4]).square().mean(), {}


def test_weights_that_lie_channels_last_resume_to_the_same_bits(tmp_path: Path) -> None:
    whole, first, second = Picture(), Picture(), Picture()
    train(whole, Schedule(12, 4, 1e-2), tmp_path / "whole")
    train(first, Schedule(5, 4, 1e-2), tmp_path / "parts")
    train(second, Schedule(12, 4, 1e-2), tmp_path / "parts")
    assert torch.equal(_weights(whole), _weights(second))


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


def test_seeds_ranks_and_steps_draw_different_numbers() -> None:
    places = [(seed, step, rank) for seed in (0, 1, 2**40) for step in (0, 1, 2) for rank in (0, 1, 3)]
    drawn = {tuple(torch.rand(3, generator=step_generator(*place)).tolist()) for place in places}
    assert len(drawn) == len(places)
    # what emoji was trained with
    assert torch.equal(
        torch.rand(3, generator=step_generator(0, 77)), torch.rand(3, generator=torch.Generator().manual_seed(77))
    )


def test_rates_rise_stay_and_fall() -> None:
    schedule = Schedule(steps=100, batch=1, rate=2.0, warmup=10, decay=20)
    assert schedule.rate_at(0) == pytest.approx(0.2)
    assert schedule.rate_at(9) == schedule.rate_at(50) == schedule.rate_at(80) == 2.0
    assert schedule.rate_at(90) == pytest.approx(1.0)
    assert schedule.rate_at(99) == pytest.approx(0.1)


def test_a_gradient_that_is_not_finite_stops_before_it_spoils_the_weights(tmp_path: Path) -> None:
    class Kink(Line):
        def loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
            return (self.net(torch.ones(1, 1)) * 0).abs().sqrt().mean(), {}  # 0, with a slope that is not a number

    task = Kink()
    before = _weights(task)
    with pytest.raises(DivergedError, match=r"gradient norm is nan at step 0; no checkpoint was written yet"):
        train(task, Schedule(steps=5, batch=4, rate=1e-2), tmp_path)
    assert torch.equal(_weights(task), before)


def test_accumulated_batches_add_up_to_one_large_batch(tmp_path: Path) -> None:
    made = []
    for batch, accumulate in ((12, 1), (3, 4)):
        task = Line()
        train(task, Schedule(1, batch, 1e-2, clip=1e9, accumulate=accumulate), tmp_path / str(batch))
        assert task.calls == accumulate
        held = load_file(tmp_path / str(batch) / "state.safetensors")
        made.append(torch.cat([held[f"exp_avg/net/{name}"].flatten() for name, _ in task.net.named_parameters()]))
    assert made[0].abs().max() > 0
    torch.testing.assert_close(made[0], made[1])


def test_a_cancelled_run_keeps_what_is_done(tmp_path: Path) -> None:
    def stop(step: int, steps: int) -> None:
        if step == 7:
            raise Cancelled("enough")

    schedule = Schedule(steps=20, batch=4, rate=1e-2)
    with pytest.raises(Cancelled):
        train(Line(), schedule, tmp_path / "parts", progress=stop)
    assert reached(tmp_path / "parts" / "state.safetensors") == 7
    whole, rest = Line(), Line()
    train(whole, schedule, tmp_path / "whole")
    train(rest, schedule, tmp_path / "parts")
    assert rest.calls == 13 and torch.equal(_weights(whole), _weights(rest))
    assert reached(tmp_path / "nothing.safetensors") == 0


def test_without_an_average_a_checkpoint_holds_the_live_weights(tmp_path: Path) -> None:
    task = Line()
    train(task, Schedule(steps=9, batch=4, rate=1e-2, ema=0.0), tmp_path)
    held = load_file(tmp_path / "state.safetensors")
    for name, value in task.net.named_parameters():
        assert torch.equal(held[f"average/net/{name}"], value)


def test_no_step_is_made_while_something_is_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(quiet.PLACE, str(tmp_path / "lock"))
    monkeypatch.setattr(loop, "training", partial(quiet.training, wait=0.1))
    task = Line()
    with (tmp_path / "lock").open("w", encoding="utf-8") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        other.write("serving, process 1")
        other.flush()
        with pytest.raises(BusyError, match=r"no training starts while something is timed \(serving, process 1\)"):
            train(task, Schedule(3, 4, 1e-2), tmp_path / "run")
    assert task.calls == 0 and "the training waits for its end" in capsys.readouterr().err
    assert train(task, Schedule(3, 4, 1e-2), tmp_path / "run") == 3
    with (tmp_path / "lock").open("w", encoding="utf-8") as other:  # and lets go of it in the end
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_every_checkpoint_is_written_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[int] = []
    whole = loop.write_state

    def noted(state: Path, about: Mapping[str, Any], *rest: Any) -> None:
        written.append(about["step"])
        whole(state, about, *rest)

    monkeypatch.setattr(loop, "write_state", noted)
    train(Line(), Schedule(steps=3, batch=4, rate=1e-2), tmp_path)
    assert written == [3]
    train(Line(), Schedule(steps=3, batch=4, rate=1e-2), tmp_path)  # nothing is left to do, nor to write
    assert written == [3]
    train(Line(), Schedule(steps=5, batch=4, rate=1e-2, save_seconds=0), tmp_path)
    assert written == [3, 4, 5]


def test_a_resumed_run_in_fp16_has_the_scale_that_it_had(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale grows every three good steps: one that began anew would be another one."""
    plain = loop.new_accelerator

    def scaling(precision: str) -> Any:
        made = plain(precision)
        made.scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=3)
        return made

    def noted(folder: Path) -> dict[str, Any]:
        with safe_open(folder / "state.safetensors", "pt") as file:
            found: dict[str, Any] = json.loads(file.metadata()["state"])["scaler"]
        return found

    monkeypatch.setattr(loop, "new_accelerator", scaling)
    whole, first, second = Line(), Line(), Line()
    train(whole, Schedule(8, 4, 1e-2), tmp_path / "whole")
    train(first, Schedule(5, 4, 1e-2), tmp_path / "parts")
    assert (noted(tmp_path / "parts")["scale"], noted(tmp_path / "parts")["_growth_tracker"]) == (4.0, 2)
    train(second, Schedule(8, 4, 1e-2), tmp_path / "parts")
    assert noted(tmp_path / "whole") == noted(tmp_path / "parts")
    assert noted(tmp_path / "parts")["scale"] == 2.0 * 2 ** (8 // 3)
    assert torch.equal(_weights(whole), _weights(second))


@pytest.mark.parametrize("kept", [0, 7, 60, -1], ids=["empty", "half a length", "half a header", "a byte short"])
def test_a_damaged_checkpoint_is_named_and_says_what_to_do(tmp_path: Path, kept: int) -> None:
    state = tmp_path / "state.safetensors"
    train(Line(), Schedule(2, 4, 1e-2), tmp_path)
    state.write_bytes(state.read_bytes()[:kept])
    for opened in (
        lambda: train(Line(), Schedule(4, 4, 1e-2), tmp_path),
        lambda: load_average(state, Line().modules),
        lambda: reached(state),
    ):
        with pytest.raises(SourceError, match=r"state\.safetensors: not a valid .*Remove it, and the same command"):
            opened()


def test_a_checkpoint_of_another_run_is_named(tmp_path: Path) -> None:
    state, other = tmp_path / "state.safetensors", Line()
    other.net = nn.Sequential(nn.Linear(1, 9), nn.Tanh(), nn.Linear(9, 1))
    other.modules = {"net": other.net}
    train(other, Schedule(2, 4, 1e-2), tmp_path)
    with pytest.raises(SourceError, match=r"net/0\.weight has shape \(9, 1\), this run needs \(8, 1\)"):
        train(Line(), Schedule(4, 4, 1e-2), tmp_path)
    save_file({"live/net/0.weight": torch.ones(8, 1)}, state)
    with pytest.raises(SourceError, match=r"has no tensor average/net/0\.weight: it is of another run"):
        load_average(state, Line().modules)
    with pytest.raises(SourceError, match="its header notes no step"):
        reached(state)
