"""The dependency graph of a U-Net, its scores and cuts, beside torch-pruning's own pruner and closed forms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch_pruning as tp
from structural_cases import SIZES, outputs, small_model
from torch import Tensor, nn

from diffship.compression.narrow import Kept, interiors, narrow_unet
from diffship.compression.structural import PrunePass
from diffship.compression.traced import KINDS, Interior, channel_scores, filled, kept_of, traced
from diffship.core.errors import UnsupportedError
from diffship.core.job import Job
from diffship.core.weights import Weights
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline


@pytest.fixture(scope="module")
def small() -> Pipeline:
    return small_model()


@pytest.fixture(scope="module")
def found(small: Pipeline) -> list[Interior]:
    return traced(small.components["unet"])[1]


def tensor(weights: Weights, name: str) -> Tensor:
    return torch.from_numpy(weights.read(name).copy()).double()


# the graph


def test_the_graph_has_every_layer_that_can_be_narrowed(small: Pipeline, found: list[Interior]) -> None:
    widths = interiors(small.components["unet"])
    sizes = {kind: {one.name: one.units.shape for one in found if one.kind == kind} for kind in KINDS}
    assert {name: shape[0] * shape[1] for name, shape in sizes["inner"].items()} == widths.inner
    assert {shape[1] for shape in sizes["inner"].values()} == {8}  # norm groups
    assert {name: shape[0] for name, shape in sizes["heads"].items()} == widths.heads
    assert {name: shape[0] for name, shape in sizes["feedforward"].items()} == widths.feedforward


def test_the_cost_of_a_unit_is_what_cutting_it_saves(small: Pipeline, found: list[Interior]) -> None:
    for kind in KINDS:
        one = next(one for one in found if one.kind == kind)
        kept = kept_of([one], {one.name: np.arange(1, len(one.units))})
        entry = narrow_unet(small, kept, {}).history[-1]
        assert entry["parameters_before"] - entry["parameters"] == one.cost, kind


def test_positions_go_from_every_norm_group(found: list[Interior]) -> None:
    one = next(one for one in found if one.kind == "inner" and len(one.units) == 4)
    kept, groups, each = one.kept(np.array([0, 2])), one.units.shape[1], len(one.units)
    assert np.all(np.diff(kept) > 0)
    np.testing.assert_array_equal(kept // each, np.repeat(np.arange(groups), 2))  # as many in each group, none moved
    np.testing.assert_array_equal(kept % each, np.tile([0, 2], groups))


@pytest.mark.slow
def test_another_pairing_is_refused(small: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that leaves out the time embedding would cut half of what belongs together."""
    whole = tp.DependencyGraph.get_pruning_group

    def without_time(*arguments: Any) -> Any:
        group = whole(*arguments)
        group._group = [item for item in group.items if item.dep.target.name is None or "time" not in str(item.dep)]
        return group

    monkeypatch.setattr(tp.DependencyGraph, "get_pruning_group", without_time)
    with pytest.raises(UnsupportedError, match=r"down_blocks\.0\.resnets\.0: .*time_emb_proj \(axis 0\)"):
        traced(small.components["unet"], ["inner"])


# torch-pruning's own pruner


def prepared(component: Component) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module = component.module().requires_grad_(True)
    return module, tuple(torch.from_numpy(feed) for feed in component.example(0, SIZES).values())


RESIDUAL, HEADS = ("conv1", "time_emb_proj", "norm2"), ("to_q", "to_k", "to_v")


def by_its_pruner(component: Component, roots: tuple[str, ...], **options: Any) -> nn.Module:
    """The module that torch-pruning's pruner makes where only layers named `roots` may lose outputs."""
    module, feeds = prepared(component)
    attentions = [layer for layer in module.modules() if hasattr(layer, "to_q")]
    heads = {getattr(layer, part): layer.heads for layer in attentions for part in ("to_q", "to_k", "to_v")}
    pruner = tp.pruner.BasePruner(
        module,
        feeds,
        tp.importance.GroupMagnitudeImportance(p=2),
        num_heads=heads,
        prune_num_heads=True,
        prune_head_dims=False,
        ignored_layers=[m for name, m in module.named_modules() if not list(m.children()) and not name.endswith(roots)],
        in_channel_groups={},
        out_channel_groups={},
        forward_fn=lambda module, feeds: module(*feeds),
        **options,
    )
    pruner.step()
    for layer in attentions:
        layer.heads, layer.inner_dim = pruner.num_heads[layer.to_q], layer.to_q.out_features
        layer.inner_kv_dim = layer.inner_dim
    return module


def assert_same_layers(module: nn.Module, component: Component) -> None:
    own = dict(component.meta.named_modules())
    for name, layer in module.named_modules():
        if hasattr(layer, "to_q"):
            ours: Any = own[name]
            assert (ours.heads, ours.inner_dim) == (layer.heads, layer.inner_dim), name
            assert ours.inner_dim == ours.to_q.out_features == ours.to_v.out_features, name
    expected = {name: tensor.shape for name, tensor in module.state_dict().items()}
    assert {name: tensor.shape for name, tensor in component.meta.state_dict().items()} == expected


@pytest.mark.slow
def test_heads_and_channels_are_those_of_torch_prunings_pruner(small: Pipeline) -> None:
    before = small.components["unet"]
    module = by_its_pruner(before, RESIDUAL + HEADS, pruning_ratio=0.5, head_pruning_ratio=0.5)
    after = PrunePass(keep=0.5, layers=("inner", "heads")).run(small, Job()).components["unet"]
    assert_same_layers(module, after)
    feeds = [torch.from_numpy(feed) for feed in after.example(0, SIZES).values()]
    with torch.no_grad():
        expected = module(*feeds)[0].numpy()
    np.testing.assert_array_equal(outputs(after), expected)
    assert not np.allclose(outputs(before), expected, atol=1e-2)


@pytest.mark.slow
def test_a_global_ranking_is_torch_prunings(small: Pipeline) -> None:
    before = small.components["unet"]
    module = by_its_pruner(before, RESIDUAL, pruning_ratio=0.25, global_pruning=True)
    after = PrunePass(keep=0.75, ranking="global", layers=("inner",)).run(small, Job()).components["unet"]
    assert_same_layers(module, after)
    assert len({size / interiors(before).inner[name] for name, size in interiors(after).inner.items()}) > 1
    feeds = [torch.from_numpy(feed) for feed in after.example(0, SIZES).values()]
    with torch.no_grad():
        np.testing.assert_array_equal(outputs(after), module(*feeds)[0].numpy())


@pytest.mark.slow
def test_feed_forward_channels_are_cut_as_torch_pruning_cuts_them(small: Pipeline, found: list[Interior]) -> None:
    module, feeds = prepared(small.components["unet"])
    graph = tp.DependencyGraph().build_dependency(module, feeds, forward_fn=lambda module, feeds: module(*feeds))
    after = PrunePass(keep=0.5, layers=("feedforward",)).run(small, Job()).components["unet"]
    for one in (one for one in found if one.kind == "feedforward"):
        reader: Any = module.get_submodule(f"inner.{one.name}.net.2")
        weights = small.components["unet"].weights
        read = weights.read(f"{one.name}.net.2.weight")
        gone = np.flatnonzero(~np.isin(read[0], after.weights.read(f"{one.name}.net.2.weight")[0]))
        assert len(gone) == len(one.units) // 2
        graph.get_pruning_group(reader, tp.prune_linear_in_channels, gone.tolist()).prune()
    with torch.no_grad():
        expected = module(*(torch.from_numpy(feed) for feed in after.example(0, SIZES).values()))[0].numpy()
    np.testing.assert_array_equal(outputs(after), expected)


# scores


def squares(weights: Weights, name: str, axis: int) -> Tensor:
    return tensor(weights, f"{name}.weight").square().transpose(0, axis).flatten(1).sum(1)


def magnitude(weights: Weights, one: Interior) -> Tensor:
    """The closed form: squared weights of each channel, in a mean over the layers that share it."""
    name = one.name
    if one.kind == "inner":
        parts = [squares(weights, f"{name}.{part}", 0) for part in ("conv1", "time_emb_proj")]
        return torch.stack([*parts, squares(weights, f"{name}.conv2", 1)]).mean(0)
    if one.kind == "heads":
        parts = [squares(weights, f"{name}.{part}", 0) for part in ("to_q", "to_k", "to_v")]
        return torch.stack([*parts, squares(weights, f"{name}.to_out.0", 1)]).mean(0)
    values, gates = squares(weights, f"{name}.net.0.proj", 0).chunk(2)
    return (values + gates + squares(weights, f"{name}.net.2", 1)) / 2


def test_magnitude_has_a_closed_form(small: Pipeline, found: list[Interior]) -> None:
    weights = small.components["unet"].weights
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    for one in found:
        with filled(one, weights):
            scores = channel_scores(one, importance)
        np.testing.assert_allclose(scores, magnitude(weights, one).numpy(), rtol=1e-5, err_msg=one.name)
        assert {layer.weight.device.type for layer in one.layers.values()} == {"meta"}  # type: ignore[union-attr]


@pytest.mark.slow
def test_what_scores_least_goes(small: Pipeline, found: list[Interior]) -> None:
    before, after = small.components["unet"].weights, PrunePass(keep=0.5).run(small, Job()).components["unet"].weights
    for one in (one for one in found if one.kind == "heads"):
        scores = magnitude(before, one).numpy()[one.units].mean(1)
        stay = np.sort(np.argsort(scores)[len(scores) - len(scores) // 2 :])
        rows = one.units[stay].ravel()
        np.testing.assert_array_equal(
            after.read(f"{one.name}.to_v.weight"), before.read(f"{one.name}.to_v.weight")[rows]
        )


@pytest.mark.slow
def test_random_scores_come_from_the_seed_alone(small: Pipeline) -> None:
    state = torch.random.get_rng_state()
    step = PrunePass(keep=0.5, criterion="random", layers=("inner",), seed=1)
    made = [one.run(small, Job()).components["unet"].weights for one in (step, step, replace(step, seed=2))]
    names = [name for name in made[0].names() if name.endswith("conv1.weight")]
    first, again, other = (np.concatenate([weights.read(name).ravel() for name in names]) for weights in made)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_kept_names_only_what_is_cut(found: list[Interior]) -> None:
    every = {one.name: np.arange(len(one.units)) for one in found}
    assert kept_of(found, every) == Kept()
