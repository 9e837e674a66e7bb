"""Sessions with device buffers, tried in host memory: binding, constants and captures are the same there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from handmade import unet_like

from diffship.core.errors import ConfigError, RunnerError, UnsupportedError
from diffship.runtimes.engines import onnxruntime_sessions as module
from diffship.runtimes.engines.engine import make_engine
from diffship.runtimes.engines.onnxruntime_sessions import (
    CpuSession,
    DeviceSession,
    GraphSession,
    require_placement,
)

runtime = pytest.importorskip("onnxruntime")


class Watched:
    """An InferenceSession that writes down the graph ids of its runs."""

    def __init__(self, model: bytes) -> None:
        self.inner = runtime.InferenceSession(model, providers=["CPUExecutionProvider"])
        self.ids: list[str | None] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def run_with_iobinding(self, binding: Any, options: Any = None) -> None:
        self.ids.append(options and options.get_run_config_entry("gpu_graph_id"))
        self.inner.run_with_iobinding(binding, options)


@pytest.fixture
def watched() -> Watched:
    return Watched(unet_like().SerializeToString())


def feeds(batch: int = 2, seed: int = 0) -> dict[str, np.ndarray]:
    draw = np.random.default_rng(seed)
    shapes = {"sample": (batch, 4, 8, 8), "timestep": (batch,), "encoder_hidden_states": (batch, 3, 8)}
    return {name: draw.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def right(watched: Watched, given: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(CpuSession(watched.inner).run(given, ["out_sample"])[0])


@pytest.mark.parametrize("kind", [DeviceSession, GraphSession])
def test_bound_buffers_give_what_plain_calls_give(watched: Watched, kind: Any) -> None:
    session = kind(watched, runtime, "cpu", 0)
    for seed in range(3):
        given = feeds(seed=seed)
        (found,) = session.run(given, ["out_sample"])
        np.testing.assert_array_equal(found, right(watched, given))
    kept = session.keep(given["encoder_hidden_states"])
    (found,) = session.run({**given, "encoder_hidden_states": kept}, ["out_sample"])
    np.testing.assert_array_equal(found, right(watched, given))


def test_results_are_not_overwritten_by_the_next_call(watched: Watched) -> None:
    session = GraphSession(watched, runtime, "cpu", 0)
    first, second = feeds(seed=1), feeds(seed=2)
    (found,) = session.run(first, ["out_sample"])
    session.run(second, ["out_sample"])
    np.testing.assert_array_equal(found, right(watched, first))


def test_each_combination_of_shapes_has_a_graph_of_its_own(watched: Watched) -> None:
    session = GraphSession(watched, runtime, "cpu", 0)
    for batch in (1, 2, 1, 2):
        session.run(feeds(batch), ["out_sample"])
    assert watched.ids == ["-1", "1", "-1", "2", "1", "2"], "a run without a graph tells the shapes, once"


def called(session: GraphSession, watched: Watched, *batches: int) -> list[str | None]:
    """The graph ids of calls of these batches, whose results are right."""
    before = len(watched.ids)
    for batch in batches:
        (found,) = session.run(feeds(batch, seed=before), ["out_sample"])
        np.testing.assert_array_equal(found, right(watched, feeds(batch, seed=before)))
    return watched.ids[before:]


def test_beyond_the_limit_a_call_is_one_run_without_a_graph(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPTURED_SHAPES", 2)
    session = GraphSession(watched, runtime, "cpu", 0)
    kept = session.keep(feeds(3)["encoder_hidden_states"])
    assert called(session, watched, 1, 2) == ["-1", "1", "-1", "2"]
    (found,) = session.run({**feeds(3), "encoder_hidden_states": kept}, ["out_sample"])
    np.testing.assert_array_equal(found, right(watched, feeds(3)))
    # three combinations by turns, two of them with a graph: none pushes another one out
    assert called(session, watched, *[1, 2, 3] * 5) == ["1", "2", "-1"] * 5


def test_shapes_of_now_take_the_graph_of_shapes_of_long_ago(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CAPTURED_SHAPES", 2)
    session = GraphSession(watched, runtime, "cpu", 0)
    called(session, watched, 1, 2, 1)
    assert called(session, watched, 3, 3, 3, 3, 3) == ["-1", "-1", "-1", "-1", "3", "3"], "2 was used least recently"
    assert called(session, watched, 1, 2) == ["1", "-1"]
    assert len(session._captured) == 2


def test_faults_do_not_switch_graphs_off(watched: Watched) -> None:
    session = GraphSession(watched, runtime, "cpu", 0)
    for _ in range(2 * module.CAPTURED_SHAPES):
        with pytest.raises(RunnerError, match="onnxruntime stopped"):
            session.run(feeds(1), ["no such output"])
    (probe, graph, again) = called(session, watched, 1, 1)
    assert probe == "-1" and graph == again != "-1"


def test_graphs_that_nothing_frees_are_bounded(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GRAPHS_EVER", 1)
    session = GraphSession(watched, runtime, "cpu", 0)
    assert called(session, watched, 1, 2, 2, 1) == ["-1", "1", "-1", "-1", "1"]


def test_a_constant_is_copied_when_it_changes(watched: Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    session = GraphSession(watched, runtime, "cpu", 0)
    given = feeds()
    one, other = (session.keep(feeds(seed=seed)["encoder_hidden_states"]) for seed in (3, 4))
    session.run({**given, "encoder_hidden_states": one}, ["out_sample"])
    slot = next(iter(session._captured.values()))
    copied: list[str] = []
    for name, value in slot.inputs.items():
        slot.inputs[name] = SimpleNamespace(
            update_inplace=lambda array, name=name, value=value: (copied.append(name), value.update_inplace(array))
        )
    session.run({**given, "encoder_hidden_states": one}, ["out_sample"])
    assert copied == ["sample", "timestep"]
    (found,) = session.run({**given, "encoder_hidden_states": other}, ["out_sample"])
    np.testing.assert_array_equal(found, right(watched, {**given, "encoder_hidden_states": other.array}))
    copied.clear()
    (found,) = session.run({**given, "encoder_hidden_states": one.array}, ["out_sample"])
    assert copied[-1] == "encoder_hidden_states"
    (found,) = session.run({**given, "encoder_hidden_states": other}, ["out_sample"])
    np.testing.assert_array_equal(found, right(watched, {**given, "encoder_hidden_states": other.array}))


def test_a_call_that_fails_leaves_no_buffers_and_a_closed_session_says_so(watched: Watched) -> None:
    session = GraphSession(watched, runtime, "cpu", 0)
    session.run(feeds(), ["out_sample"])
    with pytest.raises(RunnerError, match="onnxruntime stopped"):
        session.run({**feeds(), "sample": np.zeros((2, 9, 8, 8), np.float32)}, ["out_sample"])
    session.run(feeds(), ["out_sample"])
    assert len(session._captured) == 1
    session.close()
    with pytest.raises(RunnerError, match="is closed"):
        session.run(feeds(), ["out_sample"])


def test_a_graph_that_was_dropped_leaves_its_id_to_nobody(watched: Watched) -> None:
    session = GraphSession(watched, runtime, "cpu", 0)
    for batch in (1, 2):
        session.run(feeds(batch), ["out_sample"])
    with pytest.raises(RunnerError, match="onnxruntime stopped"):
        session.run(feeds(1), ["no such output"])
    for batch in (1, 2):
        (found,) = session.run(feeds(batch), ["out_sample"])
        np.testing.assert_array_equal(found, right(watched, feeds(batch)))
    assert watched.ids == ["-1", "1", "-1", "2", "1", "-1", "3", "2"]


def assigned(**ops: list[str]) -> Any:
    parts = [
        SimpleNamespace(ep_name=f"{name}ExecutionProvider", get_nodes=lambda ops=ops: [
            SimpleNamespace(op_type=op) for op in ops
        ])
        for name, ops in ops.items()
    ]  # fmt: skip
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: parts)


def test_heavy_operators_on_the_host_are_refused() -> None:
    require_placement(assigned(CUDA=["Conv", "Attention"], CPU=["Shape", "Gather", "Concat"]), "1.31")
    require_placement(SimpleNamespace(), "1.20")
    words = r"onnxruntime 1\.24 would compute 2 Attention, 1 Conv on the host.*pip install --upgrade onnxruntime-gpu"
    with pytest.raises(UnsupportedError, match=words):
        require_placement(assigned(CPU=["Attention", "Conv", "Attention", "Shape"]), "1.24")


def test_this_version_tells_where_it_places(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HEAVY", {"Mul"})
    options = runtime.SessionOptions()
    options.add_session_config_entry(module.PLACEMENT, "1")
    session = runtime.InferenceSession(unet_like().SerializeToString(), options, providers=["CPUExecutionProvider"])
    with pytest.raises(UnsupportedError, match="on the host"):
        require_placement(session, runtime.__version__)


def test_graphs_are_an_option_of_the_gpu() -> None:
    made = make_engine("onnxruntime", {"device": "cuda", "graphs": True})
    assert made._providers(SimpleNamespace(get_available_providers=lambda: ["CUDAExecutionProvider"]))[0][1] == {  # type: ignore[attr-defined]
        "device_id": "0", "arena_extend_strategy": "kSameAsRequested", "use_tf32": "0", "enable_cuda_graph": "1",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="graphs"):
        make_engine("onnxruntime", {"graphs": True})
