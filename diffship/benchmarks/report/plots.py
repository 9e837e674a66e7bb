"""Plots of results as PNG and SVG: latency against quality, differences, splits, memory bars, roofline.

A title says what was found, the small line below it where. Kinds differ in colour and in shape, so that they are told
apart in grey too, and are labelled where they stand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffship.benchmarks.measure.record import Results
from diffship.benchmarks.measure.row import Row
from diffship.benchmarks.report.labels import label, subject
from diffship.benchmarks.report.tables import KEYS, OLD, cases, comparisons, digits, figure, is_share, spread_of
from diffship.core.errors import ConfigError, MissingExtra

Figure = Any  # matplotlib's; the package is imported when a plot is drawn
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "//", "..", "\\\\", "xx", "--", "oo", "**")  # a bar's shape
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito
LATENCIES = {"image_seconds_p50": "an image", "unet_call_seconds": "a U-Net call"}
LOWER_IS_BETTER = ("rms", "distance")
_SIZE = (8.0, 4.8)  # inches


def draw_all(results: Results, folder: Path) -> list[Path]:
    """The plots that the rows suffice for, as `SUITE-NAME.png` and `.svg` in `folder`.

    Raises:
        MissingExtra: matplotlib is not installed. ConfigError: there are rows for none of them.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for file, draw in zip(stems(folder, results.suite), PLOTS.values(), strict=True):
        plot = draw(results)
        if plot is not None:
            written += save(plot, file.with_suffix(""), str(results.to_json()["digest"]))
    if not written:
        raise ConfigError(f"{results.suite} has no memory, rate or quality figures: nothing to plot")
    return written


def stems(folder: Path, suite: str) -> list[Path]:
    """The PNG files that `draw_all` may write for a suite, each with an SVG beside it."""
    return [folder / f"{suite}-{name}.png" for name in PLOTS]


def save(plot: Figure, stem: Path, digest: str) -> list[Path]:
    """Write both files; the SVG names the results that it was drawn from, and equal results give equal bytes."""
    library = _library()
    library.rcParams["svg.hashsalt"] = "diffship"
    paths = [stem.with_suffix(suffix) for suffix in (".png", ".svg")]
    plot.savefig(paths[0], dpi=120, metadata={"Software": None, "Description": digest})
    plot.savefig(paths[1], metadata={"Date": None, "Description": digest})
    return paths


def memory_bars(results: Results) -> Figure | None:
    """Peak memory per case, in GB; None if no row has one."""
    found = [row for metrics in cases(results.rows).values() if (row := _peak(metrics)) is not None]
    if not found:
        return None
    plot, axes = _axes(height=1.6 + 0.35 * len(found))
    kinds = _kinds(str(row.conditions.get("runner")) for row in found)
    for place, row in enumerate(found):
        gigabytes = (row.value or 0) / 1e9
        colour, marker = kinds[str(row.conditions.get("runner"))]
        axes.barh(place, gigabytes, color=colour, edgecolor="black", hatch=HATCHES[MARKERS.index(marker)])
        axes.text(gigabytes, place, f" {figure(row.value or 0, 'bytes')}", va="center", fontsize=8)
    axes.set_yticks(range(len(found)), [row.subject for row in found], fontsize=8)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.02)
    axes.set_xlabel("peak memory, GB    ← left is better")
    return _finished(plot, axes, results, _thriftiest(found))


def _thriftiest(rows: Sequence[Row]) -> str:
    """Who needs the least memory in most of the cases that several ran, in words."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.conditions.get(key) for key in KEYS if key != "runner"), []).append(row)
    least = [min(group, key=lambda row: row.value or 0) for group in groups.values() if len(group) > 1]
    if not least:
        return " to ".join(_value(end(rows, key=lambda row: row.value or 0)) for end in (min, max))
    names = [str(row.conditions["runner"]) for row in least]
    name = max(dict.fromkeys(names), key=names.count)
    return f"{name} needs the least memory in {names.count(name)} of {len(least)} comparisons"


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
    plot, axes = _axes()
    span = sorted([min(x for _, x, _ in points) / 3, max(x for _, x, _ in points) * 3, top / slope])
    axes.loglog(span, [min(top, slope * x) for x in span], color="black")
    axes.annotate(
        "what this machine can do", (span[-1], top), (-4, 4), textcoords="offset points", ha="right", fontsize=8
    )
    colours, markers = (_kinds(names) for names in zip(*(_halves(name) for name, _, _ in points), strict=True))
    for name, x, y in points:
        who, what = _halves(name)
        axes.loglog([x], [y], markers[what][1], color=colours[who][0], label=name, markersize=7)
    axes.set_xlabel("FLOP per byte of weights")
    axes.set_ylabel("FLOP/s    up is better →")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.01, 0.5))  # beside the points: they lie close together
    best = max(points, key=lambda point: point[2])
    said = f"{best[0]} reaches {100 * best[2] / top:.0f} % of this machine's best matrix product"
    return _finished(plot, axes, results, said)


def latency_quality(results: Results) -> Figure | None:
    """Quality over milliseconds of an image or else of a U-Net call, for subjects that have both, with their intervals.

    None if none has.
    """
    pairs: dict[str, dict[str, Row]] = {}
    for row in results.rows:
        if row.value is not None and (row.kind == "quality" or row.metric in LATENCIES):
            pairs.setdefault(row.subject, {})[row.metric] = row
    points = [(name, *found) for name, metrics in pairs.items() if (found := _latency_and_quality(metrics))]
    if not points:
        return None
    plot, axes = _axes()
    points.sort(key=lambda point: point[1].value or 0)
    kinds = _kinds(_kind(name) for name, _, _ in points)
    for index, (name, seconds, quality) in enumerate(points):
        colour, marker = kinds[_kind(name)]
        x, y, scale = 1e3 * (seconds.value or 0), _scaled(quality.value or 0, quality), _scaled(1, quality)
        bars = {"xerr": _errors(seconds, 1e3), "yerr": _errors(quality, scale)}
        axes.errorbar(x, y, **bars, fmt=marker, color=colour, ecolor=colour, elinewidth=1, capsize=3, markersize=7)
        _pointed(axes, name, (x, y), colour, index)
    axes.set_xlabel(f"ms {LATENCIES[points[0][1].metric]}    ← left is better")
    axes.set_ylabel(f"{_unit(points[0][2])}    up is better →")
    axes.margins(x=0.12, y=0.25)
    return _finished(plot, axes, results, _trade(points))


def _trade(points: Sequence[tuple[str, Row, Row]]) -> str:
    """In words: the fastest whose quality the best one's interval holds, or else the next best; and the slowest."""
    best = max(points, key=lambda point: point[2].value or 0)[2]
    floor = best.value if best.low is None else best.low
    quick, slow = next(point for point in points if (point[2].value or 0) >= (floor or 0)), points[-1]
    if quick is slow and len(points) > 1:  # nothing comes near it: the next best
        quick = max(points[:-1], key=lambda point: point[2].value or 0)
    ends = [quick] if quick is slow else [quick, slow]
    said = [f"{name}: {_share(quality)} in {_value(seconds)}" for name, seconds, quality in ends]
    return f"{'; '.join(said)} {LATENCIES[quick[1].metric]}"


def split_curve(results: Results) -> Figure | None:
    """Judge figures over the calls of the large model, with their intervals; None if no row is of a split."""
    lines: dict[str, list[Row]] = {}
    for row in results.rows:
        if row.kind == "quality" and row.unit == "share" and "cloud_calls" in row.conditions and row.value is not None:
            lines.setdefault(row.metric, []).append(row)
    if not lines:
        return None
    plot, axes = _axes()
    said = []
    for index, (metric, rows) in enumerate(sorted(lines.items())):
        rows.sort(key=lambda row: row.conditions["cloud_calls"])
        calls, values = [row.conditions["cloud_calls"] for row in rows], [_scaled(row.value or 0, row) for row in rows]
        errors = [_errors(row, 100) for row in rows]
        spread = [[error[side][0] if error else 0 for error in errors] for side in (0, 1)]
        colour = COLOURS[index]
        axes.errorbar(calls, values, spread, marker=MARKERS[index], color=colour, capsize=3)
        axes.annotate(
            label(metric), (calls[-1], values[-1]), (8, 0), textcoords="offset points", color=colour, va="center"
        )
        ends = [f"{digits(values[at])} % at {calls[at]}" for at in (0, -1)]
        said.append(f"{label(metric)}: {' calls of the large model, '.join(ends)}")
    axes.set_xlabel("calls of the large model")
    axes.set_ylabel("pictures recognised, %    up is better →")
    axes.margins(x=0.1, y=0.15)
    return _finished(plot, axes, results, "\n".join(said))


def differences(results: Results) -> Figure | None:
    """Comparisons of quality with their 95 % intervals, a panel a figure; None if nothing is compared."""
    panels: dict[str, list[tuple[str, float, float, float]]] = {}
    old = False
    for name, row, span in comparisons(results):
        old = old or "interval" not in row.conditions
        scale = 100 if is_share(name, results) else 1
        value, low, high = (scale * edge for edge in span)
        panels.setdefault(name, []).append((row.subject, value, low, high))
    if not panels:
        return None
    tallest = max(len(lines) for lines in panels.values())
    plot, every = _panels(len(panels), 1.9 + 0.35 * tallest)
    for axes, (name, lines) in zip(every, panels.items(), strict=True):
        _panel(axes, name, lines, is_share(name, results))
    clear = sum(low > 0 or high < 0 for lines in panels.values() for _, _, low, high in lines)
    count = sum(map(len, panels.values()))
    said = f"{clear} of {count} comparisons: an interval that leaves out zero{f' ({OLD})' if old else ''}"
    plot.suptitle(said, fontsize=12, x=0.02, ha="left")
    plot.supxlabel(_where(results), fontsize=7, color="0.35")
    return plot


def _panel(axes: Any, name: str, lines: Sequence[tuple[str, float, float, float]], points: bool) -> None:
    """Intervals that leave out zero are filled and blue, the others hollow and orange."""
    axes.axvline(0, color="black", linewidth=1)
    for place, (_, value, low, high) in enumerate(lines):
        clear = low > 0 or high < 0
        colour = COLOURS[0] if clear else COLOURS[1]
        axes.hlines(place, low, high, color=colour, linewidth=2)
        axes.plot([value], [place], "o" if clear else "D", color=colour, markerfacecolor=colour if clear else "white")
        axes.annotate(
            f"{value:+.1f}" if points else f"{value:+.3f}",
            (value, place),
            (0, 6),
            textcoords="offset points",
            ha="center",
            fontsize=7,
        )
    axes.set_yticks(range(len(lines)), [text for text, *_ in lines], fontsize=8)
    axes.margins(y=0.2)
    axes.invert_yaxis()
    axes.tick_params(axis="x", labelsize=8)
    side = "← left is better" if name.endswith(LOWER_IS_BETTER) else "right is better →"
    unit = ", points" if points else ""
    axes.set_xlabel(f"difference of {label(name)}{unit}, 95 % interval\n(for the first: {side})", fontsize=8)
    axes.grid(True, axis="x", alpha=0.3)


def _peak(metrics: Mapping[str, Row]) -> Row | None:
    row = metrics.get("peak_device_bytes") or metrics.get("peak_host_bytes")
    return row if row is not None and row.value is not None else None


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


def _kinds(names: Iterable[str]) -> dict[str, tuple[str, str]]:
    """A colour and a marker for each of different names."""
    return {
        name: (COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)])
        for index, name in enumerate(dict.fromkeys(names))
    }


def _halves(name: str) -> tuple[str, str]:
    """Who computes, and what: `emoji / onnxruntime / unet` is ("onnxruntime", "emoji / unet")."""
    words = name.split(" / ")
    return (words[1], " / ".join([words[0], *words[2:]])) if len(words) > 2 else (name, name)


def _kind(name: str) -> str:
    """Models of one treatment look alike: `40 %, cut` and `58 %, cut`."""
    return name.rpartition(", ")[2]


def _scaled(value: float, row: Row) -> float:
    return 100 * value if row.unit == "share" else value


def _unit(row: Row) -> str:
    return f"pictures recognised ({label(row.metric)}), %" if row.unit == "share" else label(row.metric)


def _share(row: Row) -> str:
    """`88.6 % top-5`."""
    return f"{digits(_scaled(row.value or 0, row))}{' %' if row.unit == 'share' else ''} {label(row.metric)}"


def _value(row: Row) -> str:
    return figure(row.value or 0, row.unit)


def _errors(row: Row, scale: float) -> list[list[float]] | None:
    """How far its spread reaches below and above a row's value, as error bars take it; None if it has none."""
    ends = spread_of(row)
    if ends is None or row.value is None:
        return None
    return [[max(0.0, scale * (row.value - ends[0]))], [max(0.0, scale * (ends[1] - row.value))]]


def _pointed(axes: Any, text: str, at: tuple[float, float], colour: str, index: int) -> None:
    """Label a point; neighbours' labels stand at other heights."""
    offset = ((8, 12), (8, -20), (8, 30), (8, -38))[index % 4]
    arrow = {"arrowstyle": "-", "color": colour, "linewidth": 0.6}
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.8}
    axes.annotate(
        text, at, offset, textcoords="offset points", fontsize=8, color=colour, arrowprops=arrow, bbox=box, zorder=5
    )


def _axes(height: float = _SIZE[1]) -> tuple[Figure, Any]:
    plot, (axes,) = _panels(1, height)
    return plot, axes


def _panels(count: int, height: float) -> tuple[Figure, Any]:
    """A figure with `count` axes beside each other."""
    _library()
    from matplotlib.figure import Figure as Drawn

    plot = Drawn(figsize=(_SIZE[0], height), layout="constrained")
    return plot, plot.subplots(1, count, squeeze=False)[0]


def _finished(plot: Figure, axes: Any, results: Results, said: str) -> Figure:
    axes.set_title(said, fontsize=11, loc="left")
    plot.supxlabel(_where(results), fontsize=7, color="0.35")
    axes.grid(True, which="both", alpha=0.3)
    return plot


def _where(results: Results) -> str:
    title = subject(str(results.settings.get("title", results.suite)))
    return f"{title}; {results.hardware}; commit {results.environment.get('commit')}"


def _library() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise MissingExtra("matplotlib", "plots") from None
    return matplotlib


PLOTS: Mapping[str, Callable[[Results], Figure | None]] = {
    "memory": memory_bars,
    "roofline": roofline,
    "quality": latency_quality,
    "splits": split_curve,
    "differences": differences,
}
