"""Scores against pictures of the model that narrowing really makes; and the pass, from score table to budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffship.calibration.prompts import read_captions
from diffship.cli.main import main
from diffship.compress import compress
from diffship.compression import measure as measuring
from diffship.compression.captions import CAPTIONS
from diffship.compression.interior import CROSS, FEEDFORWARD, RESIDUAL, SELF, Layer, layers, widths_for
from diffship.compression.layout import LayoutPass
from diffship.compression.measure import Drawing, measure, model_calls
from diffship.compression.narrow import by_norm, interiors, narrow_unet
from diffship.compression.scores import LayerScores, ScoreTable, Settings, Shift, read_scores
from diffship.compression.significance import SignificancePass
from diffship.core.errors import Cancelled, ConfigError, SourceError
from diffship.core.job import Job
from diffship.core.weights import MemoryWeights
from diffship.models.model import PipelineModel
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source
from diffship.models.walks.cost import cost
from diffship.sampling.generate import Request, start
from diffship.sampling.loop import denoise, denoiser_of

DRAWING = Drawing(("red apple", "black cat", "a tree"), steps=2, guidance=3.0, seed=5, batch=2)
SCHEMA = Path(__file__).parents[2] / "docs" / "schema" / "scores" / "v1.json"


@pytest.fixture(scope="module")
def base() -> Pipeline:
    return compress("arch:tiny-sd", [LayoutPass("bk-tiny")])


@pytest.fixture(scope="module")
def listed(base: Pipeline) -> tuple[Layer, ...]:
    return layers(base.components["unet"], feedforward=True)


def one_of(listed: tuple[Layer, ...], kind: str) -> Layer:
    return [layer for layer in listed if layer.kind == kind][-1]


def latents(pipeline: Pipeline, seed: int) -> np.ndarray[Any, Any]:
    """Final latents of DRAWING's prompts, one at a time, by the same calls that draw pictures."""
    done = []
    with PipelineModel(pipeline) as model:
        for i, prompt in enumerate(DRAWING.prompts):
            request = Request(prompt, steps=DRAWING.steps, guidance=DRAWING.guidance, seed=seed + i)
            done += denoise(start(model, request), denoiser_of(model))
    return np.stack([np.asarray(trajectory.latents) for trajectory in done])


def by_hand(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> tuple[float, float]:
    return (
        float(np.sqrt(((first.mean(0) - second.mean(0)) ** 2).sum())),
        float(np.sqrt(((first.std(0) - second.std(0)) ** 2).sum())),
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [RESIDUAL, SELF, CROSS, FEEDFORWARD])
def test_a_score_is_the_shift_of_the_latents_of_the_narrowed_model(
    base: Pipeline, listed: tuple[Layer, ...], kind: str
) -> None:
    layer = one_of(listed, kind)
    counts = {layer.name: layer.kept(0.5)}
    table = measure(base, [layer], {layer.name: (counts[layer.name],)}, DRAWING, Job())
    weights, heads = base.components["unet"].weights, interiors(base.components["unet"]).heads
    small = narrow_unet(base, by_norm(weights, widths_for(listed, counts), heads), {})
    whole = latents(base, DRAWING.seed)
    (shift,) = table.layers[0].shifts
    assert (shift.mean, shift.std) == pytest.approx(by_hand(whole, latents(small, DRAWING.seed)), rel=1e-4)
    assert shift.score == shift.mean + shift.std > 1e-3
    other = latents(base, DRAWING.seed + len(DRAWING.prompts))
    assert table.noise == pytest.approx(sum(by_hand(whole, other)), rel=1e-4)
    assert table.unet == base.components["unet"].digest


@pytest.mark.slow
def test_runs_do_not_touch_each_other(base: Pipeline, listed: tuple[Layer, ...]) -> None:
    """Whatever was narrowed before, the layer is put back: order and company of the layers change no score."""
    pair = [one_of(listed, RESIDUAL), one_of(listed, CROSS)]
    counts = {layer.name: (layer.kept(0.5),) for layer in pair}
    table = measure(base, pair, counts, DRAWING, Job())
    turned = measure(base, pair[::-1], counts, DRAWING, Job())
    assert table.layers == turned.layers[::-1]
    assert table.noise == turned.noise


@pytest.mark.slow
def test_an_interrupted_measurement_goes_on(
    base: Pipeline, listed: tuple[Layer, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pair = [one_of(listed, RESIDUAL), one_of(listed, SELF)]
    counts = {layer.name: (layer.kept(0.5),) for layer in pair}
    seen: list[tuple[int, int]] = []
    calls, rows = model_calls(base, DRAWING, counts)
    settled = DRAWING.settled(base)
    steps = settled.sampler.calls(settled.steps)
    assert (calls, rows) == (4 * 2 * steps, 4 * 3 * 2 * steps), "four runs: two batches, three prompts, two rows each"
    job = Job(tmp_path, lambda _, done, total: seen.append((done, total)), cancel=lambda: len(seen) > 0.7 * calls)
    with pytest.raises(Cancelled):
        measure(base, pair, counts, DRAWING, job)
    assert len(list(tmp_path.iterdir())) == 2, "the two runs that were finished, and nothing else"
    seen.clear()
    table = measure(base, pair, counts, DRAWING, Job(tmp_path, lambda _, done, total: seen.append((done, total))))
    assert table == measure(base, pair, counts, DRAWING, Job())
    assert seen[0] == (calls // 4, calls) and seen[-1] == (calls, calls)
    monkeypatch.setattr(measuring, "denoise", None)
    assert measure(base, pair, counts, DRAWING, Job(tmp_path)) == table
    for kept in sorted(tmp_path.iterdir()):
        whole = kept.read_bytes()
        kept.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(SourceError, match=rf"{kept.name}.*Remove it, and the same command makes it anew"):
            measure(base, pair, counts, DRAWING, Job(tmp_path))
        kept.write_bytes(whole)
    other = replace(DRAWING, seed=6)
    with pytest.raises(TypeError):
        measure(base, pair, counts, other, Job(tmp_path))
    monkeypatch.setattr(measuring, "__version__", "0.0")
    with pytest.raises(TypeError):
        measure(base, pair, counts, DRAWING, Job(tmp_path))


def invented(pipeline: Pipeline, keeps: tuple[float, ...] = (0.25, 0.5, 0.75), feedforward: bool = False) -> ScoreTable:
    """A table with scores that were made up: later layers matter more, narrower ones hurt more."""
    made = []
    for place, layer in enumerate(layers(pipeline.components["unet"], feedforward)):
        widths = sorted({layer.kept(keep) for keep in keeps} - {layer.size}, reverse=True)
        scores = [(1 + place) * (layer.size / width - 1) for width in widths]
        shifts = tuple(Shift(width, s, 0.0, s) for width, s in zip(widths, scores, strict=True))
        made.append(LayerScores(layer.name, layer.kind, layer.size, shifts))
    settings = Settings("0" * 64, 3, 2, 3.0, 64, 5, "pndm", "float32")
    return ScoreTable(pipeline.components["unet"].digest, settings, 0.5, tuple(made))


@pytest.fixture
def scores(base: Pipeline, tmp_path: Path) -> str:
    invented(base).write(tmp_path / "scores.json")
    return str(tmp_path / "scores.json")


def size(pipeline: Pipeline) -> int:
    return sum(parameter.numel() for parameter in pipeline.components["unet"].meta.parameters())


@pytest.mark.slow
def test_the_budget_is_kept_and_used(base: Pipeline, scores: str) -> None:
    small = compress(base, [SignificancePass(parameters=0.7, scores=scores)])
    assert 0.68 * size(base) < size(small) <= 0.7 * size(base)
    entry = small.history[-1]
    assert entry["parameters"] == size(small) and entry["parameters_before"] == size(base)
    assert entry["budget"] == {"parameters": 0.7} and entry["scores"] == read_scores(scores).digest
    old, new = (interiors(pipeline.components["unet"]) for pipeline in (base, small))
    changed = [name for name in old.inner if new.inner[name] < old.inner[name]]
    changed += [name for name in old.heads if new.heads[name] < old.heads[name]]
    assert entry["narrowed"] == len(changed) > 0
    feeds = small.components["unet"].example(0)
    assert np.isfinite(np.asarray(small.components["unet"].load().run(feeds)["out_sample"])).all()


@pytest.mark.slow
def test_a_budget_of_macs_is_that_of_the_built_model(base: Pipeline, scores: str) -> None:
    side = base.family.default_size // base.family.vae_factor
    before, after = (
        cost(pipeline.components["unet"], {"height": side, "width": side}).macs
        for pipeline in (base, compress(base, [SignificancePass(macs=0.8, scores=scores)]))
    )
    assert 0.78 * before < after <= 0.8 * before


@pytest.mark.slow
def test_less_budget_never_scores_better(base: Pipeline, scores: str) -> None:
    table, found = read_scores(scores), []
    for share in (0.65, 0.75, 0.85, 1.0):
        small = compress(base, [SignificancePass(parameters=share, scores=scores)])
        now, total = interiors(small.components["unet"]), 0.0
        for layer in table.layers:
            kept = now.inner.get(layer.name) or now.heads[layer.name]
            total += 0 if kept == layer.size else table.score(layer.name, kept)
        found.append(total)
    assert found == sorted(found, reverse=True) and found[-1] == 0 and found[0] > 0


@pytest.mark.slow
@pytest.mark.parametrize("allocation", ["random", "magnitude"])
def test_allocations_to_compare_with_keep_the_same_budget(base: Pipeline, allocation: str) -> None:
    step = SignificancePass(parameters=0.7, allocation=allocation, seed=1)
    small, again = compress(base, [step]), compress(base, [step])
    assert 0.65 * size(base) < size(small) <= 0.7 * size(base)
    assert small.components["unet"].digest == again.components["unet"].digest
    assert "scores" not in small.history[-1]


@pytest.mark.slow
def test_what_is_foreseen(base: Pipeline, scores: str) -> None:
    """A dry run: exact where no score is missing, else a model that meets the budget, and the work that scoring is."""
    for step in (
        SignificancePass(parameters=0.7, allocation="random"),
        SignificancePass(parameters=0.7, scores=scores),
        SignificancePass(allocation="ranks", scores=scores),
    ):
        exact = step.outline(base)
        assert size(exact.pipeline) == size(step.run(base, Job())) and not exact.calls and not exact.note
    unknown = SignificancePass(parameters=0.75, count=4, steps=2, size=128, keeps=(0.5,)).outline(base)
    assert 0.73 * size(base) < size(unknown.pipeline) <= 0.75 * size(base) and "hangs on the scores" in unknown.note
    steps = replace(DRAWING, size=128).settled(base).sampler.calls(2)
    assert unknown.calls[0].count == (27 + 2) * 4 * 2 * steps * (128 / base.family.default_size) ** 2
    assert "hangs on the scores" in SignificancePass(allocation="ranks").outline(base).note
    with pytest.raises(ConfigError, match=r"with keep 0.25 everywhere .* are left"):
        SignificancePass(macs=0.2).outline(base)


@pytest.mark.slow
def test_ranks_with_and_without_quirks(base: Pipeline, scores: str) -> None:
    ranks = compress(base, [SignificancePass(allocation="ranks", scores=scores)])
    released = compress(base, [SignificancePass(allocation="ranks", released_quirks=True, scores=scores)])
    table, now = read_scores(scores), interiors(ranks.components["unet"])
    found = {layer.name: layer for layer in layers(base.components["unet"])}
    half = {name: table.score(name, layer.kept(0.5)) for name, layer in found.items()}
    for rank, name in enumerate(sorted(half, key=half.__getitem__)):
        expected = found[name].kept(0.25 if rank < 19 else 0.5 if rank < 21 else 0.75)
        assert (now.inner.get(name) or now.heads[name]) == expected, (rank, name)
    assert interiors(released.components["unet"]) == interiors(base.components["unet"]), "all too small for that code"
    assert ranks.history[-1]["ranks"] == [19, 21] and "budget" not in ranks.history[-1]


@pytest.mark.slow
def test_the_released_code_keeps_the_first_heads_and_the_largest_filters(tmp_path: Path) -> None:
    emoji = open_source("emoji")
    invented(emoji, (0.5,)).write(tmp_path / "scores.json")
    options: dict[str, Any] = {"allocation": "ranks", "ranks": (0, 40), "scores": str(tmp_path / "scores.json")}
    ours, theirs = (compress(emoji, [SignificancePass(**options, released_quirks=quirks)]) for quirks in (False, True))
    old = emoji.components["unet"].weights
    new = theirs.components["unet"].weights
    now = interiors(theirs.components["unet"]).heads
    name = next(n for n in now if n.startswith("down_blocks.1") and now[n] == 3)
    rows = new.meta(f"{name}.to_q.weight").shape[0]
    np.testing.assert_array_equal(new.read(f"{name}.to_q.weight"), old.read(f"{name}.to_q.weight")[:rows])
    assert interiors(ours.components["unet"]).inner["down_blocks.0.resnets.0"] == 32
    assert interiors(theirs.components["unet"]).inner["down_blocks.0.resnets.0"] == 64, "not below 64 channels"


@pytest.mark.slow
def test_a_narrowed_model_can_be_narrowed_again(base: Pipeline) -> None:
    once = compress(base, [SignificancePass(parameters=0.9, allocation="magnitude", feedforward=True)])
    twice = compress(once, [SignificancePass(parameters=0.9, allocation="magnitude", feedforward=True)])
    assert size(twice) <= 0.9 * size(once) <= 0.81 * size(base)


def test_the_table_survives_its_file(base: Pipeline, tmp_path: Path) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    table = invented(base)
    table.write(tmp_path / "scores.json")
    assert read_scores(tmp_path / "scores.json") == table
    jsonschema.validate(json.loads(table.text()), json.loads(SCHEMA.read_text(encoding="utf-8")))


DAMAGE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown key": (lambda t: t.update(extra=1), "unknown key 'extra'"),
    "no schema": (lambda t: t.pop("schema"), "no schema"),
    "from the future": (lambda t: t.update(schema=2), "legal is from 1 to 1"),
    "not a number": (lambda t: t.update(noise=float("nan")), "legal is from 0"),
    "negative": (lambda t: t["layers"][0]["shifts"][0].update(mean=-1.0), "legal is from 0"),
    "wrong sum": (lambda t: t["layers"][0]["shifts"][0].update(score=99.0), "is not the sum"),
    "kind": (lambda t: t["layers"][0].update(kind="resnet"), "unknown value 'resnet'"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_table_is_refused(base: Pipeline, tmp_path: Path, what: str) -> None:
    change, text = DAMAGE[what]
    document = json.loads(invented(base).text())
    change(document)
    (tmp_path / "scores.json").write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(SourceError, match=text):
        read_scores(tmp_path / "scores.json")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "give one budget"),
        ({"parameters": 0.5, "macs": 0.5}, "give one budget"),
        ({"parameters": 0.5, "allocation": "ranks"}, "ranks have no budget"),
        ({"parameters": 0.5, "released_quirks": True}, "goes with allocation = 'ranks'"),
        ({"allocation": "ranks", "released_quirks": True, "feedforward": True}, "without feedforward"),
        ({"allocation": "ranks", "keeps": (0.25,)}, "ranks go by the score at 0.5"),
        ({"parameters": 0.5, "keeps": ()}, "give one or more"),
        ({"parameters": 0.5, "allocation": "random", "chart": "x.png"}, "random measures no scores; leave chart out"),
        ({"parameters": 0.5, "scores": "a", "scores_out": "b"}, "leave scores_out out"),
    ],
)
def test_options_that_contradict_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        SignificancePass(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"parameters": 0.2}, r"cannot be met; with keep 0.25 everywhere [\d,]+ \(0\.\d+\) are left"),
        ({"macs": 0.2}, "MACs .* cannot be met"),
        ({"allocation": "ranks", "ranks": (3, 999)}, "legal is 0 <= a <= b <= 27"),
        ({"parameters": 0.9, "prompts": "no-such-file"}, "no-such-file cannot be read"),
        ({"parameters": 0.9, "count": 51}, "there are 50 prompts; 51 are needed"),
        ({"parameters": 0.9, "size": 65}, "the nearest are"),
        ({"parameters": 0.9, "scores": "no-such-file"}, "no-such-file cannot be read"),
        ({"parameters": 0.9, "scores_out": "no/such/folder.json"}, "the folder of no/such/folder.json does not exist"),
    ],
)
def test_it_is_refused_before_work_starts(base: Pipeline, options: dict[str, Any], text: str) -> None:
    with pytest.raises((ConfigError, SourceError), match=f"unet: significance: .*{text}"):
        compress(base, [SignificancePass(**options)], job=Job(cancel=lambda: pytest.fail("work has started")))


@pytest.mark.slow
def test_a_model_that_fills_masks_is_not_scored_by_prompts() -> None:
    with pytest.raises(ConfigError, match="fills masks"):
        compress("arch:tiny-inpaint", [SignificancePass(parameters=0.9)])


@pytest.mark.slow
def test_scores_of_another_model_are_refused(base: Pipeline, scores: str) -> None:
    with pytest.raises(ConfigError, match=r"have no .* narrowed to"):
        compress(base, [SignificancePass(parameters=0.9, keeps=(0.1, 0.9), feedforward=True, scores=scores)])
    other = compress("arch:tiny-sd", [LayoutPass("bk-tiny")])
    weights = other.components["unet"].weights
    arrays = {name: weights.read(name) for name in weights.names()}
    arrays["conv_in.bias"] = arrays["conv_in.bias"] + 1
    part = replace(other.components["unet"], weights=MemoryWeights(arrays))
    other = replace(other, components={**other.components, "unet": part})
    with pytest.raises(ConfigError, match="of another U-Net"):
        compress(other, [SignificancePass(parameters=0.9, scores=scores)])


@pytest.mark.slow
def test_scores_of_another_shape_are_told_as_such_and_not_by_a_width_that_they_lack(scores: str) -> None:
    asked = SignificancePass(parameters=0.9, scores=scores)
    with pytest.raises(ConfigError, match=r"unet: significance: scores: .* is of another U-Net: .* scores_out=FILE"):
        compress("emoji", [asked])
    with pytest.raises(ConfigError, match="is of another U-Net"):
        asked.outline(open_source("emoji"))


def test_prompts_come_one_a_line(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("# what to draw\n\nred apple\n  black cat \n#1 fan\n##\n#\n", encoding="utf-8")
    assert read_captions(file) == ("red apple", "black cat", "#1 fan")
    assert len(set(CAPTIONS)) == len(CAPTIONS) == 50
    for content, text in ((b"\xff\xfe", "not UTF-8"), (b"# none\n", "has none"), (b"x" * 3000, "line 1")):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match=text):
            read_captions(file)


@pytest.mark.slow
def test_the_chart_has_a_bar_for_every_layer(base: Pipeline, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from PIL import Image

    from diffship.compression.chart import draw

    table = invented(base)
    draw(table, tmp_path / "a.png")
    draw(replace(table, layers=table.layers[:9]), tmp_path / "b.png")
    with Image.open(tmp_path / "a.png") as tall, Image.open(tmp_path / "b.png") as short:
        assert tall.height - short.height == pytest.approx(120 * 0.2 * (len(table.layers) - 9), abs=2)
        assert tall.text["Description"] == table.digest
        dark = (np.asarray(tall.convert("L")) < 60).sum(0)
        assert dark.max() > 400, "the bars are there"


COMMAND = ["compress", "arch:tiny-sd", "--pass", "significance", "--quiet"]


@pytest.mark.slow
def test_the_verb_takes_its_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--set", "allocation=magnitude", "--set", "macs=0.8", "--set", "keeps=0.5,0.75", "--json"]
    assert main([*COMMAND, *words, "-o", str(tmp_path / "small")]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["history"][-1]["keeps"] == [0.5, 0.75]
    again = open_source(str(tmp_path / "small"))
    assert size(again) == document["unet"]["parameters"]
    assert main([*COMMAND, "--set", "parameters=0.01", "-o", str(tmp_path / "none")]) == 2
    assert "cannot be met" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_the_verb_measures_then_reuses(tmp_path: Path) -> None:
    table, chart = tmp_path / "scores.json", tmp_path / "scores.png"
    asked = ["--set", "parameters=0.7", "--set", "keeps=0.5", "--set", "count=2", "--set", "steps=1"]
    made = ["--set", f"scores_out={table}", "--set", f"chart={chart}"]
    assert main([*COMMAND, *asked, *made, "-o", str(tmp_path / "a")]) == 0
    assert chart.stat().st_size > 10_000
    assert len(read_scores(table).layers) == 54
    assert main([*COMMAND, *asked[:4], "--set", f"scores={table}", "-o", str(tmp_path / "b")]) == 0
    first, second = (open_source(str(tmp_path / name)) for name in "ab")
    assert first.components["unet"].digest == second.components["unet"].digest
    assert size(first) <= 0.7 * size(open_source("arch:tiny-sd"))
