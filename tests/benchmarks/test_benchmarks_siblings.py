"""Experiments: strict files, models made and judged once, and comparisons that claim nothing that they cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from diffship.benchmarks import freshness
from diffship.benchmarks.studies.quality.experiment import Experiment, made_passes, read_experiment
from diffship.benchmarks.studies.quality.siblings import Siblings
from diffship.core.errors import ConfigError
from diffship.core.strict import load

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "benchmarks" / "experiments").glob("*.toml"))
MODEL = {"name": "a", "passes": [{"type": "layout", "name": "bk-tiny"}]}
BASE: dict[str, Any] = {"schema": 1, "title": "t", "teacher": "emoji", "models": [MODEL]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_experiment_of_the_repository_is_legal(file: Path) -> None:
    pytest.importorskip("torch_pruning")
    experiment = read_experiment(file)
    assert experiment.prompts == 500 and experiment.models[0].name == "teacher"
    for model in experiment.models:
        for step in made_passes(experiment, model, 7, Path("pictures")):
            assert getattr(step, "seed", 7) == 7
            assert getattr(step, "data", None) in (None, "pictures")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": [MODEL, MODEL]}, "a name of its own"),
        ({"models": []}, "a name of its own"),
        ({"comparisons": [{"ours": "a", "theirs": ["bb"]}]}, "unknown model 'bb'"),
        (
            {"models": [MODEL, {"name": "b", "seeds": [1]}], "comparisons": [{"ours": "a", "theirs": ["b"]}]},
            "same seeds",
        ),
        ({"prompts": 1}, "legal is from 2"),
        ({"schema": 2}, "legal is from 1 to 1"),
    ],
)
def test_what_is_not_legal_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as fault:
        load(Experiment, {**BASE, **changes}, "experiment")
    assert message in str(fault.value)


def test_a_pass_that_does_not_exist_is_refused_when_the_file_is_read(tmp_path: Path) -> None:
    text = 'schema = 1\ntitle = "t"\nteacher = "emoji"\n[[model]]\nname = "a"\npasses = [{ type = "layouts" }]\n'
    (tmp_path / "x.toml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match="did you mean 'layout'"):
        read_experiment(tmp_path / "x.toml")


@pytest.mark.slow
def test_what_other_code_made_is_made_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the results file would call itself fresh with models and pictures of another day."""
    teacher = SimpleNamespace(denoiser=SimpleNamespace(digest="d"))
    monkeypatch.setattr("diffship.models.sources.opening.open_source", lambda source: teacher)
    experiment = load(Experiment, BASE, "experiment")
    words = ("compression", tmp_path / "data", tmp_path / "judge", tmp_path / "work", "onnxruntime")
    key = Siblings(experiment, *words)._key([])
    asked: list[tuple[str, list[str]]] = []
    monkeypatch.setattr(freshness, "digest", lambda entry, runners: asked.append((entry.name, runners)) or "other code")
    assert key != Siblings(experiment, *words)._key([])
    assert asked == [("compression", ["onnxruntime"])]


@pytest.mark.slow
def test_models_are_made_judged_and_compared_and_found_again(data: Path, tmp_path: Path) -> None:
    from diffship.models.sources.opening import open_source
    from diffship.runtimes.engines.model import open_model
    from diffship.sampling.generate import Request, generate

    table = {
        **BASE,
        "prompts": 3,
        "steps": 2,
        "models": [{"name": "teacher", "shown": True}, {**MODEL, "shown": True}],
        "comparisons": [{"ours": "a", "theirs": ["teacher"], "metric": "teacher_rms"}],
    }
    experiment = load(Experiment, table, "experiment")
    judge = ROOT / "diffship" / "models" / "emoji" / "judge"
    siblings = Siblings(experiment, "toy", data, judge, tmp_path / "work", "onnxruntime")
    with pytest.raises(ConfigError, match="did you mean 'teacher'"):
        siblings.make(["teachers"])
    siblings.make(["teacher"])
    drawn = siblings.drawn(experiment.models[0], 0)
    with open_model(str(drawn.bundle)) as model:
        request = Request(
            siblings._judging.asked.texts[2], steps=2, guidance=experiment.guidance, seed=2, sampler="ddim"
        )
        (picture,) = generate(model, request)
    kept = load_file(drawn.pictures)["pixels"][2]
    assert np.abs(kept.astype(int) - picture.pixels).max() <= 1, "what is judged is what was drawn"
    rows = {(row.subject, row.metric): row for row in siblings.run()}
    weights = open_source("emoji").components["unet"].weights
    assert rows["teacher", "parameters"].value == sum(weights.meta(name).count for name in weights.names())
    assert rows["a", "parameters"].value < rows["teacher", "parameters"].value  # type: ignore[operator]
    assert rows["teacher", "teacher_rms"].value == 0 < (rows["a", "teacher_rms"].value or 0)
    difference = rows["a against teacher", "teacher_rms_difference"]
    assert difference.value == rows["a", "teacher_rms"].value
    assert difference.conditions["verdict"] == "no difference shown"  # one seed and three prompts show nothing
    assert difference.conditions["interval"] == "Student t over 3 prompts"
    assert all(rows[name, "unet_call_seconds"].n == 15 for name in ("teacher", "a"))
    siblings.grid(tmp_path / "grid.png")
    assert np.asarray(Image.open(tmp_path / "grid.png")).std() > 0

    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()}
    again = Siblings(replace(experiment, comparisons=()), "toy", data, judge, tmp_path / "work", "onnxruntime")
    found = {(row.subject, row.metric): row for row in again.run()}
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "work").iterdir()} == made
    assert found["a", "top5"] == rows["a", "top5"]
