"""Train the judge: contrastive learning of augmented real pictures against captions without skin tones."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from diffship.core.lazy import lazy
from diffship.training.judge_model import Judge
from diffship.training.pictures import Pictures

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from torch.nn import functional as F
else:
    torch, F = lazy("torch"), lazy("torch.nn.functional")

STYLE_HELD_OUT = 0.2
Encode: TypeAlias = "Callable[[Sequence[str]], tuple[Tensor, Tensor]]"


def sees(record: dict[str, Any]) -> bool:
    """Whether the judge may learn from a picture.

    It never sees a held-out skin-tone combination, nor the second drawing style of one concept in five: those prove
    that it recognises objects.
    """
    return record["split"] == "train" and not (record["style"] == "google" and style_held_out(record["concept"]))


def style_held_out(concept: str) -> bool:
    return random.Random(f"judge {concept}").random() < STYLE_HELD_OUT


class JudgeTask:
    """Each batch holds distinct concepts, so that no negative is in truth a positive; six in ten are of the domain."""

    def __init__(self, judge: Judge, pictures: Pictures, encode: Encode, domain_share: float = 0.6) -> None:
        self.judge, self.pictures, self.encode, self.share = judge, pictures, encode, domain_share
        self.modules = {"judge": judge}
        self.rows: dict[str, list[int]] = {}
        for row, record in enumerate(pictures.records):
            self.rows.setdefault(record["concept"], []).append(row)
        domain = {record["concept"] for record in pictures.records if record["domain"]}
        self.inside, self.outside = sorted(domain), sorted(set(self.rows) - domain)

    def loss(self, batch: int, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        inside = round(batch * self.share)
        concepts = _choose(self.inside, inside, generator) + _choose(self.outside, batch - inside, generator)
        rows = [self.rows[c][int(torch.randint(len(self.rows[c]), (), generator=generator))] for c in concepts]
        pixels = distort(self.pictures.take(torch.tensor(rows)), generator)
        seen = self.judge.see(pixels)
        read = self.judge.read(*self.encode([self._caption(row, generator) for row in rows]))
        logits = seen @ read.T * self.judge.log_scale.exp().clamp(max=50)
        target = torch.arange(batch)
        loss = (F.cross_entropy(logits, target, label_smoothing=0.05) + F.cross_entropy(logits.T, target)) / 2
        return loss, {"top1": (logits.argmax(1) == target).float().mean().item()}

    def _caption(self, row: int, generator: torch.Generator) -> str:
        record = self.pictures.records[row]
        if record["tags"] and torch.rand((), generator=generator) < 0.2:
            tag = record["tags"][int(torch.randint(len(record["tags"]), (), generator=generator))]
            return f"{record['concept']} {tag}"
        return str(record["concept"])


def _choose(names: Sequence[str], count: int, generator: torch.Generator) -> list[str]:
    return [names[int(i)] for i in torch.randperm(len(names), generator=generator)[:count]]


def distort(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, scale, shift, mirror, tint and blur (b, 3, s, s) pictures in [-1, 1] over a white ground.

    Blur matters most: the auto-encoder of a small model is soft, and softness must not decide the score.
    """
    count = len(pixels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    angle, scale = uniform(-0.25, 0.25), uniform(0.85, 1.3)
    mirror = torch.where(uniform(0, 1) < 0.3, -1.0, 1.0)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    rows = torch.stack([cos * mirror, -sin, uniform(-0.15, 0.15), sin * mirror, cos, uniform(-0.15, 0.15)], dim=1)
    grid = F.affine_grid(rows.view(count, 2, 3), [count, 3, 64, 64], align_corners=False)
    moved = F.grid_sample(F.interpolate(pixels, size=(64, 64), mode="area") - 1, grid, align_corners=False) + 1
    tinted = (moved + 1) * uniform(0.85, 1.05, 3, 1, 1) - 1 + uniform(-0.05, 0.05, 1, 1, 1)
    soft = uniform(0, 1) < 0.5
    for size in (32, 24):
        blurred = F.interpolate(F.interpolate(tinted, size=(size, size), mode="area"), size=(64, 64), mode="bilinear")
        tinted = torch.where((soft & (uniform(0, 1) < 0.5))[:, None, None, None], blurred, tinted)
    noise = torch.randn(tinted.shape, generator=generator) * uniform(0, 0.06, 1, 1, 1)
    return (tinted + noise).clamp(-1, 1)
