"""Tensors that stay on the GPU: torch's own, whose memory counts as that of the double, through session and shell."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from tensorrt_rig import Rig, call, feeds, right

from diffship.core.errors import RunnerError
from diffship.core.manifest import Part
from diffship.core.spec import TensorSpec
from diffship.runtimes.engines.gpu_tensor import GpuTensor, on_gpu
from diffship.runtimes.engines.shell import PartRunner

torch = pytest.importorskip("torch")

SPECS = (
    TensorSpec("sample", "float32", ("batch_size", 4, "height", "width")),
    TensorSpec("timestep", "float32", ("batch_size",)),
    TensorSpec("encoder_hidden_states", "float32", ("batch_size", "sequence_length", 8)),
)
OUTPUT = TensorSpec("out_sample", "float32", ("batch_size", 4, "height", "width"))
Put = Callable[[Any], Any]


class OnDouble(torch.Tensor):
    """A tensor of the double's GPU: its bytes are memory of the device; it notes for which streams it was exported."""

    gpu: Any = None
    number = 0
    streams: list[int] = []  # noqa: RUF012 -- of the class, as operators make new tensors
    __module__ = "torch"  # where a library is looked for

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, self.number)

    def __dlpack__(self, *, stream: int | None = None) -> Any:
        OnDouble.streams.append(stream or 0)
        plain = self.as_subclass(torch.Tensor)
        size = plain.untyped_storage().nbytes()
        start = plain.untyped_storage().data_ptr()
        self.gpu.memory[start] = ("device", (ctypes.c_uint8 * size).from_address(start))
        self.gpu.exported[start] = plain  # as the capsule of a real one does
        return plain.__dlpack__()


@pytest.fixture
def put(rig: Rig) -> Iterator[Put]:
    OnDouble.gpu, OnDouble.streams = rig.cuda, []
    rig.cuda.exported = {}
    yield lambda array: torch.from_numpy(np.array(array)).as_subclass(OnDouble)
    for start in rig.cuda.exported:
        del rig.cuda.memory[start]


def values(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.as_subclass(torch.Tensor).numpy())


@pytest.mark.parametrize("dtype", ["float16", "float32", "bfloat16"])
def test_a_session_reads_and_writes_tensors_of_its_gpu(rig: Rig, put: Put, dtype: str) -> None:
    session = rig.open(rig.plan(dtype=dtype))
    plain = feeds(dtype=np.float32)
    there = {name: GpuTensor(put(array)).as_dtype(name, session.takes[name]) for name, array in plain.items()}
    for _ in range(3):  # as it is, captured, launched
        before = dict(rig.cuda.counts)
        (found,) = session.run_on_gpu(there, ["out_sample"], there["sample"])
        assert isinstance(found.tensor, OnDouble) and str(found.tensor.dtype) == f"torch.{dtype}"
        np.testing.assert_array_equal(values(found.tensor.float()), right(plain))
        moved = {kind: rig.count(kind) - before.get(kind, 0) for kind in KINDS}
        assert moved == {"cudaMemcpyDeviceToDevice": 4, "cudaMemcpyHostToDevice": 0, "cudaMemcpyDeviceToHost": 0}
    assert {*OnDouble.streams} == {*rig.cuda.streams}, "exports order it behind the library's stream"


KINDS = ("cudaMemcpyDeviceToDevice", "cudaMemcpyHostToDevice", "cudaMemcpyDeviceToHost")


def test_tensors_constants_and_arrays_may_be_mixed(rig: Rig, put: Put) -> None:
    session = rig.open(rig.plan())
    plain, other = feeds(seed=1), feeds(seed=2)
    kept = session.keep(plain["encoder_hidden_states"])
    mixed = {**plain, "sample": GpuTensor(put(plain["sample"])), "encoder_hidden_states": kept}
    (found,) = session.run_on_gpu(mixed, ["out_sample"], mixed["sample"])
    np.testing.assert_array_equal(values(found.tensor).astype(np.float64), right(plain))
    states = {**mixed, "encoder_hidden_states": GpuTensor(put(other["encoder_hidden_states"]))}
    (found,) = session.run_on_gpu(states, ["out_sample"], mixed["sample"])
    changed = right({**plain, "encoder_hidden_states": other["encoder_hidden_states"]})
    np.testing.assert_array_equal(values(found.tensor).astype(np.float64), changed)
    (found,) = session.run_on_gpu(mixed, ["out_sample"], mixed["sample"])  # the constant is copied back in
    np.testing.assert_array_equal(values(found.tensor).astype(np.float64), right(plain))
    np.testing.assert_array_equal(call(session, plain).astype(np.float64), right(plain))


@pytest.fixture
def runner(rig: Rig) -> PartRunner:
    part = Part("unet", ("unet/model.plan", "unet/model.json"), SPECS, (OUTPUT,), "fp16", "0" * 64)
    return PartRunner(part, rig.open(rig.plan()))


def test_a_runner_answers_on_the_gpu_where_a_feed_lies(runner: PartRunner, put: Put) -> None:
    plain = feeds(dtype=np.float32)
    sample = put(np.repeat(plain["sample"], 2, axis=3))[..., ::2]  # a view with gaps
    assert not sample.is_contiguous()
    handle = runner.put(plain["encoder_hidden_states"])
    found = runner.run({"sample": sample, "timestep": put(np.float32(250)), "encoder_hidden_states": handle})
    answer = found["out_sample"]
    assert isinstance(answer, OnDouble) and answer.dtype == torch.float32
    expected = right({**plain, "timestep": np.full(2, 250.0)})
    np.testing.assert_array_equal(values(answer).astype(np.float64), expected)
    host = runner.run({**plain, "timestep": np.float32(250)})["out_sample"]
    assert isinstance(host, np.ndarray)
    np.testing.assert_array_equal(host, values(answer))


def test_what_cannot_be_taken_there_is_said(runner: PartRunner, put: Put, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = feeds(dtype=np.float32)
    plain["sample"][0, 0, 0, 0] = np.nan
    with pytest.raises(RunnerError, match=r"output out_sample has 1 NaN of 2048 values; feed sample had 1 NaN"):
        runner.run({**plain, "sample": put(plain["sample"])})
    narrow = put(plain["sample"]).to(torch.bfloat16)  # which numpy cannot hold
    with pytest.raises(RunnerError, match=r"output out_sample has 1 NaN of 2048 values; feed sample had 1 NaN"):
        runner.run({**plain, "sample": narrow})
    with pytest.raises(RunnerError, match=r"tensor sample: got shape \(2, 3, 16, 16\)"):
        runner.run({**plain, "sample": put(plain["sample"][:, :3])})
    tensor = GpuTensor(put(plain["sample"]))
    with pytest.raises(RunnerError, match=r"feed sample is torch.float32; it must be int64"):
        tensor.as_dtype("sample", "int64")
    with pytest.raises(RunnerError, match="a tensor on the GPU is float32; float16 is taken, contiguous"):
        tensor.address("float16", 101)
    with pytest.raises(RunnerError, match="a tensor on the GPU is float32; float32 is taken, contiguous"):
        GpuTensor(put(plain["sample"])[..., ::2]).address("float32", 101)
    monkeypatch.setattr(OnDouble, "__dlpack__", lambda self, stream: object())
    with pytest.raises(RunnerError, match="a tensor on the GPU cannot be read"):
        tensor.address("float32", 101)


def test_tensors_of_elsewhere_go_through_the_host(runner: PartRunner, put: Put) -> None:
    plain = feeds(dtype=np.float32)
    there = put(plain["sample"])
    assert on_gpu(there, 0) and not on_gpu(there, 1)
    assert not any(on_gpu(feed, 0) for feed in (plain["sample"], torch.zeros(2), 3.0))
    found = runner.run({**plain, "sample": torch.from_numpy(plain["sample"])})["out_sample"]
    assert type(found) is torch.Tensor
    np.testing.assert_array_equal(found.numpy().astype(np.float64), right(plain))
