"""What lies in a fleet's folder, from the manifests alone: nothing is hashed and no engine is opened."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from diffship.core.bundle import Bundle
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.manifest import MANIFEST_NAME, Manifest
from diffship.fleet.recipe import MOST


@dataclass(frozen=True)
class FleetRow:
    """One bundle of a fleet. `manifest` is None if it does not open, and `fault` says why.

    odd: parts whose source digest is not the one that most bundles have.
    """

    name: str
    manifest: Manifest | None
    odd: tuple[str, ...] = ()
    fault: str = ""

    @property
    def bytes(self) -> int:
        """Of all files; 0 if it does not open."""
        return 0 if self.manifest is None else sum(record.size for record in self.manifest.files.values())

    @property
    def proof(self) -> str:
        """`proved`; `unproven`, `2 of 3 proved`; `graphs proved` if what was built of them waits for its engine."""
        if self.manifest is None:
            return "-"
        parts = [part.proof for part in self.manifest.parts]
        proved = sum(proof["status"] == "proved" for proof in parts)
        graphs = sum(_graph(proof) == "proved" for proof in parts)
        if proved == len(parts):
            return "proved"
        if not proved and graphs == len(parts):
            return "graphs proved"
        return f"{proved} of {len(parts)} proved" if proved else "unproven"

    def to_json(self) -> dict[str, Any]:
        """The row as `inspect --json` gives it; figures are null if the bundle does not open."""
        made = self.manifest
        return {
            "name": self.name,
            "target": None if made is None else made.target,
            "precisions": [] if made is None else sorted({part.precision for part in made.parts}),
            "parts": {} if made is None else {part.name: part.source_digest for part in made.parts},
            "bytes": self.bytes,
            "proof": self.proof,
            "same_source": made is not None and not self.odd,
            "odd_parts": list(self.odd),
            "fault": self.fault or None,
        }


def bundles_in(folder: str | Path) -> list[Path]:
    """The bundles right below `folder`, by name; none if it is no folder, or is a bundle or a model itself.

    Raises:
        ConfigError: there are more than a fleet has.
    """
    root = Path(folder)
    if not root.is_dir() or any((root / name).is_file() for name in (MANIFEST_NAME, "model_index.json")):
        return []
    found = (path for path in root.iterdir() if not path.name.startswith(".") and (path / MANIFEST_NAME).is_file())
    few = sorted(islice(found, MOST + 1))
    if len(few) > MOST:
        raise ConfigError(f"{root} holds more than {MOST} bundles, the most that a fleet has. Name one of them")
    return few


def read_rows(folder: str | Path) -> tuple[FleetRow, ...]:
    """A row for each bundle in `folder`; one that does not open has a row too."""
    found = [_opened(path) for path in bundles_in(folder)]
    usual = usual_digests([row.manifest for row in found if row.manifest is not None])
    return tuple(
        FleetRow(row.name, row.manifest, _odd(row.manifest, usual) if row.manifest else (), row.fault) for row in found
    )


def usual_digests(manifests: Sequence[Manifest]) -> dict[str, str | None]:
    """By part: the source digest that more than half of the bundles with that part have; None if none has."""
    votes: dict[str, Counter[str]] = {}
    for manifest in manifests:
        for part in manifest.parts:
            votes.setdefault(part.name, Counter())[part.source_digest] += 1
    first = {name: count.most_common(1)[0] for name, count in votes.items()}
    return {name: digest if 2 * times > votes[name].total() else None for name, (digest, times) in first.items()}


def repeated_bytes(rows: Sequence[FleetRow]) -> int:
    """Bytes of files that another bundle of the fleet holds too, beyond the first copy of each."""
    records = [record for row in rows if row.manifest for record in row.manifest.files.values()]
    return sum(one.size for one in records) - sum({one.sha256: one.size for one in records}.values())


def _opened(path: Path) -> FleetRow:
    try:
        return FleetRow(path.name, Bundle.open(path).manifest)
    except DiffshipError as fault:
        return FleetRow(path.name, None, fault=str(fault))


def _odd(manifest: Manifest, usual: Mapping[str, str | None]) -> tuple[str, ...]:
    return tuple(part.name for part in manifest.parts if part.source_digest != usual[part.name])


def _graph(proof: Mapping[str, Any]) -> object:
    graph = proof.get("graph")
    return graph.get("status") if isinstance(graph, dict) else None
