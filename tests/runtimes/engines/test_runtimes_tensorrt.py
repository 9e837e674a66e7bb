from __future__ import annotations

import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from tensorrt_rig import Rig, both, call, feeds, ok, right

from diffship.core.errors import BusyError, RunnerError, UnsupportedError
from diffship.core.manifest import Part
from diffship.core.spec import TensorSpec
from diffship.runtimes.engines.shell import PartRunner
from diffship.runtimes.engines.tensorrt import TensorRtRunner
from diffship.runtimes.engines.tensorrt.constants import Constants
from diffship.runtimes.engines.tensorrt.device import Device
from diffship.runtimes.engines.tensorrt.profiles import choose_profile
from diffship.runtimes.engines.tensorrt.slot import KEPT_SHAPES
from diffship.targets.tensorrt.plan import PlanInput

INPUTS = (
    TensorSpec("sample", "float32", ("batch_size", 4, "height", "width")),
    TensorSpec("timestep", "float32", ("batch_size",)),
    TensorSpec("encoder_hidden_states", "float32", ("batch_size", "sequence_length", 8)),
)
OUTPUTS = (TensorSpec("out_sample", "float32", ("batch_size", 4, "height", "width")),)


def part() -> Part:
    return Part("unet", ("unet/model.plan", "unet/model.json"), INPUTS, OUTPUTS, "fp16", "0" * 64)


@both
def test_calls_of_all_shapes_in_any_order(rig: Rig, flavour: str) -> None:
    session = rig.open(rig.plan(flavour))
    shapes = [(1, 8), (4, 32), (2, 16), (1, 8), (3, 64), (2, 16), (1, 8), (4, 32)]
    for seed, (batch, size) in enumerate(shapes):
        ok(session, feeds(batch, size, seed, states=2 + seed % 5))


@both
def test_the_shell_runs_it_in_float32(rig: Rig, flavour: str) -> None:
    values = feeds(dtype=np.float32)
    with PartRunner(part(), rig.open(rig.plan(flavour))) as runner:
        kept = runner.put(values["encoder_hidden_states"])
        result = runner.run({**values, "encoder_hidden_states": kept})["out_sample"]
    assert result.dtype == np.float32
    np.testing.assert_array_equal(result, right(values))


def test_bfloat16_is_spoken_as_float32(rig: Rig) -> None:
    session = rig.open(rig.plan(dtype="bfloat16"))
    assert session.inputs["sample"] == "float32" and session.outputs == {"out_sample": "float32"}
    ok(session, {**feeds(dtype=np.float32), "timestep": np.zeros(2, np.float32)})
    kept = session.keep(feeds(dtype=np.float32)["encoder_hidden_states"])
    values = {**feeds(dtype=np.float32), "timestep": np.zeros(2, np.float32)}
    result = call(session, {**values, "encoder_hidden_states": kept})
    np.testing.assert_array_equal(result, right(values))


def test_results_are_new_arrays(rig: Rig) -> None:
    session = rig.open()
    first = call(session, feeds(seed=1))
    before = first.copy()
    ok(session, feeds(seed=2))
    np.testing.assert_array_equal(first, before)


def test_memory_is_allocated_once_per_profile(rig: Rig) -> None:
    session = rig.open()
    ok(session, feeds(1, 8))
    after_first = rig.count("cudaMalloc"), rig.count("cudaMallocHost")
    assert after_first == (5, 4)  # four tensors, and the scratch memory
    for size in (8, 16, 24, 32):
        ok(session, feeds(4, size))
    assert (rig.count("cudaMalloc"), rig.count("cudaMallocHost")) == after_first
    ok(session, feeds(1, 64))
    assert (rig.count("cudaMalloc"), rig.count("cudaMallocHost")) == (9, 8)


# Profiles


def of(*ranges: tuple[int, int, int]) -> dict[str, PlanInput]:
    """One input `x` of two axes (side, 3)."""
    kinds = ("min", "opt", "max")
    profiles = tuple({kind: [side, 3] for kind, side in zip(kinds, sides, strict=True)} for sides in ranges)
    return {"x": PlanInput("float16", profiles)}


@pytest.mark.parametrize(
    ("side", "expected"),
    [(1, 0), (3, 0), (10, 0), (33, 1), (16, 0), (17, 1), (20, 1), (100, 1), (5, 0)],
)
def test_the_profile_with_the_nearest_best_shape(side: int, expected: int) -> None:
    # in factors, 16 = 8 * 2 = 32 / 2 is as far from both: the first is taken
    assert choose_profile(of((1, 8, 64), (4, 32, 128)), {"x": (side, 3)}) == expected


def test_of_equal_profiles_the_first() -> None:
    assert choose_profile(of((1, 4, 8), (1, 4, 8)), {"x": (4, 3)}) == 0


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (
            (200, 3),
            r"x \(200, 3\): legal is \(1 to 8, 3\) or \(16 to 32, 3\), nearest \(32, 3\)\. .*--max-shapes x:200x3",
        ),
        ((12, 3), r"nearest \(16, 3\)"),
        ((11, 3), r"nearest \(8, 3\)"),
        ((4, 5), r"nearest \(4, 3\)"),
        ((4,), r"x has shape \(4,\); the plan takes 2 axes: \(1 to 8, 3\) or \(16 to 32, 3\)"),
    ],
)
def test_shapes_out_of_all_profiles(shape: tuple[int, ...], words: str) -> None:
    with pytest.raises(UnsupportedError, match=words):
        choose_profile(of((1, 4, 8), (16, 16, 32)), {"x": shape})


def test_a_profile_must_hold_all_inputs() -> None:
    small, large = {"min": [1], "opt": [1], "max": [4]}, {"min": [8], "opt": [8], "max": [8]}
    inputs = {"a": PlanInput("float16", (small, large)), "b": PlanInput("float16", (small, large))}
    assert choose_profile(inputs, {"a": (8,), "b": (8,)}) == 1
    with pytest.raises(UnsupportedError, match=r"a \(8,\): legal is \(1 to 4\) or \(8\), nearest \(4,\)"):
        choose_profile(inputs, {"a": (8,), "b": (4,)})


def test_out_of_range_is_refused_before_the_gpu(rig: Rig) -> None:
    session = rig.open()
    with pytest.raises(UnsupportedError, match=r"sample \(2, 4, 65, 64\): legal is \(1 to 4, 4, 8 to 32, 8 to 32\) or"):
        session.run({**feeds(2, 64), "sample": np.zeros((2, 4, 65, 64), np.float16)}, ["out_sample"])
    with pytest.raises(RunnerError, match="missing feed timestep"):
        session.run({name: array for name, array in feeds().items() if name != "timestep"}, ["out_sample"])
    with pytest.raises(RunnerError, match="did you mean 'sample'"):
        session.run({**feeds(), "sampel": feeds()["sample"]}, ["out_sample"])
    assert rig.library("trt").created == 0


# Constants


def test_a_constant_is_copied_to_the_device_once(rig: Rig) -> None:
    session = rig.open(contexts=2)
    values = feeds()
    kept = session.keep(values["encoder_hidden_states"])
    before = rig.count("cudaMemcpyHostToDevice")
    for seed in range(4):
        own = feeds(seed=seed)
        expected = right({**own, "encoder_hidden_states": values["encoder_hidden_states"]})
        np.testing.assert_array_equal(call(session, {**own, "encoder_hidden_states": kept}), expected)
    assert rig.count("cudaMemcpyHostToDevice") - before == 1 + 4 * 2
    assert rig.count("cudaMemcpyDeviceToDevice") == 1  # into the input's own memory, and there it stays


def test_constants_and_feeds_take_turns(rig: Rig) -> None:
    session = rig.open()
    states = [feeds(seed=seed)["encoder_hidden_states"] for seed in (1, 2, 3)]
    kept = [session.keep(array) for array in states]
    for turn in (0, 0, 1, None, 1, 0, 2, None, 2):
        values = feeds(seed=9)
        if turn is not None:
            values["encoder_hidden_states"] = states[turn]
        fed = values if turn is None else {**values, "encoder_hidden_states": kept[turn]}
        np.testing.assert_array_equal(call(session, fed), right(values))


def test_an_abandoned_constant_is_given_back(rig: Rig) -> None:
    session = rig.open()
    values = feeds()
    kept = session.keep(values["encoder_hidden_states"])
    call(session, {**values, "encoder_hidden_states": kept})
    there = len(rig.cuda.memory)
    del kept
    gc.collect()
    ok(session, feeds(seed=3))
    assert len(rig.cuda.memory) == there - 1


def test_a_constant_that_dies_in_a_capture_is_given_back_later(rig: Rig) -> None:
    session = rig.open()
    kept = [session.keep(feeds()["encoder_hidden_states"])]
    call(session, {**feeds(), "encoder_hidden_states": kept[0]})
    there = len(rig.cuda.memory)
    rig.trt.while_recording = kept.clear
    ok(session, feeds(seed=1))
    assert not kept and len(rig.cuda.memory) == there
    ok(session, feeds(seed=2))
    assert len(rig.cuda.memory) == there - 1


def test_a_constant_is_there_for_every_stream(rig: Rig) -> None:
    device = Device(0, "tensorrt")
    device.use()
    constants = Constants(device)
    array = np.arange(6, dtype=np.float32)
    kept = constants.keep(array)
    first, second = device.stream(), device.stream()
    address, size = constants.place(kept, "float32", first)
    target = device.pinned(size)
    device.download(target.address, address, size, second)
    device.synchronize(second)
    np.testing.assert_array_equal(target.view.view(np.float32), array)
    device.free_pinned(target)
    constants.close()
    for stream in (first, second):
        device.free_stream(stream)


def test_a_constant_of_another_session_is_refused(rig: Rig) -> None:
    first, second = rig.open(), rig.open()
    kept = first.keep(feeds()["encoder_hidden_states"])
    with pytest.raises(RunnerError, match="another session"):
        second.run({**feeds(), "encoder_hidden_states": kept}, ["out_sample"])


# Threads


@both
def test_threads_with_several_contexts_give_the_serial_results(rig: Rig, flavour: str) -> None:
    session = rig.open(rig.plan(flavour), contexts=3)
    constants = [session.keep(feeds(seed=seed)["encoder_hidden_states"]) for seed in range(3)]

    def one(index: int) -> bool:
        values = feeds(2, (8, 16, 32, 64)[index % 4], index)
        values["encoder_hidden_states"] = constants[index % 3].array
        fed = {**values, "encoder_hidden_states": constants[index % 3]} if index % 2 else values
        return np.array_equal(call(session, fed), right(values))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(48)))
    assert 1 <= len(session._pool._idle) <= 3


def blocked(rig: Rig, session: Any) -> tuple[threading.Thread, threading.Event]:
    """A call that stays inside until the event is set."""
    inside, leave = threading.Event(), threading.Event()
    run = rig.cuda.view

    def waiting(*arguments: Any) -> Any:
        inside.set()
        assert leave.wait(20)
        return run(*arguments)

    rig.cuda.__dict__["view"] = waiting
    thread = threading.Thread(target=ok, args=(session, feeds()))
    thread.start()
    assert inside.wait(20)
    del rig.cuda.__dict__["view"]
    return thread, leave


def test_who_comes_too_late_waits_and_then_hears_it(rig: Rig) -> None:
    session = rig.open(contexts=1, wait_seconds=0.05)
    thread, leave = blocked(rig, session)
    started = time.perf_counter()
    with pytest.raises(BusyError, match=r"all 1 contexts were busy for 0\.05 s"):
        call(session, feeds())
    assert time.perf_counter() - started >= 0.05
    leave.set()
    thread.join()
    ok(session, feeds(seed=1))


def test_refit_waits_for_calls_and_holds_others_up(rig: Rig) -> None:
    session = rig.open(rig.plan(refit=True), contexts=2, wait_seconds=30)
    thread, leave = blocked(rig, session)
    weights = {name: np.full((1, 4, 1, 1), 3, np.float16) for name in ("scale", "shift")}
    with ThreadPoolExecutor(2) as threads:
        changing = threads.submit(session.refit, weights)
        time.sleep(0.05)
        late = threads.submit(ok, session, feeds(seed=1), scale=3, shift=3)
        time.sleep(0.05)
        assert not changing.done() and not late.done() and len(rig.cuda.streams) == 1
        leave.set()
        changing.result(20)
        late.result(20)
    thread.join()


def test_close_does_not_wait_for_ever_and_takes_nothing_from_a_call_under_way(rig: Rig) -> None:
    session = rig.open(contexts=1, wait_seconds=0.05)
    thread, leave = blocked(rig, session)
    with pytest.raises(BusyError, match=r"1 calls did not end within 0\.05 s: the engine stays open"):
        session.close()
    assert rig.cuda.streams
    leave.set()
    thread.join()
    session.close()
    assert not rig.cuda.streams


def test_close_waits_for_calls_and_ends_the_others(rig: Rig) -> None:
    session = rig.open(contexts=1, wait_seconds=30)
    thread, leave = blocked(rig, session)
    with ThreadPoolExecutor(2) as threads:
        late = threads.submit(call, session, feeds())
        closing = threads.submit(session.close)
        with pytest.raises(RunnerError, match="is closed; open it again"):
            late.result(20)
        assert not closing.done() and rig.cuda.streams
        leave.set()
        closing.result(20)
    thread.join()
    session.close()
    with pytest.raises(RunnerError, match="is closed"):
        call(session, feeds())


# CUDA graphs


def test_a_graph_is_captured_once_per_shape(rig: Rig) -> None:
    session = rig.open()
    for _ in range(4):
        for batch, size in ((1, 8), (2, 16), (2, 64)):
            ok(session, feeds(batch, size, seed=batch))
    assert rig.count("cudaStreamBeginCapture") == rig.cuda.graphs == 3
    assert rig.count("cudaGraphLaunch") == 9  # the first call of each shape ran as it is
    assert rig.trt.created == 3  # a context that was captured is not changed again


def test_changing_constants_does_not_capture_again(rig: Rig) -> None:
    session = rig.open()
    for seed in range(6):
        values = feeds(seed=seed)
        kept = session.keep(values["encoder_hidden_states"])
        np.testing.assert_array_equal(call(session, {**values, "encoder_hidden_states": kept}), right(values))
    assert rig.count("cudaStreamBeginCapture") == 1


def test_graphs_can_be_turned_off(rig: Rig) -> None:
    session = rig.open(graphs=False)
    for seed in range(3):
        ok(session, feeds(seed=seed))
    assert rig.count("cudaStreamBeginCapture") == 0


def test_only_the_latest_graphs_are_kept(rig: Rig) -> None:
    session = rig.open()
    sizes = range(8, 8 + KEPT_SHAPES + 1)
    for size in sizes:
        ok(session, feeds(1, size))
        ok(session, feeds(1, size, seed=1))
    assert rig.count("cudaStreamBeginCapture") == KEPT_SHAPES + 1 and rig.cuda.graphs == KEPT_SHAPES
    ok(session, feeds(1, sizes[1]))  # kept: it is now the latest
    assert rig.trt.created == KEPT_SHAPES + 1
    ok(session, feeds(1, sizes[0]))  # made anew, in the place of the third
    ok(session, feeds(1, sizes[1]))
    assert rig.trt.created == KEPT_SHAPES + 2


@pytest.mark.parametrize(("words", "tries"), [({"capturable": False}, 0), ({"breaks_capture": True}, 1)])
def test_what_cannot_be_captured_runs_without(rig: Rig, words: dict[str, bool], tries: int) -> None:
    session = rig.open(rig.plan(**words))
    for seed in range(5):
        ok(session, feeds(2, (8, 16)[seed % 2], seed))
    assert rig.count("cudaStreamBeginCapture") == tries and rig.cuda.graphs == 0


@pytest.mark.parametrize("graphs", [True, False])
def test_rtx_captures_by_itself(rig: Rig, graphs: bool) -> None:
    session = rig.open(rig.plan("rtx"), graphs=graphs)
    for seed in range(3):
        ok(session, feeds(seed=seed))
    (config,) = rig.rtx.configs
    assert config.cuda_graph_strategy.name == ("WHOLE_GRAPH_CAPTURE" if graphs else "DISABLED")
    assert rig.count("cudaStreamBeginCapture") == 0


# Faults


@pytest.mark.parametrize(
    "name",
    [
        "cudaMalloc", "cudaMallocHost", "cudaStreamCreateWithFlags", "cudaMemcpyAsync", "cudaStreamSynchronize",
        "cudaStreamBeginCapture", "cudaGraphInstantiate", "cudaGraphLaunch", "cudaStreamEndCapture",
    ],
)  # fmt: skip
@pytest.mark.parametrize("nth", [1, 2, 3, 5])
def test_a_fault_of_cuda_costs_one_call(rig: Rig, name: str, nth: int) -> None:
    session = rig.open()
    kept = session.keep(feeds()["encoder_hidden_states"])
    rig.cuda.faults[name] = nth
    failed = 0
    for seed in range(6):
        values = feeds(2, (16, 64)[seed % 2], seed)
        values["encoder_hidden_states"] = kept.array
        try:
            result = call(session, {**values, "encoder_hidden_states": kept})
        except RunnerError as fault:
            failed += 1
            assert str(fault).startswith("CUDA: cudaErrorIllegalAddress (cuda")
        else:
            np.testing.assert_array_equal(result, right(values))
    goes_on = name in ("cudaStreamEndCapture", "cudaGraphInstantiate")  # without a graph
    assert failed == (0 if goes_on or rig.cuda.faults[name] else 1)


@pytest.mark.parametrize("nth", [1, 2, 3])
def test_a_refused_call_costs_one_call(rig: Rig, nth: int) -> None:
    session = rig.open(rig.plan("rtx"))
    ok(session, feeds())
    rig.rtx.refuse_execution = nth
    for seed in range(1, 5):
        if seed == nth:
            with pytest.raises(RunnerError, match="tensorrt-rtx stopped: it does not say why"):
                call(session, feeds(seed=seed))
        else:
            ok(session, feeds(seed=seed))


def test_a_refused_capture_costs_nothing(rig: Rig) -> None:
    session = rig.open()
    ok(session, feeds())
    rig.trt.refuse_execution = 1
    for seed in range(3):
        ok(session, feeds(seed=seed))
    assert rig.count("cudaStreamBeginCapture") == 1 and rig.cuda.graphs == 0


def test_a_gpu_that_is_lost_can_still_be_closed(rig: Rig) -> None:
    session = rig.open()
    ok(session, feeds())
    lost = rig.cuda.cudaSetDevice
    rig.cuda.__dict__["cudaSetDevice"] = lambda index: (rig.cuda.status,)
    with pytest.raises(RunnerError, match="cudaErrorIllegalAddress"):
        call(session, feeds())
    session.close()
    rig.cuda.__dict__["cudaSetDevice"] = lost


def test_no_memory_limit_of_the_host_applies() -> None:
    assert TensorRtRunner().gate_bytes(1 << 40, "fp16") == 0
