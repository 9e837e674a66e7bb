"""Fleets against single exports of the same targets: equal bytes, what is kept, what is refused, what fails alone."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import pytest

pytest.importorskip("torch")
pytest.importorskip("onnx")

from diffship.core import registry
from diffship.core.bundle import Bundle
from diffship.core.errors import (
    Cancelled,
    ConfigError,
    DiffshipError,
    MissingExtra,
    ParityError,
    SourceError,
    UnsupportedError,
)
from diffship.core.job import Job
from diffship.core.weights import MemoryWeights
from diffship.export import export
from diffship.exporters.onnx import Onnx
from diffship.fleet import build
from diffship.fleet.build import FleetReport, export_fleet
from diffship.fleet.done import Source, Wanted, difference
from diffship.fleet.overview import bundles_in, read_rows, repeated_bytes
from diffship.fleet.recipe import MOST, FleetTarget, fleet_target
from diffship.models.pipeline import Pipeline
from diffship.models.sources.opening import open_source

TARGETS = (fleet_target("onnx"), fleet_target("onnx", precision="int8-weights"))
SECONDS = re.compile(r"seconds")


class Made(NamedTuple):
    pipeline: Pipeline
    report: FleetReport
    graphs: Job


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, graphs_folder: Path) -> Made:
    """A fleet of the text encoder of `arch:tiny-sd`, the fastest part; read-only."""
    pipeline, graphs = open_source("arch:tiny-sd"), Job(graphs_folder)
    out = tmp_path_factory.mktemp("fleet") / "out"
    return Made(pipeline, export_fleet(pipeline, TARGETS, out, parts=["text_encoder"], job=graphs), graphs)


def again(made: Made, out: Path, targets: tuple[FleetTarget, ...] = TARGETS, **options: Any) -> FleetReport:
    pipeline = options.pop("pipeline", made.pipeline)
    return export_fleet(pipeline, targets, out, **{"parts": ["text_encoder"], "job": made.graphs, **options})


def states(report: FleetReport) -> list[str]:
    return [one.state for one in report.outcomes]


def without_times(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: without_times(entry) for key, entry in value.items() if not SECONDS.search(key)}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def content(folder: Path) -> dict[str, Any]:
    """Every file of a bundle; the manifest as JSON without the seconds that things took."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    manifest = files.pop("diffship.json")
    return {
        **{name: path.read_bytes() for name, path in files.items()},
        "diffship.json": without_times(json.loads(manifest.read_text(encoding="utf-8"))),
    }


@pytest.mark.slow
def test_bundles_are_those_of_single_exports(made: Made, tmp_path: Path) -> None:
    assert states(made.report) == ["made", "made"] and made.report.exit_code == 0
    for target in TARGETS:
        precision = target.exporter.precision
        export("arch:tiny-sd", "onnx", tmp_path / precision, parts=["text_encoder"], precision=precision)
        assert content(made.report.folder / target.name) == content(tmp_path / precision)
    digests = [part.source_digest for one in made.report.outcomes if one.bundle for part in one.bundle.manifest.parts]
    assert digests == [made.pipeline.components["text_encoder"].digest] * 2
    assert made.report.digests == {"text_encoder": digests[0]}


def test_what_is_there_is_kept(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Onnx, "export", lambda *_: pytest.fail("work began"))
    before = {path: path.stat().st_mtime_ns for path in made.report.folder.rglob("*")}
    for options in ({}, {"overwrite": True}, {"verify": False}):
        assert states(again(made, made.report.folder, **options)) == ["kept", "kept"]
    assert {path: path.stat().st_mtime_ns for path in made.report.folder.rglob("*")} == before


def test_a_stopped_fleet_goes_on_with_what_is_missing(made: Made, tmp_path: Path) -> None:
    out, first = tmp_path / "out", TARGETS[0].name
    stopping = Job(made.graphs.folder, cancel=lambda: (out / first / "diffship.json").exists())
    with pytest.raises(Cancelled):
        again(made, out, job=stopping, verify=False)
    assert [path.name for path in out.iterdir()] == [first]
    manifest = (out / first / "diffship.json").read_bytes()
    assert states(again(made, out, verify=False)) == ["kept", "made"]
    assert (out / first / "diffship.json").read_bytes() == manifest
    ours, whole = content(out / TARGETS[1].name), content(made.report.folder / TARGETS[1].name)
    assert ours["text_encoder/model.onnx_data"] == whole["text_encoder/model.onnx_data"]


def test_a_changed_option_is_refused_and_replaced_with_overwrite(made: Made, tmp_path: Path) -> None:
    out, name = tmp_path / "out", TARGETS[0].name
    again(made, out, verify=False)
    changed = (fleet_target("onnx", name, precision="int8-weights"), TARGETS[1])
    manifest = (out / TARGETS[1].name / "diffship.json").read_bytes()
    with pytest.raises(
        ConfigError, match=rf"target {name}: .*its precision is fp32, and int8-weights is asked for.*--overwrite"
    ):
        again(made, out, changed, verify=False)
    assert states(again(made, out, changed, overwrite=True, verify=False)) == ["made", "kept"]
    assert Bundle.open(out / name).manifest.recipe["target"][0]["precision"] == "int8-weights"
    assert (out / TARGETS[1].name / "diffship.json").read_bytes() == manifest


def louder(pipeline: Pipeline) -> Pipeline:
    part = pipeline.components["text_encoder"]
    arrays = {name: part.weights.read(name) for name in part.weights.names()}
    name = next(name for name in arrays if name.endswith("final_layer_norm.bias"))
    arrays[name] = arrays[name] + 1
    return pipeline.having(replace(part, weights=MemoryWeights(arrays)))


def test_other_weights_are_another_fleet(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Onnx, "export", lambda *_: pytest.fail("work began"))
    with pytest.raises(ConfigError, match="its text_encoder was made of other weights than the source has"):
        again(made, made.report.folder, pipeline=louder(made.pipeline))


CHANGES: dict[str, tuple[Callable[[Wanted], Wanted], str]] = {
    "nothing": (lambda wanted: wanted, ""),
    "less proof": (lambda wanted: replace(wanted, verify=False), ""),
    "precision": (lambda wanted: replace(wanted, exporter=Onnx(precision="fp16")), "its precision is fp32, and fp16"),
    "target": (lambda wanted: replace(wanted, exporter=fleet_target("coreml").exporter), "it is for onnx, and coreml"),
    "trajectory": (lambda wanted: replace(wanted, trajectory=2), "trajectory has 0 steps, and 2 are asked for"),
    "scheduler": (
        lambda wanted: changed(wanted, scheduler={**wanted.pipeline.scheduler, "beta_end": 0.5}),
        "its scheduler/scheduler_config.json is not the source's",
    ),
    "tokenizer": (
        lambda wanted: changed(wanted, tokenizers={"tokenizer_2": wanted.pipeline.tokenizers["tokenizer"]}),
        "its tokenizer_2/",
    ),
    "family": (
        lambda wanted: changed(wanted, family=replace(wanted.pipeline.family, name="another")),
        "its family has other numbers",
    ),
}  # fmt: skip


def changed(wanted: Wanted, **what: Any) -> Wanted:
    return replace(wanted, source=Source(replace(wanted.pipeline, **what)))


@pytest.mark.parametrize("what", CHANGES)
def test_a_bundle_is_done_if_an_export_would_write_it_again(what: str, made: Made) -> None:
    change, told = CHANGES[what]
    part = made.pipeline.components["text_encoder"]
    source = Source(replace(made.pipeline, components={"text_encoder": part}))
    found = difference(Bundle.open(made.report.folder / TARGETS[0].name), change(Wanted(Onnx(), source, True, None)))
    assert told in found and bool(found) == bool(told)


def test_clip_skip_parts_and_a_missing_proof_are_differences(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"its text_encoder gives .*last_hidden_state\.1 is asked for"):
        again(made, made.report.folder, clip_skip=1)
    with pytest.raises(ConfigError, match="its parts are text_encoder, and text_encoder, vae_decoder are asked for"):
        again(made, made.report.folder, parts=["vae_decoder", "text_encoder"])
    again(made, tmp_path / "out", TARGETS[:1], verify=False)
    with pytest.raises(ConfigError, match="it has no proof"):
        again(made, tmp_path / "out", TARGETS[:1])


@dataclass(frozen=True)
class Absent(Onnx):
    """A target whose package is not installed."""

    name: ClassVar[str] = "absent"

    def check(self, pipeline: Pipeline) -> Any:
        raise MissingExtra("coremltools", "coreml")


@dataclass(frozen=True)
class Wrong(Onnx):
    """A target whose parts never compute the same."""

    name: ClassVar[str] = "wrong"

    def export(self, *_: Any) -> Any:
        raise ParityError("part text_encoder does not compute the same")


@pytest.fixture
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    for cls in (Absent, Wrong):
        monkeypatch.setitem(registry.EXPORTERS, cls.name, f"{__name__}:{cls.__name__}")


def test_what_is_not_installed_stops_all_before_work_unless_it_is_optional(
    others: None, made: Made, tmp_path: Path
) -> None:
    targets = (TARGETS[0], FleetTarget("phone", Absent()))
    with pytest.raises(UnsupportedError, match=r"target phone: coremltools is not installed.*optional = true"):
        again(made, tmp_path / "out", targets)
    assert not (tmp_path / "out").exists()
    report = again(made, tmp_path / "out", (targets[0], replace(targets[1], optional=True)), verify=False)
    assert states(report) == ["made", "skipped"] and report.exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TARGETS[0].name]


def test_a_target_that_fails_stops_no_other(others: None, made: Made, tmp_path: Path) -> None:
    monkeyed = (FleetTarget("bad", Wrong()), TARGETS[0])
    with pytest.raises(UnsupportedError):  # no engine reads it, which is known before work
        again(made, tmp_path / "out", monkeyed)
    report = again(made, tmp_path / "out", monkeyed, verify=False)
    assert states(report) == ["failed", "made"] and report.exit_code == 1
    assert [path.name for path in (tmp_path / "out").iterdir()] == [TARGETS[0].name]
    assert states(again(made, tmp_path / "out", monkeyed, verify=False)) == ["failed", "kept"]


def test_if_all_fail_there_is_no_folder_but_the_users_own(others: None, made: Made, tmp_path: Path) -> None:
    assert states(again(made, tmp_path / "out", (FleetTarget("bad", Wrong()),), verify=False)) == ["failed"]
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    assert states(again(made, tmp_path / "mine", (FleetTarget("bad", Wrong()),), verify=False)) == ["failed"]
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_source_that_changes_meanwhile_is_no_fleet(made: Made, tmp_path: Path) -> None:
    bundle = made.report.outcomes[0].bundle
    assert bundle is not None
    odd = replace(made.pipeline, components={"text_encoder": louder(made.pipeline).components["text_encoder"]})
    with pytest.raises(SourceError, match="the source changed meanwhile"):
        build._require_source(bundle, Source(odd))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parts": ["unett"]}, "did you mean 'unet'"),
        ({"controlnets": {"edges": "nowhere"}}, "exported to onnx, and the target is coreml"),
        ({"targets": ()}, "has no [[target]]"),
        ({"out": ""}, "no folder for the fleet"),
        ({"trajectory": -1}, "trajectory is -1"),
        ({"out": "nowhere/out"}, "is not a folder"),
    ],
)
def test_what_cannot_be_is_said_before_work(
    options: dict[str, Any], message: str, made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    targets = options.pop("targets", (fleet_target("coreml"), *TARGETS))
    with pytest.raises(DiffshipError) as fault:
        again(made, options.pop("out", "out"), targets, **options)
    assert message in str(fault.value) and list(tmp_path.iterdir()) == []


def test_a_bundle_is_no_folder_for_a_fleet_and_what_is_not_a_bundle_stays(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a bundle; a fleet is a folder of bundles"):
        again(made, made.report.folder / TARGETS[0].name)
    place = tmp_path / TARGETS[0].name
    place.mkdir()
    (place / "mine.txt").write_text("kept")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match=r"is not a (bundle|clean bundle)"):
            again(made, tmp_path, overwrite=overwrite)
    assert (place / "mine.txt").read_text() == "kept"


def test_rows_tell_the_odd_one_out(made: Made, tmp_path: Path) -> None:
    rows = read_rows(made.report.folder)
    assert [(row.name, row.proof, row.odd) for row in rows] == [(one.name, "proved", ()) for one in TARGETS]
    files = [path for row in rows for path in (made.report.folder / row.name).rglob("*") if path.is_file()]
    data = [path.read_bytes() for path in files if path.name != "diffship.json"]
    assert sum(row.bytes for row in rows) == sum(map(len, data))
    assert repeated_bytes(rows) == sum(map(len, data)) - sum(map(len, set(data))) > 0
    for name, pipeline in (("a", made.pipeline), ("b", louder(made.pipeline)), ("c", made.pipeline)):
        again(made, tmp_path, (fleet_target("onnx", name),), pipeline=pipeline, verify=False)
    assert [(row.name, row.odd) for row in read_rows(tmp_path)] == [("a", ()), ("b", ("text_encoder",)), ("c", ())]
    assert {row.proof for row in read_rows(tmp_path)} == {"unproven"}


def test_every_bundle_of_a_folder_is_found_or_they_are_too_many(tmp_path: Path) -> None:
    for number in range(MOST):
        (tmp_path / f"{number:02}").mkdir()
        (tmp_path / f"{number:02}" / "diffship.json").touch()
    (tmp_path / "notes.txt").touch()
    (tmp_path / "00").rename(tmp_path / "model_index.json")  # a legal name of a target
    assert len(bundles_in(tmp_path)) == MOST
    (tmp_path / "model_index.json").rename(tmp_path / "00")
    assert [path.name for path in bundles_in(tmp_path)] == [f"{number:02}" for number in range(MOST)]
    (tmp_path / "one more").mkdir()
    (tmp_path / "one more" / "diffship.json").touch()
    with pytest.raises(ConfigError, match="holds more than 64 bundles"):
        bundles_in(tmp_path)
