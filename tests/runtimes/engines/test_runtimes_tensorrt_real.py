"""What of the real libraries can be proved without a GPU, and what cannot be without one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.core.errors import BundleError, MissingExtra, RunnerError, UnsupportedError
from diffship.runtimes.engines.gpu_tensor import GpuTensor
from diffship.runtimes.engines.tensorrt import TensorRtRunner
from diffship.runtimes.engines.tensorrt.device import Device, cuda_runtime, gpu_count
from diffship.runtimes.engines.tensorrt.plan import load_engine
from diffship.targets.tensorrt.plan import PlanFacts, PlanInput, PlanOutput


def cuda() -> Any:
    try:
        return cuda_runtime("tensorrt-rtx")
    except MissingExtra as fault:
        pytest.skip(str(fault))


def without_gpu() -> Any:
    module = cuda()
    try:
        gpu_count(module)
    except UnsupportedError:
        return module
    pytest.skip("this machine has a GPU")


def doubling(trt: Any, sm: str) -> bytes:
    """A plan that adds `sample` to itself, of any batch from 1 to 4."""
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    sample = network.add_input("sample", trt.float32, (-1, 8))
    layer = network.add_elementwise(sample, sample, trt.ElementWiseOperation.SUM)
    layer.get_output(0).name = "out_sample"
    network.mark_output(layer.get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, sm), 0)
    profile = builder.create_optimization_profile()
    profile.set_shape("sample", (1, 8), (2, 8), (4, 8))
    config.add_optimization_profile(profile)
    return bytes(memoryview(builder.build_serialized_network(network, config)))


def test_every_name_that_is_used_of_rtx_exists(rtx: Any) -> None:
    used = {
        rtx.Runtime: "deserialize_cuda_engine get_engine_validity",
        rtx.ICudaEngine: "num_io_tensors num_optimization_profiles device_memory_size_v2 get_tensor_name "
        "get_tensor_mode get_tensor_dtype get_tensor_location get_tensor_shape get_tensor_profile_shape "
        "create_runtime_config create_execution_context",
        rtx.IRuntimeConfig: "cuda_graph_strategy create_runtime_cache set_runtime_cache "
        "set_execution_context_allocation_strategy",
        rtx.IRuntimeCache: "serialize deserialize",
        rtx.IExecutionContext: "set_device_memory set_optimization_profile_async set_input_shape infer_shapes "
        "get_tensor_shape set_tensor_address execute_async_v3 is_stream_capturable",
        rtx.Refitter: "get_all_weights get_weights_prototype set_named_weights get_missing_weights refit_cuda_engine",
        rtx.ILogger.Severity: "INTERNAL_ERROR ERROR",
        rtx.TensorIOMode: "INPUT OUTPUT",
        rtx.TensorLocation: "DEVICE HOST",
        rtx.EngineValidity: "INVALID",
        rtx.CudaGraphStrategy: "WHOLE_GRAPH_CAPTURE DISABLED",
        rtx.ExecutionContextAllocationStrategy: "USER_MANAGED",
    }
    lacking = [
        f"{kind.__name__}.{name}" for kind, names in used.items() for name in names.split() if not hasattr(kind, name)
    ]
    assert lacking == []
    assert {code.name for code in (rtx.float32, rtx.float16, rtx.bfloat16, rtx.int64)} == {
        "FLOAT",
        "HALF",
        "BF16",
        "INT64",
    }


def test_rtx_reads_a_memory_map_and_refuses_garbage(rtx: Any, tmp_path: Path) -> None:
    (tmp_path / "model.plan").write_bytes(b"no plan at all. " * 64)
    with pytest.raises(BundleError, match="unet is damaged, or no plan of tensorrt_rtx"):
        load_engine(rtx, tmp_path / "model.plan", "unet")


def test_rtx_without_a_driver_says_so(rtx: Any, tmp_path: Path) -> None:
    without_gpu()
    (tmp_path / "model.plan").write_bytes(doubling(rtx, "SM89"))
    with pytest.raises(UnsupportedError, match=r"unet does not load here: \w.*Run: diffship doctor"):
        load_engine(rtx, tmp_path / "model.plan", "unet")


def test_cuda_takes_every_call_as_it_is_made() -> None:
    """Without a driver each call ends in CUDA's error 35: names, order and types of arguments were right then."""
    module = without_gpu()
    device = Device.__new__(Device)
    device.index, device._cuda = 0, module
    calls = {
        "use": (), "capability": (), "model": (), "allocate": (64,), "pinned": (64,), "upload": (1, 1, 1, 1),
        "download": (1, 1, 1, 1), "copy": (1, 1, 1, 1), "stream": (), "synchronize": (1,), "begin_capture": (1,),
        "launch": (1, 1),
    }  # fmt: skip
    for name, arguments in calls.items():
        with pytest.raises(RunnerError, match=r"CUDA: .*driver"):
            getattr(device, name)(*arguments)
    for name in ("free", "free_graph", "free_stream", "settle"):
        getattr(device, name)(1)
    assert device.end_capture(1) is None


@pytest.mark.usefixtures("rtx")
def test_probe_does_not_stop_for_want_of_a_driver() -> None:
    without_gpu()
    probe = TensorRtRunner.probe()
    assert not probe.available and "rtx 1." in probe.version and "no NVIDIA GPU can be used" in probe.reason


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False])
def test_a_plan_built_here_runs_here(rtx: Any, tmp_path: Path, graphs: bool) -> None:
    torch = pytest.importorskip("torch")
    try:
        gpu_count(cuda())
        own = Device(0, "tensorrt-rtx").capability()
    except UnsupportedError as fault:
        pytest.skip(str(fault))
    if not hasattr(rtx.ComputeCapability, f"SM{own}"):
        pytest.skip(f"TensorRT-RTX {rtx.__version__} has no engines for SM {own}")
    (tmp_path / "model.plan").write_bytes(doubling(rtx, f"SM{own}"))
    shapes = {"min": [1, 8], "opt": [2, 8], "max": [4, 8]}
    inputs, outputs = {"sample": PlanInput("float32", (shapes,))}, {"out_sample": PlanOutput("float32")}
    facts = PlanFacts("rtx", rtx.__version__, "fp32", inputs, outputs, (own,))
    (tmp_path / "model.json").write_text(json.dumps(facts.to_json()))
    session = TensorRtRunner(graphs=graphs, runtime_cache=str(tmp_path / "kernels")).open(
        [tmp_path / "model.plan", tmp_path / "model.json"]
    )
    for batch in (1, 2, 4, 2, 2, 1):
        sample = np.random.default_rng(batch).standard_normal((batch, 8), np.float32)
        (result,) = session.run({"sample": sample}, ["out_sample"])
        np.testing.assert_array_equal(result, sample + sample)
        (result,) = session.run({"sample": session.keep(sample)}, ["out_sample"])
        np.testing.assert_array_equal(result, sample + sample)
        there = GpuTensor(torch.from_numpy(sample).cuda())
        (left,) = session.run_on_gpu({"sample": there}, ["out_sample"], there)
        assert left.tensor.is_cuda and torch.equal(left.tensor, there.tensor + there.tensor)
    session.close()
