"""Tables of results, and several machines in one table beside the published rows."""

from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffship.benchmarks.measure.record import Results
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.publish.choosing import engines_table
from diffship.benchmarks.report import published
from diffship.benchmarks.report.hardware import koala_form, lcm_form, merged
from diffship.benchmarks.report.plots import differences, draw_all
from diffship.benchmarks.report.table import Table
from diffship.benchmarks.report.tables import (
    OLD_NOTE,
    best,
    csv_text,
    differences_table,
    digits,
    figure,
    figures_table,
    matrix_table,
    parts_table,
    ratios_table,
)
from diffship.core.errors import ConfigError, MissingExtra

CPU = {"cpu": "Some CPU", "threads": 2, "memory_gib": 24.0, "gpus": [], "packages": {"numpy": "2"}, "commit": "abc"}
GPU = {**CPU, "gpus": ["Some GPU"], "gpu_memory_gib": [80.0]}
IMAGE = {"model": "arch:sdxl", "weights": "random weights", "runner": "torch", "part": "image", "batch": 1}
IMAGE |= {"steps": 4, "size": 1024, "precision": "fp16", "device": "cpu"}
UNET = {**IMAGE, "part": "unet", "steps": 0}
VERDICT = {"against": "b", "verdict": "better", "seeds": 3}


def results(rows: list[Row], environment: dict[str, Any] = CPU) -> Results:
    return Results("some-suite", "diffship bench --suite some-suite", "0" * 64, environment, {}, tuple(rows))


def image(seconds: float | None, steps: int = 4, status: str = "ok", **changes: Any) -> list[Row]:
    conditions = {**IMAGE, "steps": steps, **changes}
    subject = f"sdxl, {steps}"
    row = Row("s", subject, "image_seconds_p50", seconds, "s", status, low=seconds, high=seconds, conditions=conditions)
    peak = Row("s", subject, "peak_host_bytes", 12.5e9, "bytes", kind="memory", conditions=conditions)
    return [row] if seconds is None else [row, peak]


def unet() -> list[Row]:
    values = {"call_seconds_p50": (0.5, "s"), "call_seconds_p90": (0.6, "s"), "flops": (1.5e12, "FLOP/s")}
    values |= {"file_bytes": (2e9, "bytes"), "conv_linear_macs": (3e11, "MAC"), "attention_macs": (1e11, "MAC")}
    values |= {"share_of_ceiling": (0.75, ""), "peak_host_bytes": (4e9, "bytes")}
    rows = [Row("s", "u", name, value, unit, conditions=UNET) for name, (value, unit) in values.items()]
    machine = {"matrix_product_flops": "FLOP/s", "copy_bytes_per_second": "bytes/s"}
    return [*rows, *(Row("s", "this machine", name, 2e12, unit, kind="load") for name, unit in machine.items())]


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.2345, "s", "1.23 s"),
        (12.345, "s", "12.3 s"),
        (0.01234, "s", "12.3 ms"),
        (0.0000123, "s", "12.3 us"),
        (3_210_000_000, "bytes", "3.21 GB"),
        (1.5e12, "FLOP/s", "1.50 TFLOP/s"),
        (0.25, "share", "25.0 %"),
        (0, "bytes", "0 B"),
        (1234.0, "count", "1,234"),
    ],
)
def test_figures_have_three_digits_and_a_unit(value: float, unit: str, text: str) -> None:
    assert figure(value, unit) == text


def test_digits_never_use_exponents() -> None:
    assert [digits(v) for v in (1234.5, 0.00012345, 99.99)] == ["1,234", "0.000123", "100.0"]


def test_a_case_is_one_line_with_its_labels() -> None:
    table = parts_table(results(unet()))
    (line,) = table.rows
    cells = dict(zip(table.head, line, strict=True))
    assert cells["model"] == "arch:sdxl (random weights)" and cells["part"] == "unet, 1024 px"
    assert (cells["median"], cells["peak memory"], cells["of the peak"]) == ("500 ms", "4.00 GB", "75 %")
    assert any("The peak: 2.00 TFLOP/s" in note for note in table.notes)


def test_columns_that_say_nothing_are_not_shown() -> None:
    rows = (("a", "-", "3", "1 s"), ("b", "", "3", "2 s"))
    table = Table(("of", "p99", "seeds", "time"), rows, ("a note",), ("measured there",))
    shown = "| of | time |\n| --- | --- |\n| a | 1 s |\n| b | 2 s |\n\nIn every row: seeds: 3.\n\na note"
    assert table.markdown(origin=False) == shown
    assert table.markdown() == f"{shown}\n\nmeasured there"
    assert table.text() == "of  time\na   1 s\nb   2 s\nIn every row: seeds: 3.\na note\nmeasured there"
    assert replace(table, kept=("seeds",)).condensed().head == ("of", "seeds", "time")
    assert Table(("of", "time"), (("a", "1 s"),)).condensed().head == ("of", "time"), "one row has no equals"


def test_what_did_not_run_stands_in_the_table_with_its_reason() -> None:
    row = Row("s", "sdxl / sdcpp", "image_seconds_p50", None, "s", "missing", reason="no cmake", conditions=IMAGE)
    table = parts_table(results([row]))
    assert table.rows[0][3] == "missing"
    assert "sdxl / sdcpp: missing, no cmake" in table.notes
    assert "| missing |" in table.markdown() and "missing" in table.text()


@pytest.mark.parametrize(
    ("low", "high", "n", "said"),
    [
        (0.4, 0.6, 3, "faster"),
        (1.1, 1.6, 3, "slower"),
        (0.9, 1.1, 3, "no difference shown"),
        (0.4, 0.6, 2, "2 rounds: too few to say"),
        (None, None, 1, "1 round: too few to say"),
        (0.5, 0.5, 1, "1 round: too few to say"),  # as earlier files have one round
    ],
)
def test_a_ratio_says_no_more_than_its_interval(low: float | None, high: float | None, n: int, said: str) -> None:
    conditions = {**UNET, "against": "diffusers", "interval": f"Student t over {n} rounds"}
    row = Row("s", "x", "call_seconds_ratio", 0.5, low=low, high=high, n=n, conditions=conditions)
    table = ratios_table(results([row]))
    assert table.rows[0][-1] == said and table.rows[0][-3] == (f"{low:.3f} to {high:.3f}" if n > 1 else "-")
    assert OLD_NOTE not in table.notes


def test_an_interval_of_the_earlier_method_claims_nothing() -> None:
    """Files from before intervals said how they were made: theirs were wrong up to one time in four."""
    ratio = Row("s", "x", "call_seconds_ratio", 0.5, low=0.4, high=0.6, n=3, conditions={**UNET, "against": "b"})
    table = ratios_table(results([ratio]))
    assert table.rows[0][-1] == "to be measured again" and OLD_NOTE in table.notes
    judged = Row("s", "a", "top5_difference", 0.1, low=0.05, high=0.15, kind="quality", conditions=VERDICT)
    table = differences_table(results([judged]))
    assert table.rows[0][-1] == "to be measured again" and OLD_NOTE in table.notes
    assert OLD_NOTE in figures_table(results([judged])).notes


def test_a_pair_is_shown_once() -> None:
    rows = [
        Row("s", "x", "call_seconds_ratio", value, conditions={**UNET, "runner": a, "against": b})
        for a, b, value in (("a", "b", 0.5), ("b", "a", 2.0), ("a", "c", 0.7))
    ]
    assert [row[2:5] for row in ratios_table(results(rows)).rows] == [("a", "b", "0.500"), ("a", "c", "0.700")]


def test_percentiles_and_spreads_that_few_samples_do_not_have_are_not_shown() -> None:
    values = {"call_seconds_p50": (0.5, 12), "call_seconds_p90": (0.6, 12), "call_seconds_p99": (0.7, 12)}
    rows = [
        Row("s", "u", name, value, "s", low=0.5, high=0.5, n=n, conditions=UNET) for name, (value, n) in values.items()
    ]
    table = parts_table(results(rows))
    cells = dict(zip(table.head, table.rows[0], strict=True))
    names = ("median", "between rounds", "90 % within", "99 % within")
    assert [cells[name] for name in names] == ["500 ms", "-", "600 ms", "-"]


def test_the_fastest_and_the_smallest_of_a_case_are_named() -> None:
    rows = []
    for runner, seconds, peak in (("onnxruntime", 0.5, 3e9), ("openvino", 0.4, 5e9)):
        where = {**UNET, "runner": runner}
        rows.append(Row("s", runner, "call_seconds_p50", seconds, "s", conditions=where))
        rows.append(Row("s", runner, "peak_host_bytes", peak, "bytes", kind="memory", conditions=where))
    (line,) = best(results(rows))
    assert line == "arch:sdxl, unet, 1024 px: fastest openvino (400 ms), smallest onnxruntime (3.00 GB)"
    assert best(results(rows[:2])) == [], "alone it is neither"
    for rounds, said in ((1, "1 round: too few to say"), (2, "2 rounds: too few to say")):
        told = best(replace(results(rows), settings={"rounds": rounds}))
        assert told[0] == line and told[1].startswith(said)
    assert best(replace(results(rows), settings={"rounds": 3})) == [line]


@pytest.mark.parametrize(
    ("ratio", "measured", "taken"),
    [
        ((0.7, 0.9), "openvino", "openvino"),
        ((1.1, 1.4), "onnxruntime", "openvino"),  # the other way round
        ((0.9, 1.1), "openvino", "onnxruntime"),  # no difference shown: it needs less memory
        (None, "", "onnxruntime"),
    ],
)
def test_which_engine_is_taken_follows_the_rounds_then_the_memory(
    ratio: tuple[float, float] | None, measured: str, taken: str
) -> None:
    rows = []
    for runner, seconds, peak in (("onnxruntime", 0.5, 3e9), ("openvino", 0.4, 5e9), ("diffusers", 0.1, 1e9)):
        where = {**UNET, "runner": runner}
        rows.append(Row("s", runner, "call_seconds_p50", seconds, "s", conditions=where))
        rows.append(Row("s", runner, "peak_host_bytes", peak, "bytes", kind="memory", conditions=where))
    if ratio:
        against = "onnxruntime" if measured == "openvino" else "openvino"
        where = {**UNET, "runner": measured, "against": against, "interval": "Student t over 3 rounds"}
        low, high = ratio
        rows.append(Row("s", "x", "call_seconds_ratio", 1.0, low=low, high=high, n=3, conditions=where))
    ((what, take, needs, others, sure),) = engines_table([results(rows)]).rows
    other = {"openvino": "onnxruntime", "onnxruntime": "openvino"}[taken]
    figures = {"openvino": "400 ms, 5.00 GB", "onnxruntime": "500 ms, 3.00 GB"}
    assert what == "arch:sdxl (random weights), unet, 1024 px, cpu" and take == f"**{taken}**"
    assert (needs, others) == (figures[taken], f"{other}: {figures[other]}"), "other people's engines are not ours"
    verdict = "not compared" if ratio is None else "faster" if taken == "openvino" else "no difference shown"
    assert sure == f"openvino against onnxruntime: {verdict}"


def test_csv_has_every_row_with_all_digits() -> None:
    text = csv_text([results(unet()), results(image(1 / 3), GPU)])
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == len(unet()) + 2
    assert float(next(row for row in rows if row["metric"] == "image_seconds_p50")["value"]) == 1 / 3
    assert {row["hardware"] for row in rows} == {"Some CPU, 2 threads, 24 GiB", "Some GPU (80 GiB)"}


def test_published_rows_are_those_of_the_papers() -> None:
    koala = {(row.model, row.hardware): row for row in published.koala()}
    assert len(koala) == 33
    lightning = koala["koala-lightning-700M", "RTX 4090 24 GB"]
    assert (lightning.seconds, lightning.memory_gb, lightning.steps, lightning.size) == (0.66, 8.3, 10, 1024)
    assert koala["sdxl-base-1.0", "RTX 3060 Ti 8 GB"].seconds is None
    lcm = {(row.hardware, row.steps): row.seconds for row in published.lcm_lora()}
    assert lcm["A100 80 GB", 4] == 1.2 and lcm["Intel i9-10980XE, 1 of 36 cores", 25] == 219


def test_koala_form_has_models_by_hardware_with_out_of_memory() -> None:
    table = koala_form([results(image(30.0)), results(image(1.0) + image(None, 25, "OOM"), GPU)])
    assert table.head[:4] == (
        "model",
        "where from",
        "Some CPU, 2 threads, 24 GiB, torch, fp16",
        "Some GPU (80 GiB), torch, fp16",
    )
    rows = {row[0]: row for row in table.rows}
    assert rows["arch:sdxl (random weights), 1024 px, 4 steps"][1:4] == (
        "measured",
        "30.0 s / 12.5 GB",
        "1.00 s / 12.5 GB",
    )
    assert rows["arch:sdxl (random weights), 1024 px, 25 steps"][3] == "OOM"
    theirs = rows["sdxl-base-1.0, 1024 px, 25 steps"]
    assert theirs[1] == "published" and "OOM" in theirs and "3.23 s / 11.9 GB" in theirs
    assert "sdxl-turbo, 512 px, steps not stated" in rows


def test_lcm_form_has_hardware_by_model_and_steps() -> None:
    table = lcm_form([results(image(2.0) + image(12.0, 25), GPU)])
    rows = {row[0]: dict(zip(table.head, row, strict=True)) for row in table.rows}
    ours = rows["Some GPU (80 GiB), torch, fp16"]
    assert ours["arch:sdxl (random weights), 1024 px, 4 steps"] == "2.00 s"
    assert ours["arch:sdxl (random weights), 1024 px, 25 steps"] == "12.0 s"
    assert rows["Mac M1 Max"]["SDXL + LCM-LoRA, 1024 px, 4 steps"] == "6.5 s"
    assert ours["SDXL, 1024 px, 25 steps"] == "-"  # published cells stay with their own hardware


def test_merging_refuses_what_contradicts_itself_or_holds_no_image() -> None:
    with pytest.raises(ConfigError, match="two files measure"):
        merged([results(image(1.0)), results(image(2.0))])
    with pytest.raises(ConfigError, match="holds a whole image"):
        merged([results(unet())])
    assert merged([results(image(1.0)), results(image(1.0))]).keys() == {"KOALA's form", "LCM-LoRA's form"}


def test_any_suite_has_a_table() -> None:
    rows = [
        Row("q", "emoji, load 0.7", "top1", 0.5, "share", kind="quality", low=0.4, high=0.6),
        Row("q", "emoji, deadline_seconds 13.472", "late_share", 0.25, low=0.25, high=0.25),
        Row("q", "emoji", "build_peak_bytes", None, "bytes", "failed", reason="no room"),
    ]
    table = figures_table(results(rows))
    assert table.rows == (
        ("70 % load", "top-1", "50.0 %", "40.0 % to 60.0 %"),
        ("deadline 13.5 s", "late", "25.0 %", "-"),
        ("-", "peak memory", "failed", "-"),
    )
    assert table.notes[:2] == ("All of emoji.", "emoji: failed, no room")


def test_a_comparison_that_is_said_both_ways_stands_once() -> None:
    about = [("a", "b", 0.1), ("b", "a", 0.1), ("a", "c", 0.2)]
    rows = [
        Row("s", f"{a} against {b}", "ratio_deviation", value, conditions={**UNET, "runner": a, "against": b})
        for a, b, value in about
    ]
    assert [row[:3] for row in figures_table(results(rows)).rows] == [
        ("a against b", "largest deviation of a run", "10.0 %"),
        ("a against c", "largest deviation of a run", "20.0 %"),
    ]


def test_subjects_beside_each_other_and_what_may_be_said_of_them() -> None:
    share = {"unit": "share", "kind": "quality", "low": 0.4, "high": 0.6}
    said = {"against": "large", "seeds": 3, "verdict": "no difference shown", "interval": "Student t"}
    rows = [
        Row("q", "small", "top5", 0.5, **share),
        Row("q", "small", "unet_call_seconds", 0.01, "s", low=0.009, high=0.02),
        Row("q", "large", "frechet_distance", 19.25, "features", kind="quality", low=19.25, high=19.25),
        Row(
            "q",
            "small against large",
            "top5_difference",
            -0.01,
            kind="quality",
            low=-0.03,
            high=0.01,
            n=1500,
            conditions=said,
        ),
    ]
    found = matrix_table(results(rows))
    assert found.head == ("of", "top-5", "U-Net call", "Fréchet distance, features")
    assert found.rows == (("small", "50.0 % (40.0 to 60.0)", "10.0 ms", "-"), ("large", "-", "-", "19.2"))
    (line,) = differences_table(results(rows)).rows
    said = ("small against large", "top-5", "-1.0 points", "-3.0 to +1.0", "3", "1,500", "no difference shown")
    assert line == said


def test_plots_need_their_extra_and_say_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingExtra, match=r"pip install 'diffship\[plots\]'"):
        draw_all(results(unet()), tmp_path)


@pytest.mark.slow
def test_plots_are_drawn_from_rows_and_name_their_results(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    quality = Row("s", "m", "clip_score", 0.3, kind="quality")
    latency = Row("s", "m", "image_seconds_p50", 2.0, "s")
    share = {"unit": "share", "kind": "quality"}
    splits = [Row("s", f"split {k},4", "top5", k / 4, **share, conditions={"cloud_calls": k}) for k in (0, 4)]
    compared = Row("s", "a against b", "top5_difference", 0.1, low=0.05, high=0.15, conditions=VERDICT)
    found = results([*unet(), quality, latency, *splits, compared])
    written = draw_all(found, tmp_path / "a")
    names = ("memory", "roofline", "quality", "splits", "differences")
    assert {file.name for file in written} == {f"some-suite-{name}.{end}" for name in names for end in ("png", "svg")}
    for file in written:
        assert file.stat().st_size > 1000
    svg = (tmp_path / "a" / "some-suite-memory.svg").read_text(encoding="utf-8")
    assert str(found.to_json()["digest"]) in svg
    draw_all(found, tmp_path / "b")
    for file in written:
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


@pytest.mark.slow
def test_differences_are_drawn_as_they_are() -> None:
    pytest.importorskip("matplotlib")
    rows = [
        Row("s", "a against b", f"{metric}_difference", value, low=value - 0.1, high=value + 0.3, conditions=VERDICT)
        for metric, value in (("top5", 0.2), ("teacher_rms", -0.5), ("top5", 0.4))
    ]
    figure = differences(results([*rows, Row("s", "a", "top5", 0.9, "share", kind="quality")]))
    assert figure is not None
    drawn = {axes.get_xlabel(): axes for axes in figure.axes}
    assert set(drawn) == {
        "difference of top-5, points, 95 % interval\n(for the first: right is better →)",
        "difference of distance to the teacher, 95 % interval\n(for the first: ← left is better)",
    }
    assert figure.get_suptitle() == "3 of 3 comparisons: an interval that leaves out zero (to be measured again)"
    top5 = next(axes for label, axes in drawn.items() if "top-5" in label)
    points = [line.get_xdata()[0] for line in top5.lines if line.get_marker() == "o"]
    assert points == pytest.approx([20, 40])
    spans = [each.get_segments()[0][:, 0].tolist() for each in top5.collections]
    assert spans == [pytest.approx([10, 50]), pytest.approx([30, 70])]
    assert differences(results([Row("s", "a", "top5", 0.9, kind="quality")])) is None


@pytest.mark.slow
def test_nothing_to_plot_is_said(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(ConfigError, match="nothing to plot"):
        draw_all(results([Row("s", "x", "m", 1.0)]), tmp_path)
