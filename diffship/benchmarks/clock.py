"""What runs inside a measured process, in whatever environment: standard library only, one JSON line at the end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping

SPAWNED = "DIFFSHIP_BENCH_SPAWNED"


def told() -> dict[str, str]:
    """Environment for a process that is started now: when that was; offline, without progress bars."""
    quiet = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {SPAWNED: repr(time.time()), **quiet}


def timed(load: Callable[[], Callable[[], object]], calls: int) -> dict[str, object]:
    """Seconds of `load()`, of the first call (warm-up) and of `calls` more calls of what it returned.

    `cold` runs from the start of this process, as its parent told it, to the end of the first call.
    """
    spawned = float(os.environ.get(SPAWNED) or time.time())
    started = time.perf_counter()
    call = load()
    loaded = time.perf_counter()
    call()
    first = time.perf_counter()
    cold = time.time() - spawned
    seconds = [_once(call) for _ in range(calls)]
    return {"load": loaded - started, "first": first - loaded, "cold": cold, "seconds": seconds}


def report(document: Mapping[str, object]) -> None:
    """Print the figures for the process that measures this one."""
    print("\n" + json.dumps(document), flush=True)


def device_peak(device: str) -> int | None:
    """Largest memory that torch's allocator held on the GPU, in bytes; None on a CPU."""
    if device == "cpu":
        return None
    import torch

    return int(torch.cuda.max_memory_reserved())


def _once(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
