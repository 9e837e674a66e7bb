"""Counters, gauges and histograms in Prometheus' text form (exposition format 0.0.4)."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping

SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
IMAGES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
EDGES = {"diffship_model_call_images": IMAGES}  # SECONDS for all others
Labels = tuple[tuple[str, str], ...]

HELP = {
    "diffship_requests_total": ("counter", "HTTP requests by route and status"),
    "diffship_request_seconds": ("histogram", "from the first byte of a request to its answer's last"),
    "diffship_generations_total": ("counter", "accepted requests by how they ended"),
    "diffship_refused_total": ("counter", "requests refused for want of capacity"),
    "diffship_restarts_total": ("counter", "starts of another engine process after one died"),
    "diffship_model_call_images": ("histogram", "images that shared a model call"),
    "diffship_model_call_seconds": ("histogram", "duration of a model call"),
    "diffship_waiting": ("gauge", "requests that wait"),
    "diffship_running": ("gauge", "requests being drawn"),
    "diffship_ready": ("gauge", "1 where the model takes requests"),
}


class Metrics:
    """Threads may share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[tuple[str, Labels], float] = {}
        self._histograms: dict[tuple[str, Labels], list[float]] = {}

    def count(self, name: str, amount: float = 1, **labels: str) -> None:
        key = (name, _labels(labels))
        with self._lock:
            self._values[key] = self._values.get(key, 0) + amount

    def observe(self, name: str, value: float, **labels: str) -> None:
        """Into a histogram."""
        key, edges = (name, _labels(labels)), EDGES.get(name, SECONDS)
        with self._lock:
            entry = self._histograms.setdefault(key, [0.0] * (len(edges) + 2))
            for place, edge in enumerate(edges):
                entry[place] += value <= edge
            entry[-2] += 1
            entry[-1] += value

    def value(self, name: str, **labels: str) -> float:
        with self._lock:
            return self._values.get((name, _labels(labels)), 0)

    def text(self, gauges: Mapping[tuple[str, str], float]) -> str:
        """The whole page; `gauges` are (name, model) read at this moment."""
        with self._lock:
            lines = [(name, "", labels, value) for (name, labels), value in self._values.items()]
            lines += [(name, "", (("model", model),), value) for (name, model), value in gauges.items()]
            for (name, labels), entry in self._histograms.items():
                lines += _buckets(name, labels, entry)
        out = []
        for name, (kind, text) in HELP.items():
            out += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            out += [f"{name}{suffix}{_shown(labels)} {value:.12g}" for at, suffix, labels, value in lines if at == name]
        return "\n".join(out) + "\n"


def _buckets(name: str, labels: Labels, entry: list[float]) -> Iterable[tuple[str, str, Labels, float]]:
    for edge, value in zip(EDGES.get(name, SECONDS), entry, strict=False):
        yield name, "_bucket", (*labels, ("le", f"{edge:g}")), value
    yield name, "_bucket", (*labels, ("le", "+Inf")), entry[-2]
    yield name, "_count", labels, entry[-2]
    yield name, "_sum", labels, entry[-1]


def _labels(labels: Mapping[str, str]) -> Labels:
    return tuple(sorted(labels.items()))


def _shown(labels: Labels) -> str:
    escaped = [(key, value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")) for key, value in labels]
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped) + "}" if escaped else ""
