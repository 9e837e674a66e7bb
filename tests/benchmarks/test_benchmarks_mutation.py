"""The mutation score: mutants are other networks (torch says so), edits stay legal, and the score can fall."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

import onnx

from diffship.benchmarks.measure.record import write_result
from diffship.benchmarks.studies.mutation import report, values
from diffship.benchmarks.studies.mutation.files import edited_bundle
from diffship.benchmarks.studies.mutation.graphs import CONSTANT, REMOVED, WIRE, edit, graph_mutants, works
from diffship.benchmarks.studies.mutation.ledger import RESOLUTION, SCORE, SOUND, Ledger, Trial
from diffship.benchmarks.studies.mutation.modules import KINDS, QK, SECOND, component_mutants, spoilt
from diffship.benchmarks.studies.mutation.mutant import GRAPH, MODULE, Mutant, Outcome
from diffship.benchmarks.studies.mutation.random_source import random_pipeline
from diffship.benchmarks.studies.mutation.run import Run, Settings, opened
from diffship.benchmarks.studies.mutation.table import proof_table
from diffship.benchmarks.studies.mutation.taps import Taps
from diffship.benchmarks.studies.mutation.trial import CAUGHT, NOT_MADE, NOT_OPENED, SURVIVED, try_graph, try_module
from diffship.core.bundle import Bundle
from diffship.core.compare import Tolerance, compare
from diffship.core.errors import ConfigError, UnsupportedError
from diffship.core.job import Job
from diffship.export import export
from diffship.models.parts.component import Component
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source

SD, XL = 5, 8  # random pipelines: two levels of one layer; three levels with two text encoders


@pytest.fixture(scope="module")
def sd() -> Pipeline:
    return random_pipeline(SD)


@pytest.fixture(scope="module")
def xl() -> Pipeline:
    return random_pipeline(XL)


@pytest.fixture(scope="module")
def tiny(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


@pytest.fixture(scope="module")
def text(tiny: Bundle) -> Taps:
    return Taps(tiny, tiny.part("text_encoder"))


def outputs(component: Component) -> dict[str, np.ndarray]:
    """torch's, of a call that is not square and whose samples differ."""
    least = component.smallest_sizes()
    sizes = {axis: size * 2 if "height" in axis else size for axis, size in least.items()} | {"batch_size": 2}
    with component.load() as runner:
        return {name: np.asarray(array) for name, array in runner.run(component.example(3, sizes)).items()}


def apart(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> float:
    """Largest difference over the largest value, of any output."""
    assert {name: array.shape for name, array in first.items()} == {name: a.shape for name, a in second.items()}
    return max(float(np.abs(first[name] - second[name]).max() / np.abs(first[name]).max()) for name in first)


def of_every_kind(
    pipeline: Pipeline, parts: tuple[str, ...], first_text: int = 0
) -> Iterator[tuple[Component, Mutant]]:
    """The last place of each kind."""
    for name in parts:
        component = pipeline.components[name]
        for mutants in component_mutants("source", component, first_text).values():
            yield component, mutants[-1]


def check_all(pipeline: Pipeline, parts: tuple[str, ...], first_text: int = 0) -> set[str]:
    """Every kind of mutant of these parts computes something else than the sound part; the kinds."""
    sound = {name: outputs(pipeline.components[name]) for name in parts}
    kinds = set()
    for component, mutant in of_every_kind(pipeline, parts, first_text):
        assert apart(sound[component.name], outputs(spoilt(component, mutant))) > 1e-6, mutant.name
        kinds.add(mutant.kind)
    return kinds


@pytest.mark.slow
def test_every_kind_of_module_mutant_of_encoders_is_another_network(sd: Pipeline) -> None:
    kinds = check_all(sd, ("text_encoder", "vae_decoder"))
    assert {"causal mask off", "other form of GELU", QK, "norm epsilon 1e-2", "rows read as columns"} <= kinds


@pytest.mark.slow
def test_every_kind_of_module_mutant_of_unets_is_another_network(sd: Pipeline, xl: Pipeline) -> None:
    first = int(xl.components["text_encoder"].config["hidden_size"])
    kinds = check_all(sd, ("unet",)) | check_all(xl, ("unet",), first)
    assert kinds >= {*KINDS, *values.EDITS, QK} - {"causal mask off"}


@pytest.mark.slow
def test_the_second_text_encoder_is_the_one_that_is_ignored(xl: Pipeline) -> None:
    unet, first = xl.components["unet"], int(xl.components["text_encoder"].config["hidden_size"])
    (mutant,) = component_mutants("source", unet, first)[SECOND]
    feeds = unet.example(3, {"batch_size": 2})
    other = {**feeds, "encoder_hidden_states": feeds["encoder_hidden_states"].copy()}
    other["encoder_hidden_states"][..., first:] = 7.0
    with spoilt(unet, mutant).load() as runner:
        found = [np.asarray(runner.run(given)["out_sample"]) for given in (feeds, other)]
    assert np.array_equal(*found)
    other["encoder_hidden_states"][..., :first] += 1.0
    with spoilt(unet, mutant).load() as runner:
        assert not np.array_equal(found[0], np.asarray(runner.run(other)["out_sample"]))


def test_a_deaf_unet_does_not_hear_its_text(sd: Pipeline) -> None:
    unet = sd.components["unet"]
    deaf = spoilt(unet, component_mutants("source", unet)["input ignored"][0])
    feeds = unet.example(3, {"batch_size": 2})
    with deaf.load() as runner:
        heard = [runner.run({**feeds, "encoder_hidden_states": feeds["encoder_hidden_states"] * k}) for k in (1, 5)]
    assert np.array_equal(*(np.asarray(found["out_sample"]) for found in heard))


def test_edits_of_tensors_are_what_they_say() -> None:
    array = np.random.default_rng(0).normal(size=(6, 6, 3, 3)).astype(np.float32)
    edits = {name: edit(array) for name, edit in values.EDITS.items()}
    assert not edits["tensor zeroed"].any()
    assert np.allclose(edits["tensor scaled by 10 %"] / array, 1.1) and np.allclose(
        edits["tensor scaled by 1 %"] / array, 1.01
    )
    assert edits["tensor transposed"][2, 5, 1, 0] == array[5, 2, 1, 0]
    assert edits["kernel height and width exchanged"][2, 5, 1, 0] == array[2, 5, 0, 1]
    step = np.abs(array).max(axis=(1, 2, 3), keepdims=True) / 127
    gap = np.abs(edits["tensor rounded to int8"] - array)
    assert (gap <= step * 0.5001).all() and gap.max() > 0.4 * step.min()
    assert all(len(np.unique(row)) <= 255 for row in edits["tensor rounded to int8"])


def test_edits_that_change_nothing_are_not_drawn() -> None:
    square = np.ones((4, 4), np.float32)
    assert not values.fits("tensor zeroed", "norm.weight", np.zeros(4, np.float32))
    assert not values.fits("tensor transposed", "linear.weight", square)  # symmetrical
    assert not values.fits("tensor transposed", "linear.weight", np.ones((4, 3), np.float32))
    assert not values.fits(
        "tensor scaled by 10 %", "attn1.to_k.bias", np.ones(4, np.float32)
    )  # softmax does not see it
    assert values.fits("tensor scaled by 10 %", "attn1.to_v.bias", np.ones(4, np.float32))
    assert not values.exchangeable(("a", square), ("b", square))
    assert values.exchangeable(("a", square), ("b", 2 * square))


def test_a_key_bias_cannot_be_seen_at_all() -> None:
    component = open_source("arch:tiny-sd").components["text_encoder"]
    name = "text_model.encoder.layers.1.self_attn.k_proj.bias"
    mutant = Mutant(MODULE, "source", "text_encoder", "tensor scaled by 10 %", name)
    assert apart(outputs(component), outputs(spoilt(component, mutant))) < 1e-6


def run_part(bundle: Bundle) -> list[np.ndarray]:
    """Outputs of a bundle's one part, by ONNX Runtime itself."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(bundle.file(bundle.manifest.parts[0].files[0])))
    ids = np.arange(154, dtype=np.int64).reshape(2, 77) % 900
    ids[:, 40] = 999
    return [np.asarray(array) for array in session.run(None, {"input_ids": ids})]


def test_edits_of_graphs_stay_legal_and_compute_something_else(tiny: Bundle, text: Taps, tmp_path: Path) -> None:
    whole = Mutant(GRAPH, "tiny", "text_encoder", values.EXCHANGED, *two_weights(text))
    nodes: dict[str, Mutant] = {}
    for mutant in graph_mutants("tiny", "text_encoder", text):
        if mutant.kind not in nodes and works(mutant, text):
            nodes[mutant.kind] = mutant
    assert {REMOVED, "attribute changed", "inputs exchanged", WIRE, CONSTANT} == set(nodes)
    sound = run_part(edited_bundle(tiny, replace(whole, variant=whole.place), tmp_path / "sound"))  # with itself
    for index, mutant in enumerate([whole, *nodes.values()]):
        spoilt_bundle = edited_bundle(tiny, mutant, tmp_path / str(index))
        spoilt_bundle.verify()  # hashes are right again
        onnx.checker.check_model(str(spoilt_bundle.file("text_encoder/model.onnx")))
        found = run_part(spoilt_bundle)
        assert [array.shape for array in found] == [array.shape for array in sound]
        assert any(np.abs(a - b).max() > 1e-6 * np.abs(b).max() for a, b in zip(found, sound, strict=True)), mutant.name
    tiny.verify()


def two_weights(taps: Taps) -> tuple[str, str]:
    names = sorted(name for name in taps.weights if name.endswith("layer_norm1.weight"))
    return names[0], names[1]


def test_what_a_node_would_give_is_told(text: Taps) -> None:
    node = next(node for node in text.model.graph.node if node.op_type == "LayerNormalization")
    same, swapped, illegal = (onnx.NodeProto.FromString(node.SerializeToString()) for _ in range(3))
    assert text.effect(same) < 1e-6
    swapped.input[1], swapped.input[2] = node.input[2], node.input[1]
    x, gain, bias = (np.asarray(text.values[name], np.float64) for name in node.input)
    normed = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    true, wrong = normed * gain + bias, normed * bias + gain
    assert text.effect(swapped) == pytest.approx(np.sqrt(((true - wrong) ** 2).mean() / (true**2).mean()), rel=1e-4)
    illegal.op_type = "Conv"
    assert text.effect(illegal) == 0


def test_an_edit_finds_its_node_or_says_so(text: Taps) -> None:
    with pytest.raises(UnsupportedError, match="no node 'nowhere'"):
        edit(text.model, Mutant(GRAPH, "tiny", "text_encoder", REMOVED, "nowhere", "0"))
    node = next(node for node in text.model.graph.node if node.op_type == "Add")
    with pytest.raises(UnsupportedError, match="no tensor 'nothing'"):
        edit(onnx.ModelProto.FromString(text.model.SerializeToString()),
             Mutant(GRAPH, "tiny", "text_encoder", WIRE, node.name, "0=nothing"))  # fmt: skip


def blind_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every comparison has the widest tolerance."""

    def blind(reference: Any, candidate: Any, tolerance: Any) -> Any:
        return compare(reference, candidate, Tolerance(atol=1e30))

    for module in ("blocks", "verify"):
        monkeypatch.setattr(f"diffship.runtimes.proof.{module}.compare", blind)


def test_the_proof_catches_an_edit_and_a_blind_one_does_not(
    tiny: Bundle, text: Taps, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "text_model.encoder.layers.0.self_attn.out_proj.weight.transposed"
    mutant = Mutant(GRAPH, "tiny", "text_encoder", "tensor scaled by 10 %", name)
    caught = try_graph(tiny, mutant, tmp_path)
    assert (caught.status, caught.by) == (CAUGHT, "graph") and caught.margin_db is not None and caught.margin_db < -6
    assert try_graph(tiny, replace(mutant, place="nowhere"), tmp_path).status == NOT_MADE

    blind_the_proof(monkeypatch)
    assert try_graph(tiny, mutant, tmp_path).status == SURVIVED
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_export_catches_a_spoilt_module_and_a_blind_one_does_not(
    sd: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant = component_mutants("source", sd.components["text_encoder"])["causal mask off"][-1]
    caught = try_module(sd, mutant, "fp16", tmp_path, Job())
    assert (caught.status, caught.by, caught.whole) == (CAUGHT, "graph", True)
    assert caught.margin_db is not None and caught.margin_db < -20
    blind_the_proof(monkeypatch)
    assert try_module(sd, mutant, "fp16", tmp_path, Job()).status == SURVIVED
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_spoilt_weights_use_the_sound_graph_and_a_spoilt_module_never(sd: Pipeline, tmp_path: Path) -> None:
    found = component_mutants("source", sd.components["text_encoder"])
    work, job = tmp_path / "work", Job(tmp_path / "job")
    work.mkdir()
    export(sd, "onnx", tmp_path / "sound", parts=["text_encoder"], job=job)
    graphs = sorted(job.folder.iterdir())
    for kind in ("tensor zeroed", "Q and K exchanged", "causal mask off"):
        assert try_module(sd, found[kind][0], "fp32", work, job).status == CAUGHT
        assert sorted(job.folder.iterdir()) == graphs


def test_a_file_that_the_engine_refuses_is_no_merit_of_the_proof(tiny: Bundle, text: Taps, tmp_path: Path) -> None:
    node = next(node for node in text.model.graph.node if node.op_type == "Transpose")
    mutant = Mutant(GRAPH, "tiny", "text_encoder", "attribute changed", node.name, json.dumps({"perm": [0, 1]}))
    assert try_graph(tiny, mutant, tmp_path).status == NOT_OPENED


# the run's own book-keeping

LOST = Mutant(GRAPH, "s", "unet", REMOVED, "conv")
SMALL = Mutant(GRAPH, "s", "unet", CONSTANT, "mul", "1")
SAME = Mutant(MODULE, "s", "unet", "norm epsilon 1e-2", "norm")
FINE = Mutant(GRAPH, "s", "unet", "tensor scaled by 1 %", "w")


def entries() -> list[tuple[Trial, Outcome]]:
    caught, missed = Outcome(CAUGHT, "graph", -20.0, "a.out", True), Outcome(SURVIVED, "", 3.5, "b.out", False)
    return [
        (Trial(SCORE, "fp32", LOST), caught),
        (Trial(SCORE, "fp32", SMALL), caught),
        (Trial(SCORE, "fp32", SAME), missed),
        (Trial(SCORE, "fp16", LOST), missed),
        (Trial(SCORE, "fp16", SMALL), replace(caught, whole=False)),
        (Trial(SCORE, "fp16", SAME), missed),
        (Trial(RESOLUTION, "fp16", FINE), caught),
        (Trial(SOUND, "fp16", seed=4), Outcome("alarm", why="part unet does not compute the same")),
        (Trial(SOUND, "fp16", seed=5), Outcome("clean", margin_db=5.0)),
    ]


def test_rows_count_what_the_fp32_proof_tells_apart() -> None:
    rows = report.rows(entries(), lambda mutant: mutant == LOST)
    found: dict[tuple[str, str], Any] = {(row.subject, row.metric): (row.value, row.n) for row in rows}
    assert found["fp32", "mutation_score"] == (100.0, 2) and found["fp32", "caught_of_drawn"] == (
        pytest.approx(200 / 3),
        3,
    )
    assert found["fp16", "mutation_score"] == (50.0, 2) and found["fp16", "whole_part_score"] == (0.0, 2)
    assert found["fp16", "mutants_caught"] == (1, 2) and found["fp16", "mutants_tried"] == (2, 2)
    assert found["fp32", "lost_layers_survived"] == (0, 1) and found["fp16", "lost_layers_survived"] == (1, 1)
    assert found["all", "excluded_share"] == (pytest.approx(100 / 3), 3)
    assert found["fp16, unet, graph, operator removed", "caught"] == (0, 1)
    assert found["fp16, tensor scaled by 1 %", "resolution"] == (100.0, 1)
    assert found["fp16, random pipelines", "false_alarms"] == (1, 2)
    (survivor,) = (row for row in rows if row.metric == "survivor_margin_db")
    assert survivor.subject == f"fp16: {LOST.name}" and survivor.value == 3.5 and survivor.conditions["lost_layer"]
    (excluded,) = (row for row in rows if row.metric == "excluded_margin_db")
    assert excluded.subject == f"fp32: {SAME.name}" and excluded.value == 3.5


def test_the_table_has_a_line_for_each_precision_and_names_who_survived(tmp_path: Path) -> None:
    rows = report.rows(entries(), lambda mutant: mutant == LOST)
    results = write_result(tmp_path / "mutation.json", report.SUITE, "command", rows)
    table = proof_table(results)
    lines = {line[0]: dict(zip(table.head, line, strict=True)) for line in table.rows}
    assert lines["fp16"]["mutants"] == "2" and lines["fp16"]["caught"] == "50.00 %"
    assert lines["fp16"]["lost layers that passed"] == "1 of 1" and lines["fp32"]["false alarms"] == "-"
    assert lines["fp16"]["one tensor 1 % larger"] == "100.00 %" and lines["fp16"]["one tensor in int8"] == "-"
    assert LOST.name in table.notes[0] and SAME.name in table.notes[1] and "3.5 dB" in table.notes[1]


def test_a_run_goes_on_where_it_was_cut_off(tmp_path: Path) -> None:
    first, second = (Ledger(tmp_path, {"seed": 1}, f"{k}-of-2") for k in (1, 2))
    for ledger in (first, second):
        ledger.claim()
    listed = entries()
    for index, (trial, outcome) in enumerate(listed):
        (first, second)[index % 2].add(trial, outcome)
    first.keep_plan([trial for trial, _ in listed])
    assert second.plan() == [trial for trial, _ in listed]
    assert list(second.done().values()) != [] and dict(listed) == dict(first.done().values())
    file = tmp_path / "trials-2-of-2.jsonl"
    file.write_text(file.read_text()[:-20])
    assert len(first.done()) == len(listed) - 1
    with pytest.raises(ConfigError, match="holds another run: its seed was '1', now '2'"):
        Ledger(tmp_path, {"seed": 2}).claim()


@pytest.mark.slow
def test_random_pipelines_are_legal_and_unlike(sd: Pipeline) -> None:
    found = [random_pipeline(seed) for seed in range(24)]
    assert len({str(pipeline.components["unet"].config) for pipeline in found}) == 24
    families = {pipeline.family.name for pipeline in found}
    assert {"sd", "sdxl"} <= families and any(pipeline.family.time_cond_dim for pipeline in found)
    assert any(pipeline.family.fills_masks for pipeline in found)
    assert {pipeline.components["vae_decoder"].class_name for pipeline in found} == {"AutoencoderKL", "AutoencoderTiny"}
    assert opened(f"random:{SD}").components["unet"].config == sd.components["unet"].config
    with pytest.raises(ConfigError, match="legal: random:0"):
        opened("random:x")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_proof_catches_sixty_mutants_in_every_precision(tmp_path: Path) -> None:
    """Floors of the full run, which `python -m diffship.benchmarks mutation` makes with a thousand mutants."""
    run = Run(Settings((f"random:{SD}",), ("fp32", "fp16", "bf16"), 60, 3, 0), tmp_path, say=lambda _: None)
    run.run()
    rows = run.rows()
    assert rows is not None
    found: dict[tuple[str, str], Any] = {(row.subject, row.metric): (row.value, row.n) for row in rows}
    survivors = [row.subject for row in rows if row.metric in ("survivor_margin_db", "excluded_margin_db")]
    for precision, floor in (("fp32", 100.0), ("fp16", 99.0), ("bf16", 97.0)):
        score, tried = found[precision, "mutation_score"]
        assert score is not None and score >= floor and (tried or 0) >= 54, survivors
        assert found[precision, "lost_layers_survived"][0] == 0, survivors
        assert (found[precision, "lost_layers_survived"][1] or 0) >= 6
        assert found[precision, "mutants_not_opened"][0] <= 3
        assert found[f"{precision}, random pipelines", "false_alarms"] == (0, 1)
    assert (found["all", "excluded_share"][0] or 0.0) <= 2.0, survivors
    ways = [trial.mutant.way for trial in run.ledger.plan() or () if trial.role == SCORE and trial.mutant is not None]
    assert ways.count(GRAPH) == 2 * ways.count(MODULE) == 120
    assert Run(run.settings, tmp_path, say=pytest.fail).rows() == rows  # nothing is left to try
