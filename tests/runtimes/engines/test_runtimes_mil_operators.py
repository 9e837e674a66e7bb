"""Each operation of MIL against torch, in programs that coremltools' own builder made, on random shapes and values."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("coremltools")
import torch
from mil_packages import Pair, compare, convert, opened, require_near
from torch.nn import functional as F

from diffship.runtimes.engines.mil.operators import OPERATORS
from diffship.runtimes.engines.mil.operators.elementwise import erf
from diffship.runtimes.engines.mil.operators.layers import einsum

SEED = 11
COVERED: set[str] = set()


def random(*shape: int, low: float = -2.0, high: float = 2.0) -> torch.Tensor:
    return torch.empty(shape).uniform_(low, high, generator=torch.Generator().manual_seed(sum(shape) + SEED))


def check(pairs: list[Pair], feeds: tuple[torch.Tensor, ...], folder: Path, **options: Any) -> None:
    COVERED.update(compare(pairs, feeds, folder, **options))


def test_on_one_element(tmp_path: Path) -> None:
    singles = {
        "abs": torch.abs, "square": torch.square, "exp": torch.exp, "exp2": torch.exp2, "sin": torch.sin,
        "cos": torch.cos, "tan": torch.tan, "tanh": torch.tanh, "sign": torch.sign, "floor": torch.floor,
        "ceil": torch.ceil, "round": torch.round, "identity": torch.clone, "atan": torch.atan, "erf": torch.erf,
        "relu": F.relu, "sigmoid": torch.sigmoid, "silu": F.silu, "softplus": F.softplus,
    }  # fmt: skip
    pairs: list[Pair] = [
        (lambda mb, x, name=name: getattr(mb, name)(x=x), function) for name, function in singles.items()
    ]
    pairs += [
        (lambda mb, x: mb.sqrt(x=mb.abs(x=x)), lambda x: x.abs().sqrt()),
        (lambda mb, x: mb.rsqrt(x=mb.abs(x=x), epsilon=0.1), lambda x: torch.rsqrt(x.abs() + 0.1)),
        (lambda mb, x: mb.inverse(x=mb.square(x=x), epsilon=0.2), lambda x: 1 / (x * x + 0.2)),
        (lambda mb, x: mb.log(x=mb.square(x=x), epsilon=0.3), lambda x: torch.log(x * x + 0.3)),
        (lambda mb, x: mb.clip(x=x, alpha=-0.5, beta=0.7), lambda x: x.clamp(-0.5, 0.7)),
        (lambda mb, x: mb.leaky_relu(x=x, alpha=0.2), lambda x: F.leaky_relu(x, 0.2)),
        (lambda mb, x: mb.gelu(x=x), F.gelu),
        (lambda mb, x: mb.gelu(x=x, mode="TANH_APPROXIMATION"), lambda x: F.gelu(x, approximate="tanh")),
        (lambda mb, x: mb.gelu(x=x, mode="SIGMOID_APPROXIMATION"), lambda x: x * torch.sigmoid(1.702 * x)),
        (lambda mb, x: mb.cast(x=x, dtype="int32"), lambda x: x.int()),
    ]
    check(pairs, (random(2, 3, 5),), tmp_path, at_most=5e-6)


def test_on_two_elements(tmp_path: Path) -> None:
    names = {
        "add": torch.add, "sub": torch.sub, "mul": torch.mul, "maximum": torch.maximum, "minimum": torch.minimum,
        "real_div": torch.div, "floor_div": torch.floor_divide, "mod": torch.remainder,
    }  # fmt: skip
    pairs: list[Pair] = [
        (lambda mb, x, y, name=name: getattr(mb, name)(x=x, y=y), function) for name, function in names.items()
    ]
    tests = {
        "equal": torch.eq, "not_equal": torch.ne, "less": torch.lt, "less_equal": torch.le, "greater": torch.gt,
        "greater_equal": torch.ge,
    }  # fmt: skip
    pairs += [
        (
            lambda mb, x, y, name=name: mb.cast(x=getattr(mb, name)(x=mb.round(x=x), y=mb.round(x=y)), dtype="fp32"),
            lambda x, y, function=function: function(x.round(), y.round()).float(),
        )
        for name, function in tests.items()
    ]
    logic = {"logical_and": torch.logical_and, "logical_or": torch.logical_or, "logical_xor": torch.logical_xor}
    pairs += [
        (
            lambda mb, x, y, name=name: mb.select(
                cond=getattr(mb, name)(x=mb.less(x=x, y=0.0), y=mb.logical_not(x=mb.less(x=y, y=1.0))), a=x, b=y
            ),
            lambda x, y, function=function: torch.where(function(x < 0, ~(y < 1)), x, y),
        )
        for name, function in logic.items()
    ]
    pairs.append((lambda mb, x, y: mb.pow(x=mb.abs(x=x), y=y), lambda x, y: x.abs() ** y))
    check(pairs, (random(2, 3, 4), random(2, 3, 4, low=0.3)), tmp_path, at_most=5e-6)


def test_moving_cutting_and_joining(tmp_path: Path) -> None:
    pairs: list[Pair] = [
        (lambda mb, x, i: mb.reshape(x=x, shape=(2, -1, 10)), lambda x, i: x.reshape(2, -1, 10)),
        (lambda mb, x, i: mb.reshape(x=x, shape=(-1, 2, 0)), lambda x, i: x.reshape(-1, 2, 5)),
        (lambda mb, x, i: mb.transpose(x=x, perm=(2, 0, 3, 1)), lambda x, i: x.permute(2, 0, 3, 1)),
        (lambda mb, x, i: mb.expand_dims(x=x, axes=(-1,)), lambda x, i: x[..., None]),
        (lambda mb, x, i: mb.squeeze(x=x, axes=(0,)), lambda x, i: x[0]),
        (lambda mb, x, i: mb.concat(values=(x, x), axis=2), lambda x, i: torch.cat([x, x], 2)),
        (
            lambda mb, x, i: mb.concat(values=(x, mb.square(x=x)), axis=1, interleave=True),
            lambda x, i: torch.stack([x, x * x], 2).reshape(1, 8, 6, 5),
        ),
        (lambda mb, x, i: mb.stack(values=(x, x), axis=1), lambda x, i: torch.stack([x, x], 1)),
        (lambda mb, x, i: mb.split(x=x, split_sizes=(1, 3), axis=1)[1], lambda x, i: x[:, 1:]),
        (lambda mb, x, i: mb.split(x=x, num_splits=2, axis=-2)[0], lambda x, i: x[:, :, :3]),
        (
            lambda mb, x, i: mb.slice_by_index(
                x=x,
                begin=(0, 2, -4, 0),
                end=(0, 3, 0, 4),
                stride=(1, 1, 1, 2),
                end_mask=(True, False, True, False),
                squeeze_mask=(False, True, False, False),
            ),
            lambda x, i: x[:, 2, -4:, 0:4:2],
        ),
        (lambda mb, x, i: mb.slice_by_size(x=x, begin=(0, 1, 2, 0), size=(1, 2, 3, -1)), lambda x, i: x[:, 1:3, 2:5]),
        (lambda mb, x, i: mb.gather(x=x, indices=i, axis=2), lambda x, i: x[:, :, i.long()]),
        (
            lambda mb, x, i: mb.gather_nd(x=mb.squeeze(x=x, axes=(0,)), indices=mb.stack(values=(i, i), axis=1)),
            lambda x, i: x[0][i.long(), i.long()],
        ),
        (
            lambda mb, x, i: mb.gather_along_axis(
                x=mb.slice_by_size(x=x, begin=(0, 0, 0, 0), size=(1, 1, 6, 1)),
                indices=mb.reshape(x=i, shape=(1, 1, 3, 1)),
                axis=2,
            ),
            lambda x, i: torch.gather(x[:, :1, :, :1], 2, i.long().reshape(1, 1, 3, 1)),
        ),
        (lambda mb, x, i: mb.tile(x=x, reps=(2, 1, 1, 3)), lambda x, i: x.repeat(2, 1, 1, 3)),
        (
            lambda mb, x, i: mb.pad(x=x, pad=(1, 2, 0, 1), constant_val=0.5),
            lambda x, i: F.pad(x, (0, 1, 1, 2), value=0.5),
        ),
        (
            lambda mb, x, i: mb.pad(x=x, pad=(2, 1, 1, 2), mode="reflect"),
            lambda x, i: F.pad(x, (1, 2, 2, 1), "reflect"),
        ),
        (
            lambda mb, x, i: mb.pad(x=x, pad=(1, 1, 2, 1), mode="replicate"),
            lambda x, i: F.pad(x, (2, 1, 1, 1), "replicate"),
        ),
        (
            lambda mb, x, i: mb.upsample_nearest_neighbor(x=x, scale_factor_height=2, scale_factor_width=3),
            lambda x, i: F.interpolate(x, scale_factor=(2, 3)),
        ),
        (
            lambda mb, x, i: mb.resize_nearest_neighbor(x=x, target_size_height=9, target_size_width=7),
            lambda x, i: F.interpolate(x, size=(9, 7)),
        ),
        (lambda mb, x, i: mb.fill(shape=(2, 3), value=1.5), lambda x, i: torch.full((2, 3), 1.5)),
        (lambda mb, x, i: mb.shape(x=x), lambda x, i: torch.tensor(x.shape)),
        (lambda mb, x, i: mb.range_1d(start=2, end=9, step=3), lambda x, i: torch.arange(2, 9, 3)),
    ]
    check(pairs, (random(1, 4, 6, 5), torch.tensor([2, 0, 3], dtype=torch.int32)), tmp_path)


def test_sums_and_norms(tmp_path: Path) -> None:
    weight, bias, mean = random(6, low=0.5), random(6), random(6, low=-1.0)
    gamma, beta = random(4, 5), random(5, 4).T.contiguous()
    names = {"mean": torch.mean, "sum": torch.sum, "max": torch.amax, "min": torch.amin}
    pairs: list[Pair] = [
        (
            lambda mb, x, name=name: getattr(mb, f"reduce_{name}")(x=x, axes=(1, -1), keep_dims=name == "sum"),
            lambda x, name=name, function=function: function(x, (1, -1), keepdim=name == "sum"),
        )
        for name, function in names.items()
    ]
    pairs += [
        (lambda mb, x: mb.reduce_prod(x=x, axes=(2,), keep_dims=True), lambda x: x.prod(2, keepdim=True)),
        (lambda mb, x: mb.reduce_sum_square(x=x, axes=(1,)), lambda x: (x * x).sum(1)),
        (lambda mb, x: mb.reduce_l2_norm(x=x, axes=(2, 3)), lambda x: (x * x).sum((2, 3)).sqrt()),
        (lambda mb, x: mb.reduce_argmax(x=x, axis=1), lambda x: x.argmax(1)),
        (lambda mb, x: mb.reduce_argmin(x=x, axis=-1, keep_dims=True), lambda x: x.argmin(-1, keepdim=True)),
        (lambda mb, x: mb.softmax(x=x, axis=1), lambda x: x.softmax(1)),
        (lambda mb, x: mb.layer_norm(x=x, axes=(-1,), epsilon=1e-3), lambda x: F.layer_norm(x, (5,), eps=1e-3)),
        (
            lambda mb, x: mb.layer_norm(x=x, axes=(2, 3), gamma=gamma.numpy(), beta=beta.numpy()),
            lambda x: F.layer_norm(x, (4, 5), gamma, beta),
        ),
        (
            lambda mb, x: mb.layer_norm(x=x, axes=(1,), gamma=weight.numpy(), beta=bias.numpy()),
            lambda x: F.layer_norm(x.transpose(1, 3), (6,), weight, bias).transpose(1, 3),
        ),
        (
            lambda mb, x: mb.instance_norm(x=x, gamma=weight.numpy(), beta=bias.numpy(), epsilon=1e-4),
            lambda x: F.instance_norm(x, weight=weight, bias=bias, eps=1e-4),
        ),
        (
            lambda mb, x: mb.batch_norm(
                x=x, mean=mean.numpy(), variance=weight.numpy(), gamma=bias.numpy(), beta=mean.numpy()
            ),
            lambda x: F.batch_norm(x, mean, weight, bias, mean),
        ),
    ]
    check(pairs, (random(2, 6, 4, 5),), tmp_path, at_most=5e-6)


def test_products_and_pooling(tmp_path: Path) -> None:
    weight, grouped, narrow = random(4, 6, 3, 2), random(12, 2, 3, 3), random(3, 6, 3)
    matrix, bias, key, other = random(5, 7), random(5), random(2, 6, 9, 7), random(2, 5, 8, 6)
    wide = random(12)
    pairs: list[Pair] = [
        (
            lambda mb, x: mb.conv(
                x=x,
                weight=weight.numpy(),
                bias=bias.numpy()[:4],
                strides=(2, 1),
                pad_type="custom",
                pad=(1, 1, 0, 0),
                dilations=(1, 2),
            ),
            lambda x: F.conv2d(x, weight, bias[:4], (2, 1), (1, 0), (1, 2)),
        ),
        (
            lambda mb, x: mb.conv(x=x, weight=grouped.numpy(), bias=wide.numpy(), pad_type="same", groups=3),
            lambda x: F.conv2d(x, grouped, wide, padding="same", groups=3),
        ),
        (
            lambda mb, x: mb.conv(x=mb.reduce_sum(x=x, axes=(3,)), weight=narrow.numpy(), dilations=(2,)),
            lambda x: F.conv1d(x.sum(3), narrow, dilation=2),
        ),
        (lambda mb, x: mb.linear(x=x, weight=matrix.numpy(), bias=bias.numpy()), lambda x: F.linear(x, matrix, bias)),
        (lambda mb, x: mb.matmul(x=x, y=key.numpy(), transpose_y=True), lambda x: x @ key.transpose(2, 3)),
        (lambda mb, x: mb.matmul(x=x, y=x, transpose_x=True), lambda x: x.transpose(2, 3) @ x),
        (
            lambda mb, x: mb.einsum(values=(other.numpy(), x), equation="bkhc,bchq->bkhq"),
            lambda x: torch.einsum("bkhc,bchq->bkhq", other, x),
        ),
        (
            lambda mb, x: mb.max_pool(x=x, kernel_sizes=(3, 3), strides=(2, 2), pad_type="custom", pad=(1, 1, 1, 1)),
            lambda x: F.max_pool2d(x, 3, 2, 1),
        ),
        (
            lambda mb, x: mb.avg_pool(x=x, kernel_sizes=(2, 2), strides=(1, 1), pad_type="valid"),
            lambda x: F.avg_pool2d(x, 2, 1),
        ),
        (
            lambda mb, x: mb.avg_pool(
                x=x,
                kernel_sizes=(3, 3),
                strides=(2, 2),
                pad_type="custom",
                pad=(1, 1, 1, 1),
                exclude_padding_from_average=True,
            ),
            lambda x: F.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
        ),
    ]
    check(pairs, (random(2, 6, 8, 7),), tmp_path, at_most=5e-6)


def test_attention_of_ios_18(tmp_path: Path) -> None:
    key, value, bias = random(2, 6, 9, 7), random(2, 6, 9, 4), random(8, 9)
    seen = (bias > -1).numpy()
    pairs: list[Pair] = [
        (
            lambda mb, x, m=mask: mb.scaled_dot_product_attention(
                query=x, key=key.numpy(), value=value.numpy(), attn_mask=m
            ),
            lambda x, m=mask: F.scaled_dot_product_attention(x, key, value, torch.from_numpy(m)),
        )
        for mask in (bias.numpy(), seen)
    ]
    check(pairs, (random(2, 6, 8, 7),), tmp_path, at_most=5e-6, target="iOS18")


def test_every_operation_was_compared() -> None:
    """But those of stored weights, which packages of palettes and integers compare."""
    if len(COVERED) < 20:
        pytest.skip("the tests above ran in another process")
    stored = {kind for kind in OPERATORS if kind.startswith("constexpr_")}
    assert set(OPERATORS) - COVERED == stored


class Residual(torch.nn.Module):
    """A ResNet block of dilated convolutions (Yu et al. 2017, arXiv 1705.09914)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(8, 8, 3, padding=2, dilation=2) for _ in range(2))
        self.norm = torch.nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.relu(self.norm(self.first(x))))


class Causal(torch.nn.Module):
    """A transformer block whose tokens see those before them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.project, self.out = torch.nn.LayerNorm(16), torch.nn.Linear(16, 48), torch.nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (part.reshape(2, 6, 2, 8).transpose(1, 2) for part in self.project(self.norm(x)).chunk(3, -1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + F.gelu(self.out(attended.transpose(1, 2).reshape(2, 6, 16)))


@pytest.mark.slow
@pytest.mark.parametrize(("build", "shape"), [(Residual, (1, 8, 9, 7)), (Causal, (2, 6, 16))])
def test_modules_that_the_exporter_never_saw(
    build: type[torch.nn.Module], shape: tuple[int, ...], tmp_path: Path
) -> None:
    torch.manual_seed(SEED)
    module, x = build().eval(), random(*shape)
    found = opened(convert(module, (x,)), tmp_path).run({"in_0": x.numpy()})
    require_near(found["out_0"], module(x), 5e-6)


def test_erf_is_that_of_the_mathematical_library() -> None:
    points = np.linspace(-7, 7, 30_001)
    assert np.abs(erf(points) - np.array([math.erf(x) for x in points])).max() < 1e-12


@pytest.mark.parametrize("equation", ["bchq,bkhc->bkhq", "bkhq,bchk->bchq", "ij,jk->ik", "bij,bkj->bki", "i,j->ij"])
def test_einsum_is_that_of_numpy(equation: str) -> None:
    rng = np.random.default_rng(SEED)
    sizes = dict(zip("bchqkij", (2, 3, 4, 5, 6, 7, 8), strict=True))
    values = [rng.standard_normal([sizes[n] for n in side]) for side in equation.split("->")[0].split(",")]
    assert np.allclose(einsum(values, equation), np.einsum(equation, *values), atol=1e-12)
