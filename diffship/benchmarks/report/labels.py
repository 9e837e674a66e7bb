"""What metrics and subjects are called where people read them; files keep their own names."""

from __future__ import annotations

import re
from collections.abc import Sequence

_LABELS = {
    "call_images_per_second": "engine alone",
    "cloud_seconds": "calls of the cloud",
    "cold_start_seconds_median": "from the command to the picture",
    "edge_seconds": "calls of the device",
    "export_bytes_on_disk": "on disk",
    "frechet_distance": "Fréchet distance",
    "generation_ms": "whole picture",
    "goodput_over_capacity": "served in time, of the capacity",
    "handoff_bytes_without_embeddings": "handoff without embeddings",
    "handoff_http_ms": "HTTP over loopback",
    "handoff_pack_ms": "writing",
    "handoff_share": "share of the picture's time",
    "handoff_total_ms": "all three",
    "handoff_unpack_ms": "reading",
    "image_seconds_ratio": "time ratio",
    "installed_bytes": "installed packages",
    "large_rms": "distance to the large model",
    "late_share": "late",
    "max_abs": "largest error",
    "memory_slope": "memory grows by",
    "nearest_training_rms_median": "distance to the nearest training picture, median",
    "plan_bytes": "engine file",
    "process_seconds": "whole process",
    "psnr_db": "PSNR",
    "ratio_deviation": "largest deviation of a run",
    "refusal_seconds_p99": "99 % of refusals within",
    "refused_share": "refused",
    "request_seconds_p50": "median answer",
    "request_seconds_p99": "99 % of answers within",
    "slowest_over_fastest_client": "slowest client over fastest",
    "teacher_rms": "distance to the teacher",
    "throughput": "pictures served",
    "throughput_ratio": "gain",
    "top1": "top-1",
    "top5": "top-5",
    "unet_call_seconds": "U-Net call",
    "weight_bytes": "weights",
}
_ENDS = (
    ("peak_resident_bytes", "peak memory"),
    ("peak_bytes", "peak memory"),
    ("_seconds", ""),
    ("_bytes", ""),
    ("_ms", ""),
)
# shares that their files hold as plain numbers
SHARES = {
    "goodput_over_capacity",
    "handoff_share",
    "late_share",
    "ratio_deviation",
    "refused_share",
    "share_of_ceiling",
}
_SECONDS = re.compile(r"\b(?:(\w+)_)?seconds (\d+(?:\.\d+)?)")
_LOAD = re.compile(r"\bload (\d+(?:\.\d+)?)")


def label(metric: str) -> str:
    """`teacher_rms` is "distance to the teacher", `build_seconds` "build", `build_peak_bytes` "peak memory"."""
    if metric in _LABELS:
        return _LABELS[metric]
    for end, word in _ENDS:
        if metric.endswith(end):
            return word or label(metric.removesuffix(end))
    return metric.replace("_", " ")


def subject(text: str) -> str:
    """`deadline_seconds 13.472` is "deadline 13.5 s", `load 0.7` "70 % load"."""
    text = _SECONDS.sub(
        lambda found: f"{found[1]} {float(found[2]):.3g} s" if found[1] else f"{float(found[2]):.3g} s", text
    )
    return _LOAD.sub(lambda found: f"{100 * float(found[1]):.0f} % load", text)


def shared(subjects: Sequence[str]) -> str:
    """The words, up to a comma, with which all subjects begin: `emoji, 25 steps`; empty if there are none."""
    words = [text.split(", ") for text in dict.fromkeys(subjects)]
    common = []
    for place in zip(*words, strict=False):
        if len(set(place)) > 1:
            break
        common.append(place[0])
    return ", ".join(common)
