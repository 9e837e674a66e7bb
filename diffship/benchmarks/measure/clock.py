"""What runs inside a measured process, in whatever environment: standard library only, one JSON line at the end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping

SPAWNED = "DIFFSHIP_BENCH_SPAWNED"
TURNS = "DIFFSHIP_BENCH_TURNS"  # two descriptors: a byte to read is our turn, one to write says that we are ready
SHORT_SECONDS = 0.25  # what other processes left in the caches is a small part of a call of this length
LONG_SECONDS = 60.0  # a call of this length is its own warm-up: what only the first one pays is small beside it


def told(offline: bool = True) -> dict[str, str]:
    """Environment for a process that is started now: when that was; without progress bars, and without the hub unless
    that process may fetch what is to be measured."""
    quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
    return {SPAWNED: repr(time.time()), **quiet, **({"HF_HUB_OFFLINE": "1"} if offline else {})}


def timed(load: Callable[[], Callable[[], object]], calls: int) -> dict[str, object]:
    """Seconds of `load()`, of the first call (warm-up) and of `calls` more calls of what it returned.

    If the first one takes `LONG_SECONDS` or more, it is the one that counts, and there are no others. If this process
    takes turns with others, `calls` is theirs to say; `turns` has what each turn took, else it is empty. `cold` runs
    from the start of this process, as its parent told it, to the end of the first call.
    """
    spawned = float(os.environ.get(SPAWNED) or time.time())
    started = time.perf_counter()
    call = load()
    loaded = time.perf_counter()
    call()
    first = time.perf_counter()
    cold = time.time() - spawned
    warm_up = first - loaded
    turns: list[float] = []
    if warm_up >= LONG_SECONDS:
        seconds = [warm_up]
    elif TURNS in os.environ:
        seconds = turns = list(_in_turns(call))
    else:
        seconds = [_once(call) for _ in range(calls)]
    return {"load": loaded - started, "first": warm_up, "cold": cold, "seconds": seconds, "turns": turns}


def report(document: Mapping[str, object]) -> None:
    """Print the figures for the process that measures this one."""
    print("\n" + json.dumps(document), flush=True)


def device_peak(device: str) -> int | None:
    """Bytes on the GPU: the most that torch's allocator reserved, or, for other engines, all that it holds now.

    Engines other than torch keep what they once took, so that the end of the calls shows their peak. None on a CPU.
    """
    if device == "cpu":
        return None
    torch = sys.modules.get("torch")
    reserved = int(torch.cuda.max_memory_reserved()) if torch is not None else 0
    return reserved or _gpu_used()


def waits(call: Callable[[], object], device: str) -> Callable[[], object]:
    """`call`, made to return only when the GPU has finished what torch gave it; on a CPU, `call` itself."""
    if device == "cpu":
        return call
    import torch

    def finished() -> object:
        result = call()
        torch.cuda.synchronize()
        return result

    return finished


def _gpu_used() -> int | None:
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "--id=0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout.split()[0]) << 20
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return None


def _in_turns(call: Callable[[], object]) -> Iterator[float]:
    """Seconds of the call of each turn, until there are no more turns.

    The first turn is not timed: while the others were loaded, parts of this model may have left memory.
    """
    ours, ready = map(int, os.environ[TURNS].split(","))
    os.write(ready, b".")
    if os.read(ours, 1):
        call()
        os.write(ready, b".")
    while os.read(ours, 1):
        yield _turn(call)
        os.write(ready, b".")


def _turn(call: Callable[[], object]) -> float:
    """Seconds of one call; a short one has another before it, for the caches.

    One, not many: if a machine is shared, a mean of many calls varies as much as a single call does (5 %, over any
    window up to nine seconds), so that many short turns, side by side, are what makes a ratio sharp.
    """
    seconds = _once(call)
    return _once(call) if seconds < SHORT_SECONDS else seconds


def _once(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
