"""The layout pass: teacher weights arrive where they belong, and what is cut away is what weighs least."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffship.cli.main import main
from diffship.compress import compress
from diffship.compression.layout import LayoutPass
from diffship.compression.narrow import Kept, by_norm, cut, head_norms, interiors, narrow_unet
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.weights import MemoryWeights, Weights
from diffship.models.parts.unet import unet
from diffship.models.reduced.widths import Widths, with_widths
from diffship.models.saving import save
from diffship.models.sources.opening import open_source

RESNET, SELF = "down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
SIZES = {"batch_size": 1, "height": 8, "width": 8, "sequence_length": 5}


def test_the_student_holds_the_teachers_tensors() -> None:
    teacher = open_source("arch:tiny-sd")
    student = compress(teacher, [LayoutPass("bk-tiny")])
    unet_of = {name: pipeline.components["unet"].weights for name, pipeline in (("t", teacher), ("s", student))}
    pairs = {
        "up_blocks.0.resnets.1.conv1.weight": "up_blocks.1.resnets.2.conv1.weight",
        "up_blocks.2.attentions.0.proj_in.weight": "up_blocks.3.attentions.0.proj_in.weight",
        "up_blocks.1.upsamplers.0.conv.bias": "up_blocks.2.upsamplers.0.conv.bias",
        "conv_in.weight": "conv_in.weight",
    }
    for own, source in pairs.items():
        np.testing.assert_array_equal(unet_of["s"].read(own), unet_of["t"].read(source))
    assert student.family.size_step == teacher.family.size_step // 2
    assert student.history == (
        {
            "pass": "layout",
            "name": "bk-tiny",
            "parameters_before": _count(unet_of["t"]),
            "parameters": _count(unet_of["s"]),
        },
    )


def _count(weights: object) -> int:
    return sum(weights.meta(name).count for name in weights.names())  # type: ignore[attr-defined]


def narrowed(weights: Weights, widths: Widths, heads: Mapping[str, int]) -> Weights:
    return cut(weights, by_norm(weights, widths, heads), heads)


@pytest.mark.slow
def test_cutting_feed_forward_channels_that_give_nothing_changes_nothing() -> None:
    """Values and gates go together with the column that reads them: without silent channels outputs are as before."""
    pipeline = open_source("arch:tiny-sd")
    component = pipeline.components["unet"]
    name = SELF.replace("attn1", "ff")
    arrays = {key: component.weights.read(key).copy() for key in component.weights.names()}
    size = interiors(component).feedforward[name]
    silent = np.array([1, 5, size - 1])
    arrays[f"{name}.net.0.proj.weight"][np.concatenate([silent, silent + size])] = 0
    arrays[f"{name}.net.2.weight"][:, silent] = 0
    whole = replace(pipeline, components={**pipeline.components, "unet": unet(component.config, MemoryWeights(arrays))})
    widths = Widths(feedforward={name: size - len(silent)})
    kept = by_norm(whole.components["unet"].weights, widths, {})
    np.testing.assert_array_equal(kept.feedforward[name], np.setdiff1d(np.arange(size), silent))
    small = narrow_unet(whole, kept, {"pass": "test"})
    assert interiors(small.components["unet"]).feedforward[name] == size - len(silent)
    feeds = component.example(0, SIZES)
    before, after = (part.components["unet"].load().run(feeds)["out_sample"] for part in (whole, small))
    np.testing.assert_allclose(np.asarray(after), np.asarray(before), atol=1e-5)


@pytest.mark.slow
def test_narrowing_twice_keeps_the_widths_of_both(tmp_path: Path) -> None:
    pipeline = open_source("arch:tiny-sd")
    once = narrow_unet(pipeline, Kept(heads={SELF: np.array([1])}), {"pass": "first"})
    twice = narrow_unet(once, Kept(inner={RESNET: np.arange(8)}), {"pass": "second"})
    assert twice.components["unet"].config["diffship"]["heads"] == {SELF: 1}
    assert twice.components["unet"].config["diffship"]["inner"] == {RESNET: 8}
    assert [entry["pass"] for entry in twice.history] == ["first", "second"]
    again = open_source(str(save(twice, tmp_path / "twice")))
    feeds = again.components["unet"].example(0, SIZES)
    first, second = (p.components["unet"].load().run(feeds)["out_sample"] for p in (twice, again))
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.parametrize(
    ("kept", "text"),
    [
        (Kept(inner={RESNET: np.array([], dtype=int)}), "it cannot keep 0"),
        (Kept(inner={RESNET: np.array([3, 1])}), "it cannot keep 2 of them as asked"),
        (Kept(heads={SELF: np.arange(9)}), "has 2; it cannot keep 9"),
        (Kept(heads={RESNET: np.arange(1)}), "is no layer that can be narrowed"),
    ],
)
def test_what_cannot_be_kept_is_refused(kept: Kept, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        narrow_unet(open_source("arch:tiny-sd"), kept, {})


@pytest.mark.slow
def test_cutting_a_head_that_gives_nothing_changes_nothing() -> None:
    """The cuts of q, k, v and the output pair up: without the silent head every output is as it was."""
    component = open_source("arch:tiny-sd").components["unet"]
    arrays = {name: component.weights.read(name).copy() for name in component.weights.names()}
    width = arrays[f"{SELF}.to_q.weight"].shape[0] // 2
    for part in ("to_q", "to_k", "to_v"):
        arrays[f"{SELF}.{part}.weight"][:width] = 0
    arrays[f"{SELF}.to_out.0.weight"][:, :width] = 0
    whole, widths = unet(component.config, MemoryWeights(arrays)), Widths({}, {SELF: 1})
    small = unet(with_widths(component.config, widths), narrowed(whole.weights, widths, {SELF: 2}))
    feeds = whole.example(0, SIZES)
    before, after = (part.load().run(feeds)["out_sample"] for part in (whole, small))
    np.testing.assert_allclose(np.asarray(after), np.asarray(before), atol=1e-5)
    assert small.weights.meta(f"{SELF}.to_out.0.weight").shape == (16, width)


def test_residual_blocks_keep_the_filters_with_the_largest_norm() -> None:
    component = open_source("arch:tiny-sd").components["unet"]
    small = narrowed(component.weights, Widths({RESNET: 8}), {})
    filters = torch.from_numpy(component.weights.read(f"{RESNET}.conv1.weight").copy())
    kept = filters.flatten(1).norm(dim=1).topk(8).indices.sort().values
    for part, axis in (("conv1.weight", 0), ("time_emb_proj.bias", 0), ("norm2.weight", 0), ("conv2.weight", 1)):
        whole = torch.from_numpy(component.weights.read(f"{RESNET}.{part}").copy())
        assert torch.equal(whole.index_select(axis, kept), torch.from_numpy(small.read(f"{RESNET}.{part}").copy())), (
            part
        )
    assert small.meta(f"{RESNET}.conv1.weight").shape == small.read(f"{RESNET}.conv1.weight").shape
    with pytest.raises(ConfigError, match="it cannot have 99"):
        narrowed(component.weights, Widths({RESNET: 99}), {})


def test_heads_are_weighed_by_all_their_weights() -> None:
    component = open_source("arch:tiny-sd").components["unet"]
    found = head_norms(component.weights, SELF, 2)
    read = {
        part: torch.from_numpy(component.weights.read(f"{SELF}.{part}.weight").copy())
        for part in ("to_q", "to_k", "to_v")
    }
    out = torch.from_numpy(component.weights.read(f"{SELF}.to_out.0.weight").copy())
    width = out.shape[1] // 2
    for head in (0, 1):
        rows = slice(head * width, (head + 1) * width)
        square = sum(float(tensor[rows].double().square().sum()) for tensor in read.values())
        assert found[head] == pytest.approx((square + float(out[:, rows].double().square().sum())) ** 0.5)


@pytest.mark.slow
def test_a_narrowed_model_survives_the_folder_bit_for_bit(tmp_path: Path) -> None:
    small = compress("emoji", [LayoutPass("hybrid-224m")], tmp_path / "small")
    again = open_source(str(tmp_path / "small"))
    assert again.components["unet"].digest == small.components["unet"].digest
    assert again.history == small.history
    assert again.components["unet"].config["diffship"] == small.components["unet"].config["diffship"]
    feeds = small.components["unet"].example(3)
    first, second = (p.components["unet"].load().run(feeds)["out_sample"] for p in (small, again))
    assert np.array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.slow
def test_a_layout_opens_in_stock_diffusers(tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    small = compress("arch:tiny-sd", [LayoutPass("bk-small")], tmp_path / "small")
    theirs = UNet2DConditionModel.from_pretrained(tmp_path / "small" / "unet")
    component = small.components["unet"]
    feeds = component.example(1)
    ours = np.asarray(component.load().run(feeds)["out_sample"])
    with torch.no_grad():
        given = (torch.from_numpy(np.asarray(feeds[name])) for name in ("sample", "timestep", "encoder_hidden_states"))
        (expected,) = theirs(*given, return_dict=False)
    np.testing.assert_allclose(ours, expected.numpy(), atol=1e-6)


@pytest.mark.slow
def test_it_is_refused_before_work_starts(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"unet: koala-700m: the teacher has 4 down blocks"):
        compress("arch:tiny-sd", [LayoutPass("koala-700m")], tmp_path / "out")
    narrow = compress("arch:tiny-sd", [LayoutPass("bk-base")])
    config = with_widths(narrow.components["unet"].config, Widths({RESNET: 8}))
    narrow = replace(
        narrow, components={**narrow.components, "unet": replace(narrow.components["unet"], config=config)}
    )
    with pytest.raises(UnsupportedError, match="the teacher is narrowed already"):
        compress(narrow, [LayoutPass("bk-tiny")], tmp_path / "out")
    assert not list(tmp_path.iterdir())


COMPRESS = ["compress", "arch:tiny-sd", "--pass", "layout", "--quiet"]


@pytest.mark.slow
def test_the_verb_writes_a_folder_that_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "small"
    assert main([*COMPRESS, "--set", "name=hybrid-224m", "-o", str(folder)]) == 0
    assert "diffusers folder in" in capsys.readouterr().out
    assert main(["export", str(folder), "-o", str(tmp_path / "onnx"), "--parts", "unet", "--quiet"]) == 0
    assert "proved" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "name=bk-tny", "-o", "{}"], "did you mean 'bk-tiny'"),
        (["--set", "nam=bk-tiny", "-o", "{}"], "did you mean 'name'"),
        (["-o", "{}"], "the key 'name' is missing"),
        (["--set", "name=bk-tiny"], "-o DIR"),
        (["--set", "name=bk-tiny", "-o", "{}", "--recipe", "x.toml"], "does not go with it"),
    ],
)
def test_wrong_words_are_one_line_and_nothing_is_written(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*COMPRESS, *(word.format(tmp_path / "out") for word in words)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_recipe_names_source_and_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "small.toml"
    recipe.write_text('schema = 1\nsource = "arch:tiny-sd"\n\n[[pass]]\ntype = "layout"\nname = "bk-base"\n')
    assert main(["compress", "--recipe", str(recipe), "--dry-run", "--quiet"]) == 0
    assert "nothing is written" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small.toml"]
