"""The interpreter of MIL: what it refuses and finds, and stored weights as coremltools decompresses them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("coremltools")
import torch
from mil_packages import Pair, built, convert, coremltools, opened

from diffship.core.errors import BundleError, RunnerError, UnsupportedError
from diffship.runtimes.engines.mil import MilRunner
from diffship.runtimes.engines.mil.operators import OPERATORS
from diffship.targets.coreml.package import FILES, MODEL
from diffship.targets.coreml.program import read_program, unpacked

X = torch.linspace(-3, 3, 2 * 64, dtype=torch.float32).reshape(2, 64)


def package(pairs: list[Pair], folder: Path, feeds: tuple[torch.Tensor, ...] = (X,)) -> list[Path]:
    """The files of a package that `pairs` build."""
    opened(built(pairs, feeds), folder)
    return [folder / "part.mlpackage" / name for name in FILES]


def test_an_unknown_operation_and_argument_are_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = package([(lambda mb, x: mb.gelu(x=mb.tanh(x=x)), torch.tanh)], tmp_path)
    kept = dict(OPERATORS)
    monkeypatch.delitem(OPERATORS, "tanh")
    with pytest.raises(UnsupportedError, match=r"does not know the operations tanh \(1\)"):
        MilRunner().open(files)
    monkeypatch.setitem(OPERATORS, "tanh", lambda y: y)
    with pytest.raises(UnsupportedError, match="does not know the argument 'x' of tanh"):
        from diffship.runtimes.engines.mil.operators import table

        table.parameters.cache_clear()
        MilRunner().open(files)
    table.parameters.cache_clear()
    OPERATORS.update(kept)


def test_damage_is_found_before_anything_runs(tmp_path: Path) -> None:
    weight = np.linspace(-1, 1, 64 * 64, dtype=np.float32).reshape(64, 64)
    files = package([(lambda mb, x: mb.linear(x=x, weight=weight), torch.tanh)], tmp_path)
    whole, weights = files[0].read_bytes(), files[1].read_bytes()
    for cut in range(1, len(whole), max(1, len(whole) // 40)):
        files[0].write_bytes(whole[:cut])
        with pytest.raises((BundleError, RunnerError, UnsupportedError)):
            MilRunner().open(files)
    files[0].write_bytes(whole)
    for damaged in (weights[:-4], b"", weights[:64] + b"\0" * 64 + weights[128:], b"\xff" * len(weights)):
        files[1].write_bytes(damaged)
        with pytest.raises(RunnerError, match=r"part\.mlpackage"):
            MilRunner().open(files)


def test_a_huge_tensor_is_refused_before_it_is_made(tmp_path: Path) -> None:
    files = package([(lambda mb, x: mb.tile(x=x, reps=(3, 1)), torch.tanh)], tmp_path)
    (tile,) = [op for op in read_program(files[0]).operations if op.kind == "tile"]
    with pytest.raises(RunnerError, match="at most 2147483648 elements"):
        OPERATORS["tile"](X.numpy(), np.array([1 << 20, 1 << 20]))
    assert tile.outputs[0].type is not None and tile.outputs[0].type.shape == (6, 64)


def test_a_swapped_transpose_is_located(tmp_path: Path) -> None:
    """The program states the shape of every result; an operation that gives another one is named."""
    x = torch.zeros(2, 3, 4)
    files = package([(lambda mb, x: mb.transpose(x=x, perm=(0, 2, 1), name="swapped"), torch.tanh)], tmp_path, (x,))
    from coremltools.proto.Model_pb2 import Model

    spec = Model.FromString(files[0].read_bytes())
    (function,) = spec.mlProgram.functions.values()
    (block,) = function.block_specializations.values()
    for operation in block.operations:
        if operation.outputs[0].name == "swapped_perm_0":
            operation.attributes["val"].immediateValue.tensor.ints.values[:] = [0, 1, 2]
    files[0].write_bytes(spec.SerializeToString())
    with pytest.raises(RunnerError, match=r"transpose 'swapped' gives the shape \(2, 3, 4\)"):
        MilRunner().open(files).run({"in_0": x.numpy()}, ["out_0"])


@pytest.mark.slow
def test_float16_overflows_in_declared_arithmetic_alone(tmp_path: Path) -> None:
    class Large(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 300.0).square().sum(-1, keepdim=True) * 1e-6

    opened(convert(Large(), (X,), half=True), tmp_path)
    files = [tmp_path / "part.mlpackage" / name for name in FILES]
    (declared,) = MilRunner().open(files).run({"in_0": X.numpy()}, ["out_0"])
    (wide,) = MilRunner(arithmetic="fp32").open(files).run({"in_0": X.numpy()}, ["out_0"])
    assert np.isinf(declared).any() and np.isfinite(wide).all()


def test_other_numbers_of_samples_are_several_calls_and_other_sizes_refused(tmp_path: Path) -> None:
    files = package([(lambda mb, x: mb.square(x=x), torch.square)], tmp_path)
    session = MilRunner().open(files)
    feed = np.arange(5 * 64, dtype=np.float32).reshape(5, 64)
    (found,) = session.run({"in_0": feed}, ["out_0"])
    assert np.array_equal(found, feed**2)
    with pytest.raises(UnsupportedError, match=r"in_0 has the shape \(2, 32\); this package has fixed sizes"):
        session.run({"in_0": feed[:2, :32]}, ["out_0"])
    session.close()
    with pytest.raises(RunnerError, match="closed"):
        session.run({"in_0": feed}, ["out_0"])


@pytest.mark.parametrize("way", ["kmeans", "grouped", "linear", "blocks", "sparse"])
def test_stored_weights_are_those_that_coremltools_decompresses(way: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((64, 64)).astype(np.float32)
    tools = coremltools()
    newer = way in ("grouped", "blocks")
    pairs: list[Pair] = [(lambda mb, x: mb.linear(x=x, weight=weight), torch.tanh)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = built(pairs, (X,), "iOS18" if newer else "iOS16")
        packed = _packed(tools.optimize.coreml, dense, way)
        plain = tools.optimize.coreml.decompress_weights(packed)
        runs = []
        for name, model in (("packed", packed), ("plain", plain)):
            (tmp_path / name).mkdir()
            runs.append(opened(model, tmp_path / name))
    kinds = {operation.kind for operation in runs[0].program.operations}
    assert any(kind.startswith("constexpr_") for kind in kinds)
    found, wanted = (run.run({"in_0": X.numpy()})["out_0"] for run in runs)
    assert np.allclose(found, wanted, atol=1e-5) and not np.allclose(found, X.numpy() @ weight.T, atol=1e-5)


def _packed(optimize: Any, model: Any, way: str) -> Any:
    if way == "kmeans":
        how: Any = optimize.OpPalettizerConfig(mode="uniform", nbits=4)
    elif way == "grouped":
        how = optimize.OpPalettizerConfig(mode="uniform", nbits=2, granularity="per_grouped_channel", group_size=16)
    elif way == "linear":
        how = optimize.OpLinearQuantizerConfig(mode="linear", dtype="uint8")
    elif way == "blocks":
        how = optimize.OpLinearQuantizerConfig(
            mode="linear_symmetric", dtype="int4", granularity="per_block", block_size=32
        )
    else:
        config = optimize.OptimizationConfig(global_config=optimize.OpMagnitudePrunerConfig(target_sparsity=0.7))
        return optimize.prune_weights(model, config)
    config = optimize.OptimizationConfig(global_config=how)
    run = optimize.palettize_weights if way in ("kmeans", "grouped") else optimize.linear_quantize_weights
    return run(model, config)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 6])
def test_packed_bits_are_those_of_coremltools(bits: int) -> None:
    from coremltools.optimize._utils import pack_elements_into_bits

    values = np.random.default_rng(bits).integers(0, 1 << bits, 75).astype(np.uint8)
    assert np.array_equal(unpacked(pack_elements_into_bits(values, bits), bits, 75), values)


def test_a_model_that_is_no_program_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m.mlmodel").write_bytes(b"\x08\x04")
    with pytest.raises(UnsupportedError, match="holds no MIL program"):
        read_program(tmp_path / "m.mlmodel")
    assert MODEL.endswith("model.mlmodel")
