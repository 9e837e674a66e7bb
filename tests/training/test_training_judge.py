"""The judge's towers and its training step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffship.training.judge import JudgeTask, distort
from diffship.training.judge_model import Judge, JudgeConfig, load_judge, save_judge
from diffship.training.loop import Schedule, train
from diffship.training.pictures import Pictures

CONFIG = JudgeConfig(vocabulary=12, widths=(8, 8, 16, 16), caption_width=16, embedding=16, input_size=32)
COLOURS = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255), (0, 0, 0), (128, 128, 0))


def _judge() -> Judge:
    torch.manual_seed(0)
    return Judge(CONFIG)


def _pictures() -> Pictures:
    pixels = np.stack([np.full((32, 32, 3), colour, np.uint8) for colour in COLOURS])
    records = [{"concept": str(i), "tags": [], "domain": True} for i in range(len(COLOURS))]
    return Pictures(pixels, records)


def _encode(texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.tensor([[int(text), 11] for text in texts])
    return ids, torch.tensor([[1, 0]] * len(texts))


def test_a_saved_judge_sees_the_same(tmp_path: Path) -> None:
    judge = _judge().eval()
    save_judge(judge, tmp_path)
    again = load_judge(tmp_path)
    pictures = torch.rand(2, 3, 64, 64) * 2 - 1
    assert torch.allclose(judge.see(pictures), again.see(pictures), atol=2e-2)
    assert torch.allclose(again.see(pictures).norm(dim=1), torch.ones(2))


def test_masked_tokens_do_not_count() -> None:
    judge = _judge()
    ids = torch.tensor([[3, 5], [3, 7]])
    read = judge.read(ids, torch.tensor([[1, 0], [1, 0]]))
    assert torch.equal(read[0], read[1])
    assert not torch.equal(*judge.read(ids, torch.ones(2, 2)))


@pytest.mark.slow
def test_it_learns_to_tell_colours_apart(tmp_path: Path) -> None:
    judge = _judge()
    task = JudgeTask(judge, _pictures(), _encode, domain_share=1.0)
    train(task, Schedule(steps=60, batch=8, rate=3e-3, warmup=5, ema=0.9), tmp_path)
    seen = judge.see(_pictures().take(torch.arange(8)))
    scores = seen @ judge.read(*_encode([str(i) for i in range(8)])).T
    assert (scores.argmax(1) == torch.arange(8)).float().mean() >= 0.75


def test_distortion_is_repeatable_bounded_and_white_at_the_border() -> None:
    pixels = torch.ones(3, 3, 64, 64)
    one, two = (distort(pixels, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.abs().max() <= 1
    assert one.mean() > 0.7
