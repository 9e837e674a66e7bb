"""Plots of results as PNG and SVG: latency against quality, differences, memory bars, roofline. Readable in grey."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffship.benchmarks.record import Results
from diffship.benchmarks.tables import cases, comparisons
from diffship.core.errors import ConfigError, MissingExtra
from diffship.core.row import Row

Figure = Any  # matplotlib's; the package is imported when a plot is drawn
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LATENCIES = {"image_seconds_p50": "seconds per image", "unet_call_seconds": "seconds per U-Net call"}
_SIZE = (8.0, 4.8)  # inches


def draw_all(results: Results, folder: Path) -> list[Path]:
    """The plots that the rows suffice for, as `SUITE-NAME.png` and `.svg` in `folder`.

    Raises:
        MissingExtra: matplotlib is not installed. ConfigError: there are rows for none of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    plots = (memory_bars, roofline, latency_quality, split_curve, differences)
    for file, draw in zip(stems(folder, results.suite), plots, strict=True):
        figure = draw(results)
        if figure is not None:
            written += save(figure, file.with_suffix(""), str(results.to_json()["digest"]))
    if not written:
        raise ConfigError(f"{results.suite} has no memory, rate or quality figures: nothing to plot")
    return written


def stems(folder: Path, suite: str) -> list[Path]:
    """The PNG files that `draw_all` may write for a suite, each with an SVG beside it."""
    return [folder / f"{suite}-{name}.png" for name in ("memory", "roofline", "quality", "splits", "differences")]


def save(figure: Figure, stem: Path, digest: str) -> list[Path]:
    """Write both files; the SVG names the results that it was drawn from, and equal results give equal bytes."""
    library = _library()
    library.rcParams["svg.hashsalt"] = "diffship"
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    figure.savefig(paths[0], dpi=120, metadata={"Software": None, "Description": digest})
    figure.savefig(paths[1], metadata={"Date": None, "Description": digest})
    return paths


def memory_bars(results: Results) -> Figure | None:
    """Peak memory per case, in GB; None where no row has one."""
    bars = []
    for metrics in cases(results.rows).values():
        row = metrics.get("peak_device_bytes") or metrics.get("peak_host_bytes")
        if row is not None and row.value is not None:
            bars.append((row.subject, row.value / 1e9))
    if not bars:
        return None
    figure, axes = _axes(height=1.2 + 0.35 * len(bars))
    axes.barh([name for name, _ in bars], [value for _, value in bars], color="0.55", edgecolor="black")
    axes.invert_yaxis()
    axes.set_xlabel("peak memory, GB")
    return _finished(figure, axes, results)


def roofline(results: Results) -> Figure | None:
    """Achieved FLOP/s over FLOP per byte of weights, under this machine's copy and matrix-product ceilings.

    Williams et al. 2009; the intensity counts weights only, so points lie to the right of where activations put them.
    """
    machine = {row.metric: row.value for row in results.rows if row.subject == "this machine" and row.value}
    points = [point for metrics in cases(results.rows).values() if (point := _point(metrics)) is not None]
    if not points or not {"matrix_product_flops", "copy_bytes_per_second"} <= machine.keys():
        return None
    top, slope = machine["matrix_product_flops"], machine["copy_bytes_per_second"]
    assert top is not None and slope is not None
    figure, axes = _axes()
    span = [min(x for _, x, _ in points) / 3, max(x for _, x, _ in points) * 3, top / slope]
    line = sorted(span)
    axes.loglog(line, [min(top, slope * x) for x in line], color="black", label="ceiling of this machine")
    for index, (name, x, y) in enumerate(points):
        axes.loglog([x], [y], MARKERS[index % len(MARKERS)], color=str(0.15 + 0.06 * (index % 10)), label=name)
    axes.set_xlabel("FLOP per byte of weights")
    axes.set_ylabel("FLOP/s")
    axes.legend(fontsize=6)
    return _finished(figure, axes, results)


def latency_quality(results: Results) -> Figure | None:
    """Quality over seconds, of an image or else of a U-Net call, for subjects that have both; None where none has."""
    pairs: dict[str, dict[str, Row]] = {}
    for row in results.rows:
        if row.value is not None and (row.kind == "quality" or row.metric in LATENCIES):
            pairs.setdefault(row.subject, {})[row.metric] = row
    points = [(name, *found) for name, metrics in pairs.items() if (found := _latency_and_quality(metrics))]
    if not points:
        return None
    figure, axes = _axes()
    for index, (name, seconds, quality) in enumerate(points):
        mark = MARKERS[index % len(MARKERS)]
        axes.plot(seconds.value, quality.value, mark, color=str(0.1 * (index % 7)), label=name)
    axes.set_xlabel(LATENCIES[points[0][1].metric])
    axes.set_ylabel(points[0][2].metric.replace("_", " "))
    axes.legend(fontsize=7)
    return _finished(figure, axes, results)


def split_curve(results: Results) -> Figure | None:
    """Judge figures over the calls of the large model, with their intervals; None where no row is of a split."""
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for row in results.rows:
        if row.kind == "quality" and row.unit == "share" and "cloud_calls" in row.conditions and row.value is not None:
            low, high = (row.value if edge is None else edge for edge in (row.low, row.high))
            lines.setdefault(row.metric, []).append((row.conditions["cloud_calls"], row.value, low, high))
    if not lines:
        return None
    figure, axes = _axes()
    for index, (metric, points) in enumerate(sorted(lines.items())):
        calls, values, lows, highs = zip(*sorted(points), strict=True)
        spread = [
            [v - low for v, low in zip(values, lows, strict=True)],
            [high - v for v, high in zip(values, highs, strict=True)],
        ]
        axes.errorbar(calls, values, spread, marker=MARKERS[index], color=str(0.5 * index), capsize=3, label=metric)
    axes.set_xlabel("calls of the large model")
    axes.set_ylabel("share of pictures recognised")
    axes.legend(fontsize=8)
    return _finished(figure, axes, results)


def differences(results: Results) -> Figure | None:
    """Comparisons of quality with their 95 % intervals, a panel a figure; None where nothing is compared."""
    panels: dict[str, list[tuple[str, float, float, float]]] = {}
    for name, row, span in comparisons(results):
        panels.setdefault(name, []).append((row.subject, *span))
    if not panels:
        return None
    tallest = max(len(lines) for lines in panels.values())
    figure, every = _panels(len(panels), 1.4 + 0.35 * tallest)
    for axes, (name, lines) in zip(every, panels.items(), strict=True):
        subjects, values, lows, highs = (list(column) for column in zip(*lines, strict=True))
        places = list(range(len(lines)))
        axes.axvline(0, color="black", linewidth=1)
        axes.hlines(places, lows, highs, color="0.4", linewidth=2)
        axes.plot(values, places, "o", color="black")
        axes.set_yticks(places, subjects, fontsize=8)
        axes.margins(y=0.2)
        axes.invert_yaxis()
        axes.tick_params(axis="x", labelsize=8)
        axes.set_xlabel(f"difference of {name}, 95 % interval", fontsize=8)
        axes.grid(True, axis="x", alpha=0.3)
    figure.suptitle("\n".join(_title(results)), fontsize=8)
    return figure


def _latency_and_quality(metrics: Mapping[str, Row]) -> tuple[Row, Row] | None:
    seconds = [metrics[name] for name in LATENCIES if name in metrics]
    # a share of pictures is what readers ask for first; then whatever there is
    quality = sorted(
        (row for row in metrics.values() if row.kind == "quality"), key=lambda r: (r.unit != "share", r.metric)
    )
    return (seconds[0], quality[0]) if seconds and quality else None


def _point(metrics: Any) -> tuple[str, float, float] | None:
    wanted = [metrics.get(name) for name in ("flops", "conv_linear_macs", "attention_macs", "file_bytes")]
    values = [row.value for row in wanted if row is not None and row.value]
    if len(values) != len(wanted):
        return None
    flops, conv, attention, size = values
    return wanted[0].subject, 2 * (conv + attention) / size, flops


def _axes(height: float = _SIZE[1]) -> tuple[Figure, Any]:
    figure, (axes,) = _panels(1, height)
    return figure, axes


def _panels(count: int, height: float) -> tuple[Figure, Any]:
    """A figure with `count` axes beside each other."""
    _library()
    from matplotlib.figure import Figure as Drawn

    figure = Drawn(figsize=(_SIZE[0], height), layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False)[0]


def _finished(figure: Figure, axes: Any, results: Results) -> Figure:
    axes.set_title("\n".join(_title(results)), fontsize=8)
    axes.grid(True, which="both", alpha=0.3)
    return figure


def _title(results: Results) -> Sequence[str]:
    return results.hardware, str(results.settings.get("title", results.suite))


def _library() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise MissingExtra("matplotlib", "plots") from None
    return matplotlib
