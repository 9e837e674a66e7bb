from __future__ import annotations

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from handmade import INPUTS, OUTPUTS, MakeBundle, expected, feeds, unet_like

from diffship.core.bundle import Binding, Bundle
from diffship.core.errors import BundleError, ConfigError, RunnerError, UnsupportedError
from diffship.core.runner import Handle, Runner
from diffship.core.spec import TensorSpec
from diffship.runtimes.engines.arrays import as_dtype, relayout
from diffship.runtimes.engines.shell import open_runner

ENGINES = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]
every_engine = pytest.mark.parametrize("engine", ENGINES)


def right(values: dict[str, Any]) -> np.ndarray:
    return expected(values["sample"], values["timestep"], values["encoder_hidden_states"])


@every_engine
def test_canonical_names_in_and_out(bundle: Bundle, engine: str) -> None:
    values = feeds()
    with open_runner(bundle, "unet", engine) as runner:
        assert isinstance(runner, Runner)
        assert [spec.name for spec in runner.inputs] == ["sample", "timestep", "encoder_hidden_states"]
        outputs = runner.run(values)
    assert list(outputs) == ["out_sample"] and outputs["out_sample"].dtype == np.float32
    np.testing.assert_allclose(outputs["out_sample"], right(values), rtol=1e-5, atol=1e-5)


@every_engine
@pytest.mark.parametrize("timestep", [500, 500.0, np.float32(500), np.array([500]), np.full(3, 500, np.int64)])
def test_timestep_is_one_value_or_one_per_sample(bundle: Bundle, engine: str, timestep: Any) -> None:
    values = {**feeds(batch=3), "timestep": timestep}
    with open_runner(bundle, "unet", engine) as runner:
        np.testing.assert_allclose(runner.run(values)["out_sample"], right(values), rtol=1e-5, atol=1e-5)


@every_engine
def test_batch_of_different_timesteps_equals_singles(bundle: Bundle, engine: str) -> None:
    values = feeds(batch=4)
    with open_runner(bundle, "unet", engine) as runner:
        whole = runner.run(values)["out_sample"]
        singles = [
            runner.run({name: array[i : i + 1] for name, array in values.items()})["out_sample"] for i in range(4)
        ]
    np.testing.assert_allclose(whole, np.concatenate(singles), atol=1e-4)


BAD_FEEDS = [
    ({"timestep": None}, "missing feed timestep"),
    ({"extra": np.zeros(1)}, "unknown feed 'extra'"),
    ({"sampel": np.zeros(1)}, "did you mean 'sample'"),
    ({"sample": np.zeros((2, 3, 8, 8), np.float32)}, r"sample: got shape \(2, 3, 8, 8\), expected"),
    ({"sample": np.zeros((2, 4, 8), np.float32)}, "sample: got shape"),
    ({"encoder_hidden_states": np.zeros((3, 5, 8), np.float32)}, "batch_size=2"),
    ({"encoder_hidden_states": np.zeros((2, 0, 8), np.float32)}, "sequence_length is 0"),
    ({"timestep": np.zeros(3, np.float32)}, "timestep: got shape"),
    ({"sample": "noise"}, "sample is a str"),
    ({"sample": [[1.0], [1.0, 2.0]]}, "not a rectangle of numbers"),
    ({"sample": np.zeros((2, 4, 8, 8), bool)}, "sample is bool; it must be float32"),
    ({"sample": np.full((2, 4, 8, 8), 1e300)}, "sample holds 1e[+]300; float32 holds"),
    ({"sample": np.zeros((2, 4, 8, 8), np.complex64)}, "sample is complex64"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FEEDS, ids=[message for _, message in BAD_FEEDS])
def test_bad_feeds_are_named_before_the_engine_is_entered(
    bundle: Bundle, change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {**feeds(), **change}
    with open_runner(bundle, "unet", "onnxruntime") as runner:
        session = runner._open_session()
        monkeypatch.setattr(session, "run", lambda *_: pytest.fail("the engine was entered"))
        with pytest.raises(RunnerError, match=message):
            runner.run({name: value for name, value in values.items() if value is not None})


def test_a_latent_size_that_a_unet_cannot_halve_names_the_nearest_two(bundle: Bundle) -> None:
    with (
        open_runner(bundle, "unet", "onnxruntime") as runner,
        pytest.raises(UnsupportedError, match="height is 9; it takes multiples of 8: the nearest are 8 and 16"),
    ):
        runner.run(feeds(size=9))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_feed_is_blamed_by_name(bundle: Bundle, bad: float) -> None:
    values = feeds()
    values["encoder_hidden_states"][0, 0, 0] = bad
    with (
        open_runner(bundle, "unet", "onnxruntime") as runner,
        pytest.raises(RunnerError, match=r"part unet: output out_sample has .* feed encoder_hidden_states had 1"),
    ):
        runner.run(values)


@every_engine
def test_a_bad_weight_is_blamed_on_the_part(make_bundle: MakeBundle, engine: str) -> None:
    with (
        open_runner(make_bundle(unet_like(weight=float("inf"))), "unet", engine) as runner,
        pytest.raises(
            RunnerError, match="part unet: output out_sample has 512 infinite of 512 values; all feeds were finite"
        ),
    ):
        runner.run(feeds())


@every_engine
def test_put_keeps_a_copy_that_may_stand_for_a_feed(bundle: Bundle, engine: str) -> None:
    values = feeds()
    with open_runner(bundle, "unet", engine) as runner:
        mine = values["encoder_hidden_states"].copy()
        handle = runner.put(mine)
        mine[:] = 0
        assert isinstance(handle, Handle) and handle.shape == (2, 5, 8)
        for _ in range(2):
            outputs = runner.run(
                {**values, "encoder_hidden_states": handle, "timestep": runner.put(values["timestep"])}
            )
            np.testing.assert_allclose(outputs["out_sample"], right(values), rtol=1e-5, atol=1e-5)


def test_a_handle_belongs_to_one_runner_and_keeps_its_shape(bundle: Bundle) -> None:
    values = feeds()
    with open_runner(bundle, "unet", "onnxruntime") as first, open_runner(bundle, "unet", "onnxruntime") as second:
        with pytest.raises(RunnerError, match="handle of another runner"):
            second.run({**values, "sample": first.put(values["sample"])})
        with pytest.raises(RunnerError, match="sample: got shape"):
            first.run({**values, "sample": first.put(values["sample"][0])})


def test_torch_in_torch_out_and_mixed_feeds(bundle: Bundle) -> None:
    torch = pytest.importorskip("torch")
    values = feeds()
    tensors = {name: torch.from_numpy(array) for name, array in values.items()}
    with open_runner(bundle, "unet", "onnxruntime") as runner:
        result = runner.run(tensors)["out_sample"]
        assert isinstance(result, torch.Tensor) and result.device.type == "cpu"
        torch.testing.assert_close(result, torch.from_numpy(right(values)))
        result.add_(1)
        assert isinstance(runner.run({**values, "sample": tensors["sample"]})["out_sample"], torch.Tensor)
        assert isinstance(runner.run({**values, "sample": tensors["sample"].double()})["out_sample"], torch.Tensor)
        assert isinstance(runner.run({**values, "sample": runner.put(tensors["sample"])})["out_sample"], np.ndarray)
        with pytest.raises(RunnerError, match="feed sample cannot be read"):
            runner.run({**tensors, "sample": tensors["sample"].requires_grad_()})
        with pytest.raises(RunnerError, match="Pass a detached float32"):
            runner.run({**values, "sample": torch.from_numpy(values["sample"]).bfloat16()})


@every_engine
def test_half_precision_parts_take_any_float(make_bundle: MakeBundle, engine: str) -> None:
    halves = tuple(
        TensorSpec(spec.name, "float32" if spec.name == "timestep" else "float16", spec.shape) for spec in INPUTS
    )
    outputs = (TensorSpec("out_sample", "float16", OUTPUTS[0].shape),)
    made = make_bundle(unet_like(dtype="FLOAT16"), halves, outputs, precision="fp16")
    values = {**feeds(), "timestep": 999}
    with open_runner(made, "unet", engine) as runner:
        result = runner.run(values)["out_sample"]
        assert result.dtype == np.float16
        np.testing.assert_allclose(result.astype(np.float32), right(values), atol=2e-2)
        with pytest.raises(RunnerError, match="sample holds 70000"):
            runner.run({**values, "sample": np.full((2, 4, 8, 8), 7e4, np.float32)})


def transposed_model() -> Any:
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Mul", ["hidden", "two"], ["doubled"])]
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "bound",
        [value("hidden", kind, ["b", 8, 1, "s"])],
        [value("doubled", kind, ["b", 8, 1, "s"])],
        [helper.make_tensor("two", kind, [1], [2.0])],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@every_engine
def test_bindings_rename_and_reshape(make_bundle: MakeBundle, engine: str) -> None:
    spec = INPUTS[2]
    out = TensorSpec("doubled_states", "float32", spec.shape)
    native = ("batch_size", 8, 1, "sequence_length")
    bindings = (Binding(spec.name, "hidden", "float32", native), Binding(out.name, "doubled", "float32", native))
    made = make_bundle(transposed_model(), (spec,), (out,), bindings, golden=False, part="part")
    array = feeds()[spec.name]
    with open_runner(made, "part", engine) as runner:
        np.testing.assert_array_equal(runner.run({spec.name: array})[out.name], 2 * array)
        np.testing.assert_array_equal(runner.run({spec.name: runner.put(array)})[out.name], 2 * array)


def test_relayout_keeps_equal_axes_in_order() -> None:
    array = np.arange(6).reshape(1, 2, 3)
    assert relayout(array, (1, "a", "b"), ("b", 1, "a")).tolist() == array[0].T.reshape(3, 1, 2).tolist()
    square = np.arange(4).reshape(2, 2)
    assert relayout(square, (2, 2), (2, 1, 2)).tolist() == [[[0, 1]], [[2, 3]]]


def test_casts_never_wrap() -> None:
    assert as_dtype("ids", np.array([1, 2], np.int32), "int64").dtype == np.int64
    with pytest.raises(RunnerError, match="ids holds 3000000000"):
        as_dtype("ids", np.array([3_000_000_000]), "int32")
    with pytest.raises(RunnerError, match="ids is float32; it must be int64"):
        as_dtype("ids", np.zeros(1, np.float32), "int64")
    assert as_dtype("x", np.arange(6).reshape(2, 3).T, "float32").flags.c_contiguous


@every_engine
def test_four_threads_on_one_runner_equal_serial_calls(bundle: Bundle, engine: str) -> None:
    calls = [feeds(batch=1 + seed % 3, size=8 * (1 + seed % 2), seed=seed) for seed in range(200)]
    with open_runner(bundle, "unet", engine) as runner:
        serial = [runner.run(values)["out_sample"] for values in calls]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda values: runner.run(values)["out_sample"], calls, timeout=60))
    for alone, shared in zip(serial, together, strict=True):
        np.testing.assert_array_equal(alone, shared)


@every_engine
def test_close_is_idempotent_and_final(bundle: Bundle, engine: str) -> None:
    runner = open_runner(bundle, "unet", engine)
    handle = runner.put(np.zeros(2))
    runner.close()
    runner.close()
    for use in (lambda: runner.run(feeds()), lambda: runner.put(np.zeros(2))):
        with pytest.raises(RunnerError, match="part unet: the runner is closed"):
            use()
    assert handle.shape == (2,)


@every_engine
def test_close_while_others_run_gives_results_or_one_clear_error(bundle: Bundle, engine: str) -> None:
    runner = open_runner(bundle, "unet", engine)
    values, faults, started = feeds(), [], threading.Barrier(4)

    def work() -> None:
        started.wait(timeout=10)
        try:
            for _ in range(200):
                np.testing.assert_allclose(runner.run(values)["out_sample"], right(values), rtol=1e-5, atol=1e-5)
        except RunnerError as fault:
            faults.append(str(fault))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    started.wait(timeout=10)
    runner.close()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert all("closed" in fault for fault in faults), faults


def test_a_model_that_is_not_what_the_manifest_says(make_bundle: MakeBundle) -> None:
    fewer = make_bundle(unet_like(), INPUTS[:2], OUTPUTS, golden=False)
    with pytest.raises(BundleError, match=r"wants .'encoder_hidden_states'., which the manifest does not list"):
        open_runner(fewer, "unet", "onnxruntime")
    more = make_bundle(unet_like(), (*INPUTS, TensorSpec("time_ids", "float32", ("batch_size", 6))), golden=False)
    with pytest.raises(BundleError, match="the model has no 'time_ids'; it has sample, timestep"):
        open_runner(more, "unet", "onnxruntime")


def test_unknown_engines_options_and_parts(bundle: Bundle) -> None:
    with pytest.raises(ConfigError, match="unknown engine 'onnxrutime'; did you mean 'onnxruntime'"):
        open_runner(bundle, "unet", "onnxrutime")
    with pytest.raises(ConfigError, match="unknown key 'thread'; did you mean 'threads'"):
        open_runner(bundle, "unet", "onnxruntime", thread=1)
    with pytest.raises(ConfigError, match="threads is -1"):
        open_runner(bundle, "unet", "onnxruntime", threads=-1)
    with pytest.raises(UnsupportedError, match="torch does not read onnx bundles; use --engine onnxruntime"):
        open_runner(bundle, "unet", "torch")
    with pytest.raises(BundleError, match="no part 'vae'; it has unet"):
        open_runner(bundle, "vae", "onnxruntime")


@pytest.mark.parametrize(
    "options",
    [
        {"threads": 1, "spinning": False},
        {"optimisation": "off"},
        {"optimisation": "basic", "prepack": False},
        {"arena": False, "memory_pattern": False},
        {"sizes": {"batch_size": 2}},
    ],
    ids=str,
)
def test_onnxruntime_options_change_nothing_but_speed(bundle: Bundle, options: dict[str, Any]) -> None:
    values = feeds()
    with open_runner(bundle, "unet", "onnxruntime", **options) as runner:
        np.testing.assert_allclose(runner.run(values)["out_sample"], right(values), rtol=1e-5, atol=1e-5)


def test_workers_of_a_part_leave_the_cores_to_the_next_part(bundle: Bundle) -> None:
    """Between operators of a call they may wait actively; after the call that would slow the next part's call."""
    with open_runner(bundle, "unet", "onnxruntime") as runner:
        options = runner._open_session()._session.get_session_options()
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "1"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_fixed_sizes_refuse_others(bundle: Bundle) -> None:
    with (
        open_runner(bundle, "unet", "onnxruntime", sizes={"batch_size": 2}) as runner,
        pytest.raises(RunnerError, match="onnxruntime stopped"),
    ):
        runner.run(feeds(batch=3))


def test_cuda_is_refused_where_it_is_not(bundle: Bundle) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(UnsupportedError, match=r"no CUDAExecutionProvider; it has .*onnxruntime-gpu"):
        open_runner(bundle, "unet", "onnxruntime", device="cuda")


def test_weights_go_to_an_engine_that_takes_them(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[Any] = []
    weights = {"weight": np.ones(1, np.float32)}
    with open_runner(bundle, "unet", "onnxruntime") as runner:
        with pytest.raises(UnsupportedError, match="keeps the weights of its file"):
            runner.refit(weights)
        monkeypatch.setattr(
            type(runner._open_session()), "refit", lambda self, given: taken.append(given), raising=False
        )
        runner.refit(weights)
    assert taken == [weights]
    with pytest.raises(RunnerError, match="closed"):
        runner.refit(weights)
