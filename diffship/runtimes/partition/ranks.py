"""Ranks: the processes of one distributed run, which send tensors to each other and never wait without end.

`torchrun` starts them (or whoever sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT). Tensors go from point to point
through gloo, which carries host memory over TCP, so that runners of any engine may talk to each other.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.distributed import note_left
from diffship.core.errors import ConfigError, DeadlineError, PeerError, RunnerError
from diffship.core.lazy import lazy
from diffship.runtimes.partition.lanes import Job, ThreadEach

if TYPE_CHECKING:
    import torch
    from torch import distributed
else:
    torch, distributed = lazy("torch"), lazy("torch.distributed")

Array = NDArray[Any]
_POLL_SECONDS = 0.05
_TOLD_SECONDS = 2.0  # for what another rank has said of its end, which is a courtesy
_GRACE_SECONDS = 5.0  # after which a wait is given up though gloo has not
_NAMES = ("RANK", "WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class Place:
    """Where a process stands among those of its run, as its environment says."""

    rank: int
    size: int
    host: str
    port: int
    attempt: int  # how often torchrun has started the processes anew
    own_store: bool  # whether rank 0 opens the port itself; torchrun does it for its processes


def place_of(environ: Mapping[str, str] = os.environ) -> Place | None:
    """The place of this process; None if it is the only one.

    Raises:
        ConfigError: a variable is missing, or is no such number.
    """
    if environ.get("WORLD_SIZE", "1") in ("", "0", "1"):
        return None
    values = {name: environ.get(name, "") for name in (*_NAMES, "MASTER_ADDR")}
    wrong = [name for name in values if not (values[name].isdigit() if name in _NAMES else values[name])]
    if wrong:
        raise ConfigError(
            f"{wrong[0]} is {values[wrong[0]]!r} where several processes run together; start them with: "
            "torchrun --nproc-per-node N -m diffship run ..."
        )
    rank, size, port = (int(values[name]) for name in _NAMES)
    if rank >= size or not 0 < port < 1 << 16:
        raise ConfigError(f"RANK {rank} of WORLD_SIZE {size} at MASTER_PORT {port} is not a place in a run")
    attempt = environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    own = environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    return Place(rank, size, values["MASTER_ADDR"], port, int(attempt) if attempt.isdigit() else 0, own)


class Ranks:
    """This process among `place.size`. Every wait ends after `timeout` seconds with a PeerError that names the rank.

    A context manager: what was raised inside is told to the others, whose errors then quote it.
    """

    def __init__(
        self, place: Place, facts: Mapping[str, str], timeout: float, join_timeout: float | None = None
    ) -> None:
        """Waits until all are there, `join_timeout` seconds at most (default: `timeout`).

        `facts` are what all of them must have in common, by what it is called.

        Raises:
            PeerError: a rank did not come in time, or has other facts; the message names it.
        """
        self.rank, self.size, self.timeout = place.rank, place.size, timeout
        self._watch = ThreadEach(timeout + _GRACE_SECONDS)
        self._store: Any = None
        self._asking = ThreadEach(join_timeout or timeout)  # a table whose keeper is stopped answers never
        note_left()  # C++ libraries may abort the process when it ends
        try:
            self._store = _store(place, join_timeout or timeout, timeout)
            self._meet(facts, join_timeout or timeout)
            self._asking.close()
            self._asking = ThreadEach(min(timeout, _TOLD_SECONDS))
            group = distributed.PrefixStore("gloo", self._store)  # type: ignore[attr-defined]
            wait = timedelta(seconds=timeout)
            distributed.init_process_group("gloo", store=group, rank=self.rank, world_size=self.size, timeout=wait)
        except (RuntimeError, DeadlineError) as fault:
            raise PeerError(f"rank {self.rank} could not join the others: {_short(fault)}") from fault

    def send(self, rank: int, array: Array, tag: int, what: str) -> Callable[[], None]:
        """Begin to send `array` to `rank`; the result waits for its end, and keeps the array until then."""
        tensor = torch.from_numpy(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        work = self._guarded(rank, what, lambda: distributed.isend(tensor, rank, tag=tag))
        return lambda: self._wait(work, rank, what, tensor)

    def expect(self, rank: int, buffer: Array, tag: int, what: str) -> Callable[[], Array]:
        """Begin to receive into `buffer`, which is contiguous; the result waits for its end, and gives the buffer."""
        tensor = torch.from_numpy(buffer.reshape(-1).view(np.uint8))
        work = self._guarded(rank, what, lambda: distributed.irecv(tensor, rank, tag=tag))

        def finish() -> Array:
            self._wait(work, rank, what, tensor)
            return buffer

        return finish

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, kind: type[BaseException] | None, fault: BaseException | None, _: object) -> None:
        if fault is not None:
            self._tell(str(fault) or type(fault).__name__)
        self._watch.close()
        self._asking.close()
        if fault is None:
            distributed.destroy_process_group()

    def _meet(self, facts: Mapping[str, str], timeout: float) -> None:
        for name, value in facts.items():
            self._set(f"{self.rank}/{name}", value)
        self._set(f"{self.rank}", "here")
        deadline, late = time.monotonic() + timeout, set(range(self.size))
        while late := {rank for rank in late if not self._has(f"{rank}")}:
            if time.monotonic() > deadline:
                names = ", ".join(map(str, sorted(late)))
                raise PeerError(f"rank {names} of {self.size} did not come within {timeout:g} s")
            time.sleep(_POLL_SECONDS)
        for rank in range(self.size):
            for name, ours in facts.items():
                theirs = self._get(f"{rank}/{name}")
                if theirs != ours:
                    raise PeerError(f"rank {rank} has another {name} than rank {self.rank}: {theirs}, not {ours}")

    def _guarded(self, rank: int, what: str, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as fault:
            raise self._lost(rank, what, fault) from fault

    def _wait(self, work: Any, rank: int, what: str, kept: object) -> None:
        # in a thread of its own: a signal is heard while this one waits
        job = Job(what, lambda: work.wait(timedelta(seconds=self.timeout)))
        try:
            self._watch({rank: job})
        except (RuntimeError, DeadlineError) as fault:
            raise self._lost(rank, what, fault) from fault

    def _lost(self, rank: int, what: str, fault: Exception) -> PeerError:
        late = isinstance(fault, DeadlineError) or "imed out" in str(fault)
        happened = f"did not answer within {self.timeout:g} s" if late else "went away"
        told = self._told(rank)
        return PeerError(f"rank {rank} {happened} ({what}){f'; it said: {told}' if told else ''}")

    def _asked(self, call: Callable[[], Any]) -> Any:
        """What a call of the table gives."""
        return self._asking(
            {0: Job(f"the table of the ranks, which rank 0 or torchrun keeps (rank {self.rank})", call)}
        )[0]

    def _set(self, key: str, value: str) -> None:
        self._asked(lambda: self._store.set(key, value))

    def _has(self, key: str) -> bool:
        return bool(self._asked(lambda: self._store.check([key])))

    def _get(self, key: str) -> str:
        return str(self._asked(lambda: self._store.get(key)).decode(errors="replace"))

    def _tell(self, text: str) -> None:
        try:
            self._set(f"fault/{self.rank}", text[:500])
        except (RuntimeError, DeadlineError, RunnerError):
            return  # the one who keeps the table is gone; the others see that themselves

    def _told(self, rank: int) -> str:
        """What another rank said when it ended, as far as that can be known now."""
        key = f"fault/{rank}"
        try:
            return self._get(key) if self._has(key) else ""
        except (RuntimeError, DeadlineError, RunnerError):
            return ""


def _store(place: Place, join_timeout: float, timeout: float) -> Any:
    """A table that all ranks read and write. Raises PeerError if nobody keeps it."""
    keeps = place.own_store and place.rank == 0
    if not keeps:
        _reach(place, join_timeout)
    wait = timedelta(seconds=timeout)
    made = distributed.TCPStore(place.host, place.port, place.size, keeps, wait, False)  # type: ignore[attr-defined]
    return distributed.PrefixStore(f"diffship/{place.attempt}", made)  # type: ignore[attr-defined]


def _reach(place: Place, timeout: float) -> None:
    """Waits until the port is open, because torch prints a page about one that is not."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            # a source port is chosen first: a connection to a free port may otherwise get that port, and meet itself
            source = ("", _other_port(place.port))
            socket.create_connection((place.host, place.port), max(_POLL_SECONDS, timeout), source).close()
            return
        except OSError as fault:
            if time.monotonic() > deadline:
                raise PeerError(
                    f"rank 0 did not come within {timeout:g} s: {place.host}:{place.port} does not answer ({fault})"
                ) from None
        time.sleep(_POLL_SECONDS)


def _other_port(port: int) -> int:
    """A free port of this machine that is not `port`."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        found = int(probe.getsockname()[1])
    return found if found != port else _other_port(port)


def _short(fault: Exception) -> str:
    return " ".join(str(fault).split())[:200]
