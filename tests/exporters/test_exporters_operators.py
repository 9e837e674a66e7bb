"""Every operator of the table, in several forms, through the real exporter: ONNX Runtime beside torch itself."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch.nn import functional

from diffship.core.errors import UnsupportedError
from diffship.core.precision import FP32
from diffship.core.spec import TensorSpec
from diffship.exporters.onnx import operators as operators
from diffship.exporters.onnx.capture import capture, trace_sizes
from diffship.exporters.onnx.operators import OPERATORS
from diffship.exporters.onnx.translate import Translation

Case = Callable[..., torch.Tensor]
aten = torch.ops.aten
INPUTS = (
    TensorSpec("x", "float32", ("b", 4)),
    TensorSpec("i", "int64", ("b", 4)),
    TensorSpec("m", "bool", ("b", 4)),
    TensorSpec("img", "float32", ("b", 2, 6, 9)),
    TensorSpec("q", "float32", ("b", 2, "s", 8)),
    TensorSpec("k", "float32", ("b", 2, "r", 8)),
    TensorSpec("w", "float32", (4, 4)),
)
SIZES = trace_sizes({"b": 1, "s": 1, "r": 1})
HERE = {"b": 6, "s": 5, "r": 9}  # unlike every size that was traced


def values(seed: int = 3) -> list[torch.Tensor]:
    """Feeds with positive and negative values, zeros and equal ones."""
    rng = np.random.default_rng(seed)
    made = []
    for spec in INPUTS:
        shape = spec.resolve(HERE)
        if spec.dtype == "float32":
            made.append(torch.from_numpy(rng.standard_normal(shape).astype(np.float32)))
        elif spec.dtype == "bool":
            made.append(torch.from_numpy(rng.random(shape) < 0.5))
        else:
            made.append(torch.from_numpy(rng.integers(-2, 3, shape)))
    return made


class Many(torch.nn.Module):
    """Several small functions of the same inputs, each an output."""

    def __init__(self, cases: Sequence[Case]) -> None:
        super().__init__()
        self.cases = cases

    def forward(self, *feeds: torch.Tensor) -> tuple[torch.Tensor, ...]:
        named = dict(zip((spec.name for spec in INPUTS), feeds, strict=True))
        return tuple(case(**{name: named[name] for name in needs(case)}) for case in self.cases)


def needs(case: Case) -> list[str]:
    """The inputs that a case takes; parameters with a default belong to the case itself."""
    parameters = inspect.signature(case).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]


ROWS = torch.tensor([-1, 0])
CASES: dict[str, list[Case]] = {
    "sums": [
        lambda x, w: aten.add.Tensor(x, w[0], alpha=2),
        lambda x, i: x + i,
        lambda x: aten.add.Scalar(x, 1.5),
        lambda x: aten.add.Scalar(x, 1.5, 2),
        lambda x: x + 0,
        lambda i: aten.add.Tensor(i, i, alpha=-3),
        lambda i: i + 1.5,
        lambda x, w: aten.sub.Tensor(x, w[1], alpha=0.5),
        lambda x: aten.sub.Scalar(x, 2),
        lambda i, x: i - x,
        lambda x: aten.rsub.Scalar(x, 1.5),
        lambda x: aten.rsub.Scalar(x, 1.5, 2),
        lambda x, i: x * i,
        lambda x: aten.mul.Scalar(x, -2),
        lambda x: x * 1,
        lambda i: i * 2.5,
        lambda x, i: aten.div.Tensor(x, i.abs() + 1),
        lambda i: i / 4,
        lambda i: aten.div.Tensor(i, i * i + 1),
        lambda x: aten.div.Scalar(x, 3),
    ],
    "functions": [
        lambda x: x**2,
        lambda i: i**2,
        lambda i: i**2.0,
        lambda i: aten.pow.Tensor_Scalar(i, 3),
        lambda x: x.abs() ** 0.5,
        lambda x: x.exp(),
        lambda i: i.exp(),
        lambda x: (x.abs() + 1).log(),
        lambda x: x.sin(),
        lambda x: x.cos(),
        lambda x: x.tanh(),
        lambda i: i.sigmoid(),
        lambda x: x.sigmoid(),
        lambda x: x.relu(),
        lambda i: i.relu(),
        lambda x: x.abs().sqrt(),
        lambda x: (x * x + 1).rsqrt(),
        lambda i: (i * i + 1).rsqrt(),
        lambda x: -x,
        lambda i: -i,
        lambda i: i.abs(),
        lambda x: x.erf(),
        lambda x: x.floor(),
        lambda x: (x + 9).reciprocal(),
        lambda i: (i * i + 1).reciprocal(),
        lambda x: functional.silu(x),
        lambda x: functional.gelu(x),
        lambda x: functional.gelu(x, approximate="tanh"),
        lambda x: x.clamp(-0.5, 0.5),
        lambda x: x.clamp(max=0.25),
        lambda x: x.clamp(min=0.25),
        lambda x: x.clamp(0.5, -0.5),
        lambda i: i.clamp(-1, 1),
        lambda i: i.clamp(0.5, 1.5),
        lambda i: i.clamp(min=0.5),
        lambda x, w: x.clamp(w[0], w[1]),
        lambda x, w: x.clamp(min=w[0]),
        lambda x, w: x.clamp(max=w[0]),
        lambda x: torch.clip(x, -0.5, 0.5),
        lambda x, w: torch.minimum(x, w[0]),
        lambda i: torch.minimum(i, -i),
        lambda x, w: torch.min(x, w[0]),
    ],
    "truths": [
        lambda m: aten.logical_not(m),
        lambda x: aten.logical_not(x.floor()),
        lambda m, x: aten.logical_and(m, x > 0),
        lambda i, x: aten.logical_and(i, x),
        *(
            lambda x, i, op=op, right=right: getattr(torch, op)(x, i if right == "tensor" else right)
            for op in ("le", "lt", "ge", "gt", "eq", "ne")
            for right in ("tensor", 0.5, 0)
        ),
        *(lambda i, op=op: getattr(aten, op).Scalar(i, 0.5) for op in ("le", "lt", "ge", "gt", "eq", "ne")),
        lambda m: m == True,  # noqa: E712
        lambda x, i: torch.where(x > 0, x, i),
        lambda m, x: torch.where(m, x, 0.25),
        lambda m, i: torch.where(m, i, 1.5),
        lambda m, x: x.masked_fill(m, -7),
        lambda m, i: i.masked_fill(m, 5),
        lambda i: i < i.shape[0],
        lambda x: (1 / x.floor()).isinf(),
        lambda m: m.any(),
        lambda x: (x > 9).any(),
    ],
    "reductions": [
        lambda x: x.softmax(-1),
        lambda x: x.softmax(0),
        lambda x: torch.softmax(x.half(), -1, dtype=torch.float32),
        lambda x: aten._softmax(x, 1, False),
        lambda x: x.argmax(),
        lambda x: x.argmax(keepdim=True),
        lambda x: x.argmax(1),
        lambda x: x.argmax(0, keepdim=True),
        lambda i: i.argmax(-1),
        lambda x: x.mean(1),
        lambda img: img.mean((2, 3), keepdim=True),
        lambda img: aten.mean.dim(img, None),
        lambda img: aten.mean.dim(img, [], True),
        lambda i: i.mean(0, dtype=torch.float32),
        lambda x: x.sum(0),
        lambda m: m.sum(1),
        lambda i: i.sum(1, keepdim=True),
        lambda img: aten.sum.dim_IntList(img, None),
        lambda img: aten.sum.dim_IntList(img, [-1, 1]),
        lambda i: i.sum(1, dtype=torch.float32),
    ],
    "layers": [
        lambda x, w: functional.linear(x, w),
        lambda x, w: functional.linear(x, w, w[0]),
        lambda x, w: functional.linear(x[None], w[:3], w[0, :3]),
        lambda x, w: x @ w,
        lambda q, k: q @ k.transpose(-1, -2),
        lambda x, w: aten.mm(x, w),
        lambda q, k: aten.bmm(q[:, 0], k[:, 1].transpose(1, 2)),
        lambda img, w: functional.conv2d(img, w[:, :, None, None][:, :2]),
        lambda img, w: functional.conv2d(img, w[:2, :1, None, None].expand(2, 1, 3, 2), w[0, :2], 2, (1, 0), 2, 2),
        lambda x, w: functional.layer_norm(x, (4,), w[0], w[1], 1e-3),
        lambda x: functional.layer_norm(x, (4,)),
        lambda img: functional.layer_norm(img, (6, 9)),
        lambda x, w: functional.layer_norm(x, (4,), None, w[1]),
        lambda x, w: functional.rms_norm(x, (4,), w[0], 1e-3),
        lambda img: functional.rms_norm(img * 1e-4, (6, 9)),
        lambda x: torch.einsum("ab -> ba", x),
        lambda q: torch.einsum("abcd->adbc", q),
        lambda x, w: torch.einsum("ab,cb->ac", x, w),
        lambda q, k: torch.einsum("abcd,abed->abce", q, k),
        lambda w: torch.einsum("aa->a", w),
        lambda img: functional.group_norm(img, 2),
        lambda img, w: functional.group_norm(img, 1, w[0, :2], w[1, :2], 1e-2),
        lambda q, w: functional.group_norm(q, 2, w[0, :2]),
        lambda img: functional.interpolate(img, scale_factor=2.0),
        lambda img: functional.interpolate(img, scale_factor=1.5),
        lambda img: functional.interpolate(img, size=(10, 13)),
        lambda q: functional.interpolate(q, size=(q.shape[2], 5)),
        lambda x: functional.dropout(x, 0.5, False),
        lambda w, i: functional.embedding(i.abs(), w),
        lambda w, i: functional.embedding(i.abs(), w, padding_idx=0),
    ],
    "attention": [
        lambda q, k: functional.scaled_dot_product_attention(q, k, k),
        lambda q, k: functional.scaled_dot_product_attention(q, k, k[..., :3]),
        lambda q, k: functional.scaled_dot_product_attention(q, k, k, is_causal=True),
        lambda q: functional.scaled_dot_product_attention(q, q, q, is_causal=True, scale=0.25),
        lambda q, k: functional.scaled_dot_product_attention(q, k, k, scale=0.1),
        lambda q, k: functional.scaled_dot_product_attention(q, k, k, q[:, :1, :, :1] * k[:, :1, :, 0][:, :, None]),
        lambda q: functional.scaled_dot_product_attention(
            q, q, q, torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
        ),
        lambda q, k: functional.scaled_dot_product_attention(q[:, 0], k[:, 0], k[:, 1]),
    ],
    "shapes": [
        lambda x: x.t().contiguous() + 1,
        lambda x: aten.clone(x) + 1,
        lambda x: x.detach() + 1,
        lambda x: aten.alias(x) + 1,
        lambda x: x.to(torch.int64),
        lambda i: aten.to.dtype_layout(i, dtype=torch.float32, layout=torch.strided, device="cpu"),
        lambda i: i.to(torch.float32),
        lambda m: m.to(torch.float32),
        lambda x: aten.to.device(x, torch.device("cpu"), torch.int64),
        lambda x: aten._to_copy(x, dtype=torch.int64),
        lambda x: x.view(-1, 2),
        lambda x: x.reshape(2, -1, 2).reshape(-1),
        lambda q: q.reshape(q.shape[0], -1, 4),
        lambda q: q.permute(0, 2, 1, 3).reshape(q.shape[0], q.shape[2], 16),
        lambda q: aten._unsafe_view(q, [q.shape[0], 2, -1]),
        lambda x: x.unflatten(1, (2, -1)),
        lambda x: x.unflatten(-1, (2, 2)),
        lambda img: img.flatten(1),
        lambda img: img.flatten(),
        lambda img: img.flatten(0, 1),
        lambda x: x.unsqueeze(0),
        lambda x: x.unsqueeze(-1),
        lambda x: x[:, :1].squeeze(1),
        lambda x: x[:, None, :1].squeeze((1, 2)),
        lambda img: img.squeeze(1),
        lambda img: img.permute(0, -1, 1, 2),
        lambda img: img.transpose(-1, 1),
        lambda x: x.t(),
        lambda w: w[0].t(),
        lambda x: x[:, :1].expand(-1, 3),
        lambda x: x[None].expand(2, -1, -1),
        lambda w, x: w[0].expand(x.shape[0], 4),
        lambda x: aten.broadcast_to(x[:1], [3, 4]),
        lambda x: x.repeat(1, 2),
        lambda x: x.repeat(2, 1, 3),
        lambda x: x[1:],
        lambda x: x[:-1],
        lambda x: x[:, 1:3],
        lambda x: x[:, ::2],
        lambda x: x[-2:],
        lambda x: x[:2],
        lambda x, q: x[: q.shape[0]],
        lambda x: x[-1],
        lambda x: x[:, 1],
        lambda x: x[:, -2],
        lambda x: x.chunk(2, 1)[1],
        lambda img: img.chunk(4, -1)[2],
        lambda x: x.split(3, 1)[1],
        lambda x: x.split([1, 3], -1)[1],
        lambda x: x.split([2, x.shape[0] - 2])[1],
        lambda x, w: torch.cat([x, w]),
        lambda x, i: torch.cat([x, i], -1),
        lambda x: torch.cat([x]),
        lambda x, w: aten.concat([x, w], 0),
        lambda x: torch.stack([x, x + 1]),
        lambda x, i: torch.stack([x, i], -1),
        lambda x, i: torch.stack([i, x], 1),
        lambda x: torch.arange(x.shape[0]) + 0 * x.sum().to(torch.int64),
        lambda x: torch.arange(x.shape[0], dtype=torch.float32) + 0 * x.sum(),
        lambda x: torch.arange(1, x.shape[0]) + 0 * x.sum().to(torch.int64),
        lambda x: torch.arange(0, x.shape[0], 0.5) + 0 * x.sum(),
        lambda x: torch.full((x.shape[0], 2), 1.5) + x[:, :2],
        lambda x: torch.full((x.shape[0], 2), 3) + x[:, :2],
        lambda x: torch.zeros(x.shape[0], 4) + x,
        lambda x: torch.full_like(x, 2),
        lambda x: torch.full_like(x[:, :2], 3, dtype=torch.int64),
        lambda x: torch.ones(x.shape[0], 4) * x,
        lambda x: x[ROWS],
        lambda x: x[torch.tensor([-1, 0])],
        lambda x: x * torch.tensor([1.0, -2.0, 0.5, 3.0]),
        lambda x, i: x[i[:1, :3].abs()],
        lambda w: w.unbind(1)[2] - w.unbind()[0][0],
        lambda x, i: x[i[:, 0].abs(), i[:, 1].abs()],
        lambda x, i: x[i[:, 0].abs(), i[:, 1].to(torch.int32).abs()],
        lambda img: aten.constant_pad_nd(img, [1, 2], 0.5),
        lambda i: aten.constant_pad_nd(i, [0, 1, 2, 0]),
        lambda img: functional.pad(img, (1, 0, 2, 1)),
        lambda img: functional.pad(img, (-1, 2)),
        lambda img: functional.pad(img, (1, 1, 1, 1), value=2.0),
        lambda img: functional.pad(img, (1, 2, 3, 0), mode="reflect"),
        lambda img: functional.pad(img, (1, 2, 3, 0), mode="replicate"),
    ],
    "computed sizes": [
        lambda x, q: torch.zeros(q.shape[2] // 2, 4) + x[:1],
        lambda x, q: torch.zeros((q.shape[2] + 1) // 2, 4) + x[:1],
        lambda x, q: torch.zeros(q.shape[2] // 4, 4) + x[:1],
        lambda x, q: torch.zeros(q.shape[2] * 3, 4) + x[:1],
        lambda x, q: torch.zeros(q.shape[2] * q.shape[2], 4) + x[:1],
        lambda x, q, k: torch.zeros(q.shape[2] * k.shape[2], 4) + x[:1],
        lambda x, q: torch.zeros((96 - q.shape[2]) // 2, 4) + x[:1],
        lambda x, q: torch.zeros((97 - q.shape[2]) // 2, 4) + x[:1],
        lambda q: q[:, :, (q.shape[2] - 1) // 2 :] + 1,
    ],
    "taken apart": [
        lambda x: functional.rms_norm(x, (4,)),
        lambda x: torch.einsum("bi,bj->ij", x, x),
        lambda x: x.repeat_interleave(2, 1),
        lambda x: x.sum(),
        lambda x: x.mean(),
        lambda x: torch.outer(x[:, 0], x[:, 1]),
        lambda x, i: aten.to.other(x, i),
        lambda x, i: x.type_as(i),
        lambda x: x.triu(),
        lambda x: x.tril(-1),
        lambda i: i.tril(1),
        lambda m: m.triu(1),
    ],
}
GROUPS = list(CASES)
CAPTURED: dict[str, Any] = {}


def captured_of(group: str) -> Any:
    if group not in CAPTURED:
        CAPTURED[group] = capture(Many(CASES[group]), INPUTS, SIZES, FP32, OPERATORS)
    return CAPTURED[group]


def exported(captured: Any, count: int, opset: int) -> list[np.ndarray]:
    """What ONNX Runtime makes of the exported programs at sizes that were never traced."""
    kinds = [node.meta["val"] for node in captured.program.graph.output_node().args[0]]
    specs = tuple(
        TensorSpec(f"out.{i}", str(kind.dtype).removeprefix("torch."), tuple(f"a{i}_{j}" for j in range(kind.dim())))
        for i, kind in enumerate(kinds)
    )
    model = Translation(captured, opset, str).run(INPUTS, specs, "test")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    feeds = {spec.name: value.numpy() for spec, value in zip(INPUTS, values(), strict=True)}
    used = {port.name for port in session.get_inputs()}
    found: list[np.ndarray] = session.run(None, {name: feeds[name] for name in feeds if name in used})
    assert len(found) == count
    return found


# what an opset changes is in these; the others are the same nodes in both
BY_OPSET = ("functions", "layers", "attention")
RUNS = [
    *((group, 23) for group in GROUPS),
    *((group, 18) for group in BY_OPSET),
    *(pytest.param(group, 18, marks=pytest.mark.slow) for group in GROUPS if group not in BY_OPSET),
]


@pytest.mark.slow
@pytest.mark.parametrize(("group", "opset"), RUNS)
def test_operators_compute_what_torch_computes(group: str, opset: int) -> None:
    cases = CASES[group]
    found = exported(captured_of(group), len(cases), opset)
    wanted = Many(cases)(*values())
    wrong = []
    for case, ours, theirs in zip(cases, found, wanted, strict=True):
        same = ours.shape == tuple(theirs.shape) and str(theirs.dtype) == f"torch.{ours.dtype}"
        if not same or not np.allclose(ours, theirs.numpy(), atol=2e-5, rtol=1e-4):
            wrong.append(f"{inspect.getsource(case).strip()}: {ours.dtype}{ours.shape}, torch {theirs.shape}")
    assert wrong == []


@pytest.mark.slow
def test_every_operator_of_the_table_is_met_by_these_cases() -> None:
    whole = [capture(Many(CASES[group]), INPUTS, SIZES[:1], FP32, Everything()) for group in GROUPS]
    met = {str(node.target) for captured in whole for node in captured.program.graph.nodes}
    assert set(OPERATORS) - met == set()


class Everything(frozenset[str]):
    """Names of operators of which none is taken apart."""

    def __contains__(self, name: object) -> bool:
        return True


# arguments that say nothing to a graph whose result's type and shape are known
TOLD_BY_THE_RESULT = {
    "flatten": {"start", "end"},
    "split": {"sizes"},
}


def test_no_operator_drops_an_argument() -> None:
    for function in set(OPERATORS.values()):
        parameters = list(inspect.signature(function).parameters.values())[1:]
        kinds = {parameter.kind for parameter in parameters}
        assert not kinds & {inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD}, function.__qualname__
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        read = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
        unread = {parameter.name for parameter in parameters} - read
        assert unread == TOLD_BY_THE_RESULT.get(function.__name__, set()), function.__qualname__


REFUSED: dict[str, tuple[Case, str]] = {
    "pooling": (lambda img: functional.avg_pool2d(img, 2), r"no ONNX form for aten\.avg_pool2d"),
    "dropout": (lambda x: functional.dropout(x, 0.5, True), "dropout that is on"),
    "attention dropout": (lambda q: functional.scaled_dot_product_attention(q, q, q, dropout_p=0.1), "dropout"),
    "literal mask": (lambda x: x[torch.tensor([True, False])], "follow|mask"),
    "mask index": (lambda w, x: x[:, :3][torch.ones(3, dtype=torch.bool)[None].expand(x.shape[0], 3)], "mask|follow"),
    "skipped axis": (lambda x: x[:, ROWS], "skips an axis"),
    "floor of ints": (lambda i: i.floor(), "no legal ONNX graph"),
    "sum of truths": (lambda m: aten.add.Tensor(m, m), "no legal ONNX graph"),
    "squeeze": (lambda x: x.squeeze(0), "any size"),
    "slice": (lambda x: x[:100] + 1, "axis that may be longer"),
    "vector weight": (lambda x, w: functional.linear(x, w[0]), "one axis"),
    "circular": (lambda img: functional.pad(img, (1, 1, 1, 1), mode="circular"), "no form in opset 18"),
    "no form": (lambda x: torch.special.i0(x), r"no ONNX form for aten\.\S*i0"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_form_is_refused(name: str) -> None:
    case, said = REFUSED[name]
    with pytest.raises(UnsupportedError, match=said):
        exported(capture(Many([case]), INPUTS, SIZES, FP32, OPERATORS), 1, 18)


def _halved(x: torch.Tensor) -> torch.Tensor:
    return x / min(x.shape[0], 2)


def _capped(x: torch.Tensor) -> torch.Tensor:
    return torch.zeros(min(x.shape[0], 7), 4) + x[:1]


def _held(x: torch.Tensor) -> torch.Tensor:
    return x * torch.tensor(x.shape[0])


def _branching(x: torch.Tensor) -> torch.Tensor:
    return x.relu() if x.shape[0] > 5 else x.tanh()


@pytest.mark.parametrize(
    ("case", "sizes", "said"),
    [
        # equal at 3 and 5, another at 1
        (_halved, (3, 5, 1), "needs the number 2, then 2, then 1"),
        # as long as the axis at 3 and 5, no longer at 11
        (_capped, (3, 5, 11), "needs the number 3, then 5, then 7"),
        (_branching, (2, 3, 11), "other operations at other sizes"),
        (_held, (2, 3, 11), "depends on the input's size"),
    ],
)
def test_numbers_that_only_seem_to_follow_an_axis_are_refused(case: Case, sizes: tuple[int, ...], said: str) -> None:
    traced = [{"b": size, "s": size + 40, "r": size + 50} for size in sizes]
    with pytest.raises(UnsupportedError, match=said):
        exported(capture(Many([case]), INPUTS, traced, FP32, OPERATORS), 1, 23)


def _monomials(sizes: Sequence[int]) -> Iterator[int]:
    yield from sizes
    yield from (a * b for place, a in enumerate(sizes) for b in sizes[place + 1 :])


def test_traced_sizes_tell_all_axes_and_products_apart() -> None:
    axes = ["batch_size", "height", "width", "sequence_length", "frames", "image_tokens", "text_tokens", "views"]
    traces = trace_sizes({axis: 8 for axis in axes})
    assert len(traces) == 3 and all(list(sorted(trace)) == sorted(axes) for trace in traces)
    seen = list(zip(*(list(_monomials([trace[axis] for axis in axes])) for trace in traces), strict=True))
    # nothing is a multiple of another, so neither are their halves, quarters or doubles
    ratios = {(b / a, c / a) for a, b, c in seen}
    assert len(ratios) == len(seen)
    assert all(trace["sequence_length"] <= 77 and trace["batch_size"] < 64 * 8 for trace in traces)
