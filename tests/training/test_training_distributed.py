"""Two processes share a batch: the same weights on both, and a checkpoint that one process goes on from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

PROGRAM = """
import sys
from pathlib import Path
import torch
from torch import nn
from diffship.training.loop import Schedule, leave, train

class Line:
    def __init__(self):
        torch.manual_seed(7)
        self.net = nn.Linear(4, 1)
        self.modules = {"net": self.net}
        self.shares = set()
    def loss(self, batch, generator):
        self.shares.add(batch)
        x = torch.randn(batch, 4, generator=generator)
        return (self.net(x) - x.sum(1, keepdim=True)).square().mean(), {}

task = Line()
train(task, Schedule(steps=20, batch=8, rate=1e-2), Path(sys.argv[1]))
import torch.distributed as dist
weights = torch.cat([value.detach().flatten() for value in task.net.parameters()])
other = [torch.empty_like(weights) for _ in range(2)]
dist.all_gather(other, weights)
assert torch.equal(*other), other
assert task.shares == {4}, task.shares
leave()
assert not dist.is_initialized()
"""


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_train_one_model(tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(tmp_path / "program.py"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=120,
        env={**_environment(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    state = load_file(tmp_path / "run" / "state.safetensors")
    assert state["step/net/weight"].item() == 20
    assert torch.isfinite(state["live/net/weight"]).all()


def _environment() -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(Path(__file__).parents[2])}
