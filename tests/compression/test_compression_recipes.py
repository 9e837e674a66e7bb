"""Recipes: parsed strictly, changed from the command line, resumed between passes, foreseen, and told in a card."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from diffship.benchmarks.studies.quality.experiment import made_passes, read_experiment
from diffship.cli.compress import work_folder
from diffship.cli.main import main
from diffship.compress import compress, foresee
from diffship.compression import estimate as estimate_module
from diffship.compression.distill import DistillPass
from diffship.compression.estimate import sized_cost, time_call
from diffship.compression.layout import LayoutPass
from diffship.compression.lora import LoraPass
from diffship.compression.outline import Calls, Outline, outlines
from diffship.compression.stored import Results, options_key, source_key
from diffship.core.errors import Cancelled, ConfigError, UnsupportedError
from diffship.core.job import Job
from diffship.core.problem import Problem
from diffship.core.recipe import read_recipe
from diffship.core.registry import PASSES
from diffship.core.strict import plain
from diffship.core.weights import MemoryWeights, SafetensorsWeights
from diffship.models.assemble import with_denoiser
from diffship.models.pipeline import Pipeline
from diffship.models.saving import save
from diffship.models.sources.licences import licence_of
from diffship.models.sources.opening import open_source

ROOT = Path(__file__).parents[2]
# those of fleets have targets, and no passes (tests/fleet)
RECIPES = sorted(path for path in (ROOT / "recipes").glob("*.toml") if not path.stem.endswith("-fleet"))
jsonschema = pytest.importorskip("jsonschema")


@dataclass(frozen=True)
class Scale:
    """A long pass: multiplies the weights of `conv_in`, and counts how often it is run."""

    kind: ClassVar[str] = "scale"
    runs: ClassVar[list[float]] = []

    by: float
    file: str = ""
    stop: bool = False
    report: str = field(default="", metadata={"output": True})

    def check(self, pipeline: Pipeline) -> list[Problem]:
        return [Problem("unet", "cannot be scaled by 0")] if self.by == 0 else []

    def run(self, pipeline: Pipeline, job: Job) -> Pipeline:
        if self.stop:
            raise Cancelled("stopped on request")
        self.runs.append(self.by)
        unet = pipeline.components["unet"]
        arrays = {name: unet.weights.read(name) for name in unet.weights.names()}
        arrays["conv_in.weight"] = arrays["conv_in.weight"] * type(arrays["conv_in.weight"].flat[0])(self.by)
        return with_denoiser(pipeline, unet.config, MemoryWeights(arrays), {"pass": self.kind, "by": self.by})


@dataclass(frozen=True)
class Told(Scale):
    """A long pass that tells what it will do."""

    kind: ClassVar[str] = "told"

    def outline(self, pipeline: Pipeline) -> Outline:
        return Outline(pipeline, (Calls(pipeline.components["unet"], 1000),), "scores decide")


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    monkeypatch.delenv("RANK", raising=False)
    Scale.runs.clear()
    yield Scale.runs


def conv_in(pipeline: Pipeline) -> float:
    return float(pipeline.components["unet"].weights.read("conv_in.weight").sum())


def test_the_recipes_of_the_issue_are_there() -> None:
    assert [path.stem for path in RECIPES] == [
        *("bk-tiny", "emoji-25", "emoji-58", "emoji-lcm-lora", "emoji-lcm"),
        *("emoji-small-lcm-lora", "emoji-small", "emoji-style-lora", "emoji-tiny-vae"),
        *("hybrid-224m", "koala-700m"),
    ]


@pytest.mark.parametrize(
    ("name", "judged"),
    [("emoji-58", "58 %, distilled"), ("emoji-small", "40 %, distilled"), ("emoji-25", "25 %, distilled")],
)
def test_recipes_of_the_siblings_are_what_was_judged(name: str, judged: str) -> None:
    experiment = read_experiment(ROOT / "benchmarks" / "experiments" / "compression.toml")
    (model,) = (model for model in experiment.models if model.name == judged)
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml", changes={"distill": {"data": "DATA", "seed": 0}})
    assert [step for _, step in recipe.passes] == made_passes(experiment, model, seed=0)
    assert recipe.source == experiment.teacher


def test_the_packaged_sibling_is_made_by_its_recipe() -> None:
    config = json.loads((ROOT / "diffship" / "models" / "emoji-small" / "model_index.json").read_text(encoding="utf-8"))
    steps = dict(read_recipe(ROOT / "recipes" / "emoji-small.toml").passes)
    layout, significance, distill = config["_diffship"]["history"]
    assert layout["name"] == steps["layout"].name
    assert significance["budget"] == {"parameters": steps["significance"].parameters}
    assert significance["keeps"] == list(steps["significance"].keeps)
    options = {name: value for name, value in plain(steps["distill"]).items() if name not in ("data", "teacher")}
    assert {name: distill[name] for name in options} == options


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_published_recipes_are_parsed_strictly(path: Path) -> None:
    types = [step["type"] for step in tomllib.loads(path.read_text(encoding="utf-8"))["pass"]]
    recipe = read_recipe(path)
    assert [name for name, _ in recipe.passes] == types
    assert f"--recipe recipes/{path.name}" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("bk-tiny", {"steps": 50_000, "batch": 64, "accumulate": 4, "rate": 5e-5, "clip": 1.0, "w_feat": 1.0}),
        ("hybrid-224m", {"steps": 50_000, "batch": 16, "accumulate": 4, "rate": 5e-5, "seed": 1234, "drop": 0.0}),
        ("koala-700m", {"steps": 500_000, "features": "self-attention", "size": 1024}),
    ],
)
def test_published_figures_are_those_of_the_papers(name: str, figures: dict[str, object]) -> None:
    table = tomllib.loads((ROOT / "recipes" / f"{name}.toml").read_text(encoding="utf-8"))
    (distill,) = (step for step in table["pass"] if step["type"] == "distill")
    assert {key: distill[key] for key in figures} == figures
    if name == "koala-700m":
        assert distill["batch"] * distill["accumulate"] == 128
    if name == "hybrid-224m":
        score = table["pass"][0]
        assert (score["count"], score["steps"], score["guidance"], score["ranks"]) == (50, 25, 7.5, [19, 21])


def recipe_file(folder: Path, *passes: str) -> Path:
    file = folder / "recipe.toml"
    file.write_text('schema = 1\nsource = "arch:tiny-sd"\n' + "".join(f"[[pass]]\n{text}\n" for text in passes))
    return file


LAYOUT = 'type = "layout"\nname = "bk-base"'


def test_passes_with_hyphens_in_their_names_are_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe_file(tmp_path, 'type = "train-lora"\ndata = "x"')
    words = ["--set", "train-lora.data=nowhere", "--set", f"train-lora.lora-out={tmp_path / 'lora'}"]
    assert main(["compress", "--recipe", str(file), *words, "-o", str(tmp_path / "out"), "--quiet"]) == 2
    assert "nowhere is not a folder of pictures" in capsys.readouterr().err


def test_settings_win_over_the_recipe(tmp_path: Path) -> None:
    file = recipe_file(tmp_path, LAYOUT, LAYOUT)
    recipe = read_recipe(file, changes={"layout": {"name": "bk-tiny"}})
    assert [made.name for _, made in recipe.passes] == ["bk-tiny", "bk-tiny"]
    assert [made.name for _, made in read_recipe(file).passes] == ["bk-base", "bk-base"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--set", "name=bk-tiny"], "it is PASS.KEY=VALUE"),
        (["--set", "lora.files=a"], "unknown pass 'lora'; legal: layout"),
        (["--set", "layuot.name=bk-tiny"], "did you mean 'layout'"),
        (["--set", "layout.nam=bk-tiny"], "did you mean 'name'"),
        (["--set", "layout.name=bk-tny"], "did you mean 'bk-tiny'"),
        (["--pass", "layout"], "--pass does not go with it"),
        (["--no-timing"], "--no-timing goes with --dry-run"),
    ],
)
def test_wrong_settings_are_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = recipe_file(tmp_path, LAYOUT)
    assert main(["compress", "--recipe", str(file), "--quiet", *words, "-o", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.slow
def test_a_list_is_given_with_commas(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = recipe_file(tmp_path, 'type = "lora"\nfiles = ["a.safetensors"]')
    words = ["--recipe", str(file), "--set", "lora.files=b.safetensors,c.safetensors", "--set", "lora.weights=1,0.5"]
    assert main(["compress", *words, "-o", str(tmp_path / "out"), "--quiet"]) == 2
    assert "b.safetensors is not a file" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["lora", "--set", "files=nix.safetensors"], "nix.safetensors is not a file; a LoRA is one .safetensors file"),
        (["lora", "--set", "files=folder"], "folder is not a file"),
        (["lora", "--set", "files=x.bin"], "pickle and numpy files can run code"),
        (["significance", "--set", "parameters=0.9", "--set", "scores=nix.json"], "nix.json cannot be read"),
        (["distill", "--set", "data=nix"], "data: nix is not a folder of pictures with captions"),
        (["prune", "--set", "keep=0.5", "--set", "criterion=taylor", "--set", "data=nix"], "data: nix is not a folder"),
    ],
)
def test_a_file_that_is_not_there_or_of_a_wrong_kind_is_usage(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "prune":
        pytest.importorskip("torch_pruning")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "x.bin").write_bytes(b"x")
    assert main(["compress", "arch:tiny-sd", "--pass", *words, "-o", "out", "--quiet"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_paths_are_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    save(open_source("arch:tiny-sd"), tmp_path / "here" / "teacher")
    file = recipe_file(tmp_path, LAYOUT)
    file.write_text(file.read_text().replace("arch:tiny-sd", "teacher"))
    words = ["compress", "--recipe", str(file), "--dry-run", "--quiet"]
    assert main(words) == 2
    monkeypatch.chdir(tmp_path / "here")
    assert main(words) == 0


@pytest.mark.slow
def test_a_finished_pass_is_not_run_again(tmp_path: Path, runs: list[float]) -> None:
    passes = [LayoutPass("bk-tiny"), Scale(2.0), Scale(3.0)]
    with pytest.raises(Cancelled):
        compress("arch:tiny-sd", [*passes[:2], replace(passes[2], stop=True)], job=Job(tmp_path / "work"))
    assert runs == [2.0]
    first = compress("arch:tiny-sd", passes, tmp_path / "first", job=Job(tmp_path / "work"))
    assert runs == [2.0, 3.0]
    second = compress("arch:tiny-sd", passes, tmp_path / "second", job=Job(tmp_path / "work"))
    assert runs == [2.0, 3.0]
    plain = compress("arch:tiny-sd", passes)
    for made in (first, second, open_source(str(tmp_path / "first")), open_source(str(tmp_path / "second"))):
        assert made.components["unet"].digest == plain.components["unet"].digest
        assert made.history == plain.history
    assert (second.source, second.licence, second.family) == (plain.source, plain.licence, plain.family)
    kept = sorted(path.name[:13] for path in (tmp_path / "work").iterdir())
    assert kept == ["result-scale-", "result-scale-"]


@pytest.mark.slow
def test_only_results_that_cost_something_are_kept(tmp_path: Path) -> None:
    compress("arch:tiny-sd", [LayoutPass("bk-tiny")], tmp_path / "out", job=Job(tmp_path / "work"))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def key_of(step: Any, source: str = "arch:tiny-sd") -> str:
    pipeline = open_source(source)
    return Results(pipeline, [LayoutPass("bk-tiny"), step], Job()).names[-1]


@pytest.mark.slow
def test_a_key_is_of_contents(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_text("a")
    other.write_text("a")
    assert key_of(Scale(2.0, str(one))) == key_of(Scale(2.0, str(other)))
    before = key_of(Scale(2.0, str(one)))
    one.write_text("b")
    assert len({before, key_of(Scale(2.0, str(one))), key_of(Scale(2.0)), key_of(Scale(2.5))}) == 4
    assert key_of(Scale(2.0)) != key_of(Scale(2.0), "arch:tiny-lcm")


def test_a_folder_counts_by_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "data" / "inner").mkdir(parents=True)
    step, seen = Scale(1.0, str(tmp_path / "data")), []
    for name, text in (("a", "1"), ("inner/b", "22"), ("a", "333")):
        seen.append(json.dumps(options_key(step)))
        (tmp_path / "data" / name).write_text(text)
    seen.append(json.dumps(options_key(step)))
    assert len(set(seen)) == 4 and seen[-1] == json.dumps(options_key(step))
    assert options_key(Scale(1.0, "\0" * 3))["file"] == "\0" * 3
    assert options_key(Scale(1.0, report="one")) == options_key(Scale(1.0, report="other"))
    assert options_key(LoraPass((str(tmp_path / "data" / "a"),)))["files"] != [str(tmp_path / "data" / "a")]


def test_what_is_text_is_no_file_of_that_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt `cat`, a layout `bk-tiny`: what lies under such names in the current folder has no say."""
    monkeypatch.chdir(tmp_path)
    steps = [DistillPass("data", prompts=("cat",)), LayoutPass("bk-tiny")]
    before = [options_key(step) for step in steps]
    for name in ("cat", "bk-tiny", "blocks", "none"):
        (tmp_path / name).mkdir()
    assert [options_key(step) for step in steps] == before
    (tmp_path / "data").mkdir()
    assert options_key(steps[0]) != before[0]


@pytest.mark.slow
def test_a_key_is_of_every_tensor() -> None:
    pipeline = open_source("arch:tiny-sd")
    changed = Scale(1.5).run(pipeline, Job())
    changed = replace(changed, model_index=pipeline.model_index)
    assert source_key(pipeline, Job()) == source_key(open_source("arch:tiny-sd"), Job())
    assert source_key(changed, Job()) != source_key(pipeline, Job())


@pytest.mark.slow
def test_of_several_processes_the_first_one_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[float]
) -> None:
    passes, out = [Scale(2.0)], tmp_path / "out"
    monkeypatch.setenv("RANK", "1")
    made = compress("arch:tiny-sd", passes, out, job=Job(tmp_path / "work"))
    assert runs == [2.0] and not list(tmp_path.iterdir())
    monkeypatch.setenv("RANK", "0")
    first = compress("arch:tiny-sd", passes, out, job=Job(tmp_path / "work"))
    assert conv_in(first) == conv_in(made) and runs == [2.0, 2.0]
    monkeypatch.setenv("RANK", "1")
    compress("arch:tiny-sd", passes, out, job=Job(tmp_path / "work"))
    assert runs == [2.0, 2.0]


def test_a_taken_place_is_refused_before_work(tmp_path: Path, runs: list[float]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(ConfigError, match="not an empty folder"):
        compress("arch:tiny-sd", [Scale(2.0)], tmp_path / "out", job=Job(tmp_path / "work"))
    assert runs == [] and not (tmp_path / "work").exists()


def test_a_place_that_cannot_be_made_is_refused_before_work(
    tmp_path: Path, runs: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("x")
    for place in ("file/out", "file/deeper/out"):
        with pytest.raises(ConfigError, match=r"file is a file, so .*out cannot be made"):
            compress("arch:tiny-sd", [Scale(2.0)], tmp_path / place, job=Job(tmp_path / "work"))
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(ConfigError, match="may not be written to; choose another folder than"):
        compress("arch:tiny-sd", [Scale(2.0)], tmp_path / "new" / "out", job=Job(tmp_path / "work"))
    assert runs == [] and not (tmp_path / "work").exists()


@pytest.mark.slow
def test_the_verb_keeps_its_work_beside_the_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[float]
) -> None:
    monkeypatch.setitem(PASSES, "scale", f"{Scale.__module__}:Scale")
    file = recipe_file(tmp_path, LAYOUT, 'type = "scale"\nby = 2.0')
    out = tmp_path / "small"
    assert main(["compress", "--recipe", str(file), "-o", str(out), "--quiet"]) == 0
    assert work_folder(out).is_dir() and runs == [2.0]
    for name in list(out.rglob("*"))[::-1]:
        name.rmdir() if name.is_dir() else name.unlink()
    assert main(["compress", "--recipe", str(file), "-o", str(out), "--quiet"]) == 0
    assert runs == [2.0]
    words = ["--recipe", str(file), "--set", "scale.by=4", "--cache", str(tmp_path / "cache")]
    assert main(["compress", *words, "-o", str(tmp_path / "other"), "--quiet"]) == 0
    assert runs == [2.0, 4.0] and (tmp_path / "cache").is_dir() and not work_folder(tmp_path / "other").exists()


@pytest.mark.slow
def test_every_pass_is_checked_before_the_first_one_runs(tmp_path: Path, runs: list[float]) -> None:
    with pytest.raises(UnsupportedError, match="the teacher has 3 down blocks"):
        compress("arch:tiny-sd", [LayoutPass("bk-tiny"), Told(2.0), LayoutPass("bk-tiny")], tmp_path / "out")
    with pytest.raises(UnsupportedError, match="cannot be scaled by 0"):
        compress("arch:tiny-sd", [Told(2.0), Scale(0.0)], tmp_path / "out")
    assert runs == []
    # behind a pass that cannot tell what it makes, the turn of a pass comes first
    with pytest.raises(UnsupportedError, match="cannot be scaled by 0"):
        compress("arch:tiny-sd", [Scale(2.0), Scale(0.0)], tmp_path / "out")
    assert runs == [2.0] and not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bk-small", "hybrid-224m"])
def test_an_outline_has_the_shapes_of_the_result(name: str) -> None:
    pipeline = open_source("arch:tiny-sd")
    told, made = LayoutPass(name).outline(pipeline).pipeline, LayoutPass(name).run(pipeline, Job())
    metas = [{key: part.weights.meta(key) for key in part.weights.names()} for part in (u(told), u(made))]
    assert metas[0] == metas[1] and u(told).config == u(made).config and told.history == made.history


def u(pipeline: Pipeline) -> Any:
    return pipeline.components["unet"]


@pytest.mark.slow
def test_an_outline_reads_no_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = open_source("arch:tiny-sd")
    monkeypatch.setattr(type(u(pipeline).weights), "read", lambda *_: pytest.fail("a tensor was read"))
    found = outlines(pipeline, [LayoutPass("hybrid-224m")])
    assert sized_cost(found[0].pipeline, u(found[0].pipeline)).params > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "layout", "parameters"),
    [("arch:sd15", "hybrid-224m", 224_492_676), ("arch:sdxl", "koala-700m", 782_822_724)],
)
def test_full_sizes_are_foreseen_without_their_weights(source: str, layout: str, parameters: int) -> None:
    found = foresee(source, [LayoutPass(layout)])
    assert found.steps[0].after is not None and found.steps[0].after.params == parameters
    assert found.steps[0].after.bytes == 4 * parameters and found.steps[0].seconds == 0
    assert found.timed == "nothing was timed"


@pytest.mark.slow
def test_hours_are_calls_times_the_timed_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate_module, "time_call", lambda *_: 0.25)
    found = foresee("arch:tiny-sd", [Told(1.0), LayoutPass("bk-tiny"), Told(1.0)])
    first, layout, second = found.steps
    assert first.seconds == pytest.approx(1000 * 0.25 / 16) and layout.seconds == 0
    assert second.before is not None and first.before is not None and second.seconds is not None
    assert second.seconds == pytest.approx(first.seconds * second.before.macs / first.before.macs)
    assert "batch 16 at 64 px: 0.25 s" in found.timed and first.note == "scores decide"
    assert [s.seconds for s in foresee("arch:tiny-sd", [Told(1.0)], timing=False).steps] == [None]


@pytest.mark.slow
def test_a_large_call_is_timed_at_a_smaller_size(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(estimate_module, "time_call", lambda unet, sizes, device: asked.append(sizes["height"]) or 1.0)
    monkeypatch.setattr(estimate_module, "available_memory", lambda: None)
    assert "batch 1 at 256 px: 1 s" in foresee("arch:sd15", [Told(1.0)]).timed
    assert asked == [32]
    monkeypatch.setattr(estimate_module, "available_memory", lambda: 1 << 30)
    small = foresee("arch:sd15", [Told(1.0)])
    assert small.steps[0].seconds is None and "takes 3.2 GiB" in small.timed


@pytest.mark.slow
@pytest.mark.parametrize("precision", [None, "fp16"])
def test_bytes_are_those_of_what_is_written(
    precision: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["compress", "arch:tiny-sd", "--pass", "layout", "--set", "name=bk-tiny", "--json", "--quiet"]
    words += [] if precision is None else ["--precision", precision]
    out = tmp_path / "out"
    assert main([*words, "--dry-run", "--no-timing"]) == 0
    foreseen = json.loads(capsys.readouterr().out)
    assert main([*words, "-o", str(out)]) == 0
    made = json.loads(capsys.readouterr().out)
    tensors = SafetensorsWeights(out / "unet" / "diffusion_pytorch_model.safetensors")
    size = sum(tensors.read(name).nbytes for name in tensors.names())
    assert (
        made["unet"]["bytes"] == foreseen["unet"]["bytes"] == foreseen["plan"]["passes"][-1]["after"]["bytes"] == size
    )


@pytest.mark.slow
def test_a_call_is_timed() -> None:
    pipeline = open_source("arch:tiny-sdxl")
    assert 0 < time_call(u(pipeline), {"height": 8, "width": 8}, "cpu") < 30


@pytest.mark.slow
def test_what_cannot_be_told_is_unknown() -> None:
    found = foresee("arch:tiny-sd", [LayoutPass("bk-tiny"), Scale(1.0), Scale(2.0)])
    assert [step.after is None for step in found.steps] == [False, True, True]
    assert [step.before is None for step in found.steps] == [False, False, True]
    assert found.steps[1].note == "known only when it runs"


@pytest.mark.slow
def test_the_dry_run_prints_a_plan_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(PASSES, "told", f"{Told.__module__}:Told")
    file = recipe_file(tmp_path, 'type = "layout"\nname = "bk-tiny"', 'type = "told"\nby = 1.0')
    words = ["compress", "--recipe", str(file), "--dry-run", "-o", str(tmp_path / "out")]
    assert main([*words, "--no-timing", "--quiet"]) == 0
    text = capsys.readouterr().out
    assert "parameters before" in text and "told: a target: scores decide" in text and "nothing is written" in text
    document = command(*words)
    schema = json.loads((ROOT / "docs" / "schema" / "compress.json").read_text(encoding="utf-8"))
    jsonschema.validate({k: v for k, v in document.items() if k not in ("exit_code", "stderr")}, schema)
    layout, told = document["plan"]["passes"]
    assert layout["hours"] == 0 and told["hours"] > 0 and told["before"] == layout["after"] == document["unet"]
    assert layout["before"]["parameters"] > layout["after"]["parameters"] and told["note"] == "scores decide"
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]


@pytest.mark.slow
def test_the_result_validates_too(tmp_path: Path, command: Any) -> None:
    document = command("compress", "arch:tiny-sd", "--pass", "layout", "--set", "name=bk-base", "-o", tmp_path / "o")
    schema = json.loads((ROOT / "docs" / "schema" / "compress.json").read_text(encoding="utf-8"))
    jsonschema.validate({k: v for k, v in document.items() if k not in ("exit_code", "stderr")}, schema)
    assert "plan" not in document and document["unet"]["parameters"] == document["history"][0]["parameters"]


@pytest.mark.slow
def test_the_card_lists_what_was_done(tmp_path: Path) -> None:
    teacher = save(open_source("arch:tiny-sd"), tmp_path / "teacher")
    (teacher / "README.md").write_text("---\nlicense: creativeml-openrail-m\n---\n# Teacher\n")
    (teacher / "LICENSE.md").write_text("the terms")
    made = compress(str(teacher), [LayoutPass("hybrid-224m")], tmp_path / "small")
    card = (tmp_path / "small" / "README.md").read_text(encoding="utf-8")
    assert card.startswith('---\nlicense: "creativeml-openrail-m"\nlibrary_name: "diffusers"\n')
    assert "Made by diffship from `teacher`." in card
    assert "Use restrictions carried from the source: CreativeML Open RAIL-M, Attachment A" in card
    entry = made.history[0]
    figures = f"{entry['parameters_before']:,} | {entry['parameters']:,}"
    assert f"| layout | name hybrid-224m | {figures} |" in card
    assert "stock diffusers cannot load it" in card
    assert (tmp_path / "small" / "LICENSE.md").read_text() == "the terms"
    assert licence_of(tmp_path / "small") == made.licence


@pytest.mark.slow
def test_a_card_survives_odd_findings(tmp_path: Path) -> None:
    pipeline = open_source("arch:tiny-sd")
    entry = {"pass": "x|y", "list": list(range(99)), "text": "a\nb|" + "c" * 90, "none": None, "table": {"a": 1}}
    save(with_denoiser(pipeline, u(pipeline).config, u(pipeline).weights, entry), tmp_path / "odd")
    (row,) = (line for line in (tmp_path / "odd" / "README.md").read_text().splitlines() if line.startswith("| x"))
    assert row.startswith("| x\\|y | list (99 entries); text a b\\|ccc") and row.endswith(
        '...; table {"a": 1} | - | - |'
    )
    assert "none" not in row
    card = (tmp_path / "odd" / "README.md").read_text()
    assert 'license: "other"\nlicense_name: "none (random weights)"' in card and "cannot load it" not in card


@pytest.mark.slow
def test_a_dry_run_opens_no_data_but_refuses_shapes(capsys: pytest.CaptureFixture[str]) -> None:
    assert foresee("arch:tiny-sd", [Scale(0.0)]).steps[0].note == "known only when it runs"
    assert main(["compress", "arch:tiny-sd", "--pass", "layout", "--set", "name=koala-700m", "--dry-run"]) == 2
    assert "the teacher has 4 down blocks" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-o", "."], "is the current folder or holds it"),
        (["-o", "out", "--cache", "out/cache"], "lies inside the output"),
        (["-o", "out", "--cache", "file"], "is a file; name a folder"),
    ],
)
def test_places_that_would_fail_at_the_end_are_refused_at_once(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    assert main(["compress", "arch:tiny-sd", "--pass", "layout", "--set", "name=bk-tiny", "-q", *words]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_link_to_an_empty_folder_is_that_folder(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    compress("arch:tiny-sd", [LayoutPass("bk-tiny")], tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "model_index.json").is_file()


def test_pictures_behind_a_link_count(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "again").symlink_to(tmp_path / "real")  # goes round
    (tmp_path / "data" / "train").symlink_to(tmp_path / "real")
    keys = []
    for content in ("a", "ab"):
        (tmp_path / "real" / "0.png").write_text(content)
        keys.append(options_key(DistillPass(str(tmp_path / "data"))))
    assert keys[0] != keys[1]


@pytest.mark.slow
def test_a_recipe_without_a_source_takes_that_of_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('schema = 1\n[[pass]]\ntype = "layout"\nname = "bk-tiny"\n')
    assert main(["compress", "--recipe", str(file), "--dry-run", "--no-timing", "-q"]) == 2
    assert "no source is given" in capsys.readouterr().err
    assert main(["compress", "arch:tiny-sd", "--recipe", str(file), "--dry-run", "--no-timing", "-q"]) == 0
    assert read_recipe(file).to_json()["pass"][0]["name"] == "bk-tiny" and "source" not in read_recipe(file).to_json()
