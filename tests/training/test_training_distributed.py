"""Two processes share a batch: the same weights on both, and a checkpoint that one process goes on from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

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

ENDING = """
import atexit, os, sys
import torch.distributed as dist
from diffship.core.distributed import end
from diffship.training.loop import leave

def run(code, rank):
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"file://{sys.argv[1]}-{code}")
    atexit.register(lambda: os.write(1, f"{code} {rank}\\n".encode()))  # one write: lines of two do not mix
    leave()
    end(code if rank == 0 else 0)

children = {}
for code in map(int, sys.argv[2:]):
    for rank in range(2):
        child = os.fork()  # torch is imported once
        if not child:
            run(code, rank)
        children[child] = (code, rank)
for child, (code, rank) in children.items():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (code if rank == 0 else 0), (code, rank)
"""


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.skipif(os.name != "posix", reason="it forks")
def test_a_process_that_has_left_a_run_ends_with_the_code_of_its_command(tmp_path: Path) -> None:
    """Two processes for each code, and what was registered for the end is done as well."""
    codes = (0, 1, 2, 5, 130)
    (tmp_path / "program.py").write_text(ENDING, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "meet"), *map(str, codes)],
        capture_output=True,
        text=True,
        timeout=60,
        env={**_environment(), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n")[:-1]) == sorted(f"{code} {rank}" for code in codes for rank in range(2))


def test_the_first_process_alone_writes_the_whole_auto_encoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffship.training import emoji_stages
    from diffship.training.checkpoint import save_start

    vae = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    modules = {"vae": vae}
    save_start(tmp_path / "state.safetensors", modules)
    monkeypatch.setenv("RANK", "1")
    emoji_stages.save_whole(vae, tmp_path, modules)  # type: ignore[arg-type]
    assert not (tmp_path / "vae.safetensors").exists()
    monkeypatch.setenv("RANK", "0")
    emoji_stages.save_whole(vae, tmp_path, modules)  # type: ignore[arg-type]
    whole = (tmp_path / "vae.safetensors").read_bytes()
    assert set(load_file(tmp_path / "vae.safetensors")) == set(vae.state_dict())

    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffship.training.saving.tensor_file.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        emoji_stages.save_whole(vae, tmp_path, modules)  # type: ignore[arg-type]
    assert (tmp_path / "vae.safetensors").read_bytes() == whole
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.safetensors", "vae.safetensors"]


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
