"""What a run will cost and what it binds its user to, before anything is downloaded; needs no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffship.cli.output import size_text, table
from prove.catalogue import UNVERIFIED, Checkpoint
from prove.steps import Prover

# Constants of the estimate, for a machine with two cores like the reference machine and a line of 100 Mbit/s: the
# U-Net of SD1.5 exports in about 100 s (3.44 GB) and runs at about 150 GFLOP/s. An estimate, never a result.
DOWNLOAD_BYTES_PER_SECOND = 12.5e6
EXPORT_SECONDS_PER_BYTE = 2 * 100 / 3.44e9  # export, and the proof that follows it
MACS_PER_SECOND = 75e9


@dataclass(frozen=True)
class Estimate:
    """Bytes to download and minutes for all steps of one checkpoint."""

    bytes: int
    minutes: float


def estimate(entry: Checkpoint, base: Checkpoint | None, repeat: int) -> Estimate:
    """Download (base included), export with proof, verification, and `repeat` + 1 pictures; no measurement."""
    size = entry.bytes + (base.bytes if base else 0)
    calls = entry.steps * (2 if entry.guidance > 1 and entry.sampler != "lcm" else 1)
    pictures = (repeat + 1) * calls * entry.gmac * 1e9 / MACS_PER_SECOND
    seconds = size / DOWNLOAD_BYTES_PER_SECOND + 1.5 * size * EXPORT_SECONDS_PER_BYTE + pictures
    return Estimate(size, seconds / 60)


def plan_text(prover: Prover, entries: Sequence[Checkpoint]) -> str:
    """A table of these rows with bytes, minutes, licence and standing, then terms and revisions in full."""
    starting = [entry for entry in entries if prover.standing(entry) is None]
    total = sum(estimate_of(prover, entry).minutes for entry in starting)
    size = sum(entry.bytes for entry in with_bases(prover, starting))
    named = with_bases(prover, entries)
    lines = [
        _table(prover, entries),
        "",
        f"to download: at most {size_text(size)}; about {total:.0f} minutes on two cores and 100 Mbit/s (an estimate)",
        "",
        "licences:",
        *(f"  {entry.name}: {entry.licence}{'; ' + entry.terms if entry.terms else ''}" for entry in named),
        "revisions:",
        *(f"  {entry.name}: {entry.repo} {_revision(entry)}" for entry in named),
    ]
    return "\n".join(lines)


def estimate_of(prover: Prover, entry: Checkpoint) -> Estimate:
    """The estimate with the entry's base in it."""
    base = prover.catalogue.checkpoints.get(entry.base) if entry.base else None
    return estimate(entry, base, prover.box.repeat)


def with_bases(prover: Prover, entries: Iterable[Checkpoint]) -> list[Checkpoint]:
    """The entries and the checkpoints that supply their missing parts, each once."""
    rows = prover.catalogue.checkpoints
    names = dict.fromkeys(name for entry in entries for name in (entry.name, entry.base) if name)
    return [rows[name] for name in names]


def _table(prover: Prover, entries: Iterable[Checkpoint]) -> str:
    head = ("checkpoint", "download", "minutes", "licence", "standing")
    rows = []
    for entry in entries:
        standing = prover.standing(entry)
        known = estimate_of(prover, entry)
        state = "to do" if standing is None else f"{standing[0]}: {standing[1]}"
        minutes = f"{known.minutes:.0f}" if standing is None else "-"
        sign = "" if entry.bytes_from == "exact" else "<= "
        rows.append((entry.name, f"{sign}{size_text(entry.bytes)}", minutes, entry.licence, state))
    return table(head, rows)


def _revision(entry: Checkpoint) -> str:
    if entry.revision == UNVERIFIED:
        return "unverified: the hub's main is resolved at download, printed and recorded; --pin writes it down"
    return f"{entry.revision} ({entry.evidence})"
