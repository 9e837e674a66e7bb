"""Each device holds its own stages alone: bytes of parameters that are really allocated, counted by storage."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")

from test_partition_diffusers import draw, pipeline  # noqa: E402
from test_partition_distributed import free_port  # noqa: E402
from test_partition_unet import opened  # noqa: E402

import diffship  # noqa: E402
from diffship.core.errors import RunnerError, UnsupportedError  # noqa: E402
from diffship.models.walks.cuts import find_cuts, held_bytes, partition  # noqa: E402

# tensors are copied to another index of the CPU, as to another GPU, and then lie in memory of their own
OTHER, THIRD = "cpu:1", "cpu:2"


def allocated(tensors: Iterable[Any]) -> int:
    """Bytes of the storages behind the tensors, each once."""
    return sum({each.data_ptr(): each.nbytes() for each in (one.untyped_storage() for one in tensors)}.values())


def everywhere() -> int:
    """Bytes behind all parameters of this process."""
    gc.collect()
    found = (each for each in gc.get_objects() if isinstance(each, torch.nn.Parameter))
    return allocated(each for each in found if not each.is_meta)


def on_devices(parallel: diffship.AsyncDenoiser) -> list[int]:
    """Bytes of the modules that run on each device."""
    found: dict[int, list[Any]] = {}
    for half, row in enumerate(parallel._halves):
        for (device, _), runner in row._runners.items():
            place = half * len({seat for seat, _ in row._runners}) + device
            found.setdefault(place, []).extend(runner._module.parameters())  # type: ignore[attr-defined]
    return [allocated(found[place]) for place in sorted(found)]


def shares(parallel: diffship.AsyncDenoiser) -> list[int]:
    """What each device should hold, by the weights that the cut gives its stages."""
    return held_bytes(parallel._stages, parallel.cuts.homes)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny-sd", "tiny-sdxl"])
def test_each_device_holds_its_stage_alone_and_the_pipeline_is_whole_again(name: str) -> None:
    pipe = pipeline(name)
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    same, whole, picture = list(pipe.unet.parameters()), allocated(pipe.unet.parameters()), draw(pipe)
    with diffship.AsyncDenoiser(pipe, 2, warm_up=20):
        assert allocated(pipe.unet.parameters()) == whole and len(pipe.unet.state_dict()) == len(before)
    held = everywhere()
    with diffship.AsyncDenoiser(pipe, 2, warm_up=20, devices=["cpu", OTHER]) as parallel:
        expected = shares(parallel)
        assert on_devices(parallel) == pytest.approx(expected, rel=0.1) and max(expected) < 0.9 * whole
        assert allocated(pipe.unet.parameters()) == pytest.approx(expected[0], rel=0.1)
        # no device and no hidden copy has more: only the time embedding is there twice
        assert everywhere() - held == pytest.approx(sum(expected) - whole, abs=0.1 * min(expected))
        assert torch.equal(draw(pipe), picture)
        with pytest.raises(UnsupportedError, match="leave the AsyncDenoiser to read or save"):
            pipe.unet.state_dict()
    after = pipe.unet.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items()) and len(after) == len(before)
    assert [id(each) for each in pipe.unet.parameters()] == [id(each) for each in same]
    assert everywhere() == held and torch.equal(draw(pipe), picture)


@pytest.mark.slow
def test_halves_and_an_extra_device_hold_their_own_and_home_may_hold_nothing() -> None:
    pipe = pipeline()
    with diffship.AsyncDenoiser(pipe, 2, 2, devices=["cpu", OTHER, THIRD]) as parallel:
        first, last = shares(parallel)
        assert on_devices(parallel) == pytest.approx([first, last, last], rel=0.1)
    devices = [OTHER, THIRD, OTHER, THIRD]
    with diffship.AsyncDenoiser(pipe, 2, devices=devices, cfg_parallel=True) as parallel:
        assert on_devices(parallel) == pytest.approx([first, last, first, last], rel=0.1)
        assert allocated(pipe.unet.parameters()) == 0 and pipe.unet.device == torch.device("cpu")
        assert pipe.unet.dtype == torch.float32


@pytest.mark.slow
def test_weights_come_back_after_a_fault_wherever_it_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}

    def whole() -> bool:
        return all(torch.equal(value, before[key]) for key, value in pipe.unet.state_dict().items())

    with pytest.raises(KeyError), diffship.AsyncDenoiser(pipe, devices=["cpu", OTHER]):
        raise KeyError("stop")
    assert whole()
    held, parallel = everywhere(), diffship.AsyncDenoiser(pipe, devices=[OTHER, "nowhere"])
    with pytest.raises(RuntimeError, match="nowhere"), parallel:
        pass
    assert whole() and everywhere() == held  # the first stage's copy is not left on its device
    to, calls = torch.Tensor.to, []

    def full(tensor: Any, *args: Any, **more: Any) -> Any:
        if args[:1] == (torch.device("cpu"),) and not calls:
            calls.append(1)
            raise RuntimeError("out of memory")
        return to(tensor, *args, **more)

    with pytest.raises(RunnerError, match="1 tensors of the U-Net could not come back to cpu: out of memory"):
        with diffship.AsyncDenoiser(pipe, devices=["cpu", OTHER]):
            monkeypatch.setattr(torch.Tensor, "to", full)
    assert whole()


@pytest.mark.slow
def test_weights_come_back_after_an_exit_that_was_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C while the first one's exit copies: what is still away is neither lost nor saved as nothing."""
    pipe = pipeline()
    before = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    parallel = diffship.AsyncDenoiser(pipe, devices=["cpu", OTHER])
    to, calls = torch.Tensor.to, []

    def stopped(tensor: Any, *args: Any, **more: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return to(tensor, *args, **more)

    with pytest.raises(KeyboardInterrupt), parallel:
        monkeypatch.setattr(torch.Tensor, "to", stopped)
    monkeypatch.undo()
    with pytest.raises(UnsupportedError, match="leave the AsyncDenoiser to read or save"):
        pipe.unet.state_dict()
    with parallel:
        draw(pipe)
    after = pipe.unet.state_dict()
    assert len(after) == len(before) and all(torch.equal(after[key], value) for key, value in before.items())


@pytest.mark.slow
def test_what_comes_back_can_be_trained_and_goes_where_the_pipeline_went() -> None:
    pipe = pipeline()
    with torch.inference_mode(), diffship.AsyncDenoiser(pipe, devices=["cpu", OTHER]):
        draw(pipe)
    assert not any(parameter.is_inference() for parameter in pipe.unet.parameters())
    with diffship.AsyncDenoiser(pipe, devices=["cpu", OTHER]):
        pipe.unet.to(torch.float64)
    assert {parameter.dtype for parameter in pipe.unet.parameters()} == {torch.float64}


@pytest.mark.slow
def test_it_is_entered_once_at_a_time() -> None:
    pipe = pipeline()
    picture, parallel = draw(pipe), diffship.AsyncDenoiser(pipe, warm_up=20, devices=["cpu", OTHER])
    with parallel:
        with pytest.raises(UnsupportedError, match="leave the AsyncDenoiser"), parallel:
            pass
        with pytest.raises(UnsupportedError, match="leave the AsyncDenoiser"):
            diffship.AsyncDenoiser(pipe)
        assert torch.equal(draw(pipe), picture)
    assert torch.equal(draw(pipe), picture)


@pytest.mark.slow
def test_a_rank_loads_its_own_stage_alone() -> None:
    port, child = free_port(), Path(__file__).with_name("memory_child.py")
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(child)],
            env={**os.environ, **place, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        ends = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], ends
    component, _ = opened("tiny-sd")
    cuts = find_cuts(component, 2)
    expected = held_bytes(partition(component, cuts), cuts.homes)
    assert [int(told) for told, _ in ends] == pytest.approx(expected, rel=0.1)
