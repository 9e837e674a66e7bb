"""Modules that take turns in one loop: as optimisers of their own would have it, and the same bits after a stop."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffship.training.loop import Schedule, step_generator, train
from diffship.training.vae_task import DECODER, DISCRIMINATOR, ENCODER, Turns


class Duel:
    """A generator draws, a critic tells; both learn at step 0, and later one after the other."""

    def __init__(self) -> None:
        self.rates = {"critic": 5.0}
        torch.manual_seed(3)
        self.maker, self.critic = nn.Linear(2, 2), nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1))
        self.modules = {"maker": self.maker, "critic": self.critic}
        self.turn: tuple[str, ...] = ()

    def begin(self, step: int) -> tuple[str, ...]:
        self.turn = ("maker", "critic") if step == 0 else (("critic",) if step % 3 else ("maker",))
        return self.turn

    def loss(self, batch: int, generator: torch.Generator) -> tuple[torch.Tensor, dict[str, float]]:
        noise, real = (torch.randn(batch, 2, generator=generator) for _ in range(2))
        drawn = self.maker(noise)
        terms = [drawn.square().mean() - self.critic(drawn).mean()] if "maker" in self.turn else []
        if "critic" in self.turn:
            terms.append(self.critic(drawn.detach()).mean() - self.critic(real).mean())
        return torch.stack(terms).sum(), {}


def weights(task: Duel) -> torch.Tensor:
    return torch.cat([value.detach().flatten() for module in task.modules.values() for value in module.parameters()])


def test_turns_are_what_two_optimisers_make_of_them(tmp_path: Path) -> None:
    schedule = Schedule(steps=8, batch=4, rate=1e-2, warmup=1, ema=0.5, clip=1e6)
    ours, theirs = Duel(), Duel()
    train(ours, schedule, tmp_path)
    facts = {"weight_decay": 1e-2, "betas": (0.9, 0.99), "fused": True}
    adams = {
        name: torch.optim.AdamW(module.parameters(), lr=1e-2 * theirs.rates.get(name, 1.0), **facts)  # type: ignore[arg-type]
        for name, module in theirs.modules.items()
    }
    average = {name: [v.detach().clone() for v in module.parameters()] for name, module in theirs.modules.items()}
    for step in range(8):
        turn = theirs.begin(step)
        for module in theirs.modules.values():
            module.zero_grad()
        theirs.loss(4, step_generator(0, step))[0].backward()
        for name in turn:
            adams[name].step()
            for kept, live in zip(average[name], theirs.modules[name].parameters(), strict=True):
                kept.lerp_(live.detach(), 1 - schedule.ema_at(step))
    assert torch.equal(weights(ours), weights(theirs))
    state = load_file(tmp_path / "state.safetensors")
    assert torch.equal(state["average/critic/0.weight"], average["critic"][0])
    assert {key: state[f"step/{key}"].item() for key in ("maker/weight", "critic/0.weight")} == {
        "maker/weight": 3.0,
        "critic/0.weight": 6.0,
    }
    assert all(value.requires_grad for module in ours.modules.values() for value in module.parameters())


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_duel_equals_an_uninterrupted_one_bit_for_bit(stop: int, tmp_path: Path) -> None:
    whole, first, second = Duel(), Duel(), Duel()
    train(whole, Schedule(9, 4, 1e-2), tmp_path / "whole")
    train(first, Schedule(stop, 4, 1e-2), tmp_path / "parts")
    train(second, Schedule(9, 4, 1e-2), tmp_path / "parts")
    assert torch.equal(weights(whole), weights(second))


@pytest.mark.parametrize("turns", [Turns(None), Turns(4, 3, 2), Turns(0, 5), Turns(2, 0, 1, encoder=False)])
def test_turns_are_counted_as_they_are_taken(turns: Turns) -> None:
    taken: Counter[str] = Counter()
    for step in range(40):
        assert {name: turns.learnt(name, step) for name in (ENCODER, DECODER, DISCRIMINATOR)} == {
            name: taken[name] for name in (ENCODER, DECODER, DISCRIMINATOR)
        }
        taken.update(turns.at(step))


def test_the_published_schedule_is_one_of_ours() -> None:
    """Hybrid SD: 5,000 steps of the discriminator, then decoder, encoder and five of the discriminator, over again."""
    turns = Turns(start=0, alone=5000)
    assert {turns.at(step) for step in range(5000)} == {(DISCRIMINATOR,)}
    cycle = [(DECODER,), (ENCODER,), *[(DISCRIMINATOR,)] * 5]
    assert [turns.at(step) for step in range(5000, 5014)] == cycle * 2
    assert turns.adversarial(0) and not Turns(None).adversarial(10**6)
