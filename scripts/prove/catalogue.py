"""The catalogue: which published checkpoints are proved, at which commit, under which licence, and what each needs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffship.core.atomic import write_file
from diffship.core.document import read_toml
from diffship.core.errors import ConfigError
from diffship.core.strict import bounds, choices, load, unknown

HERE = Path(__file__).parent
CATALOGUE = HERE / "catalogue.toml"
UNVERIFIED = "unverified"
SCHEMA = 1
MAX_BYTES = 1 << 20
_COMMIT = re.compile(r"[0-9a-f]{40}\Z")
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,62}[a-z0-9])?\Z")
_REVISION = rf'(?m)^revision *= *"{UNVERIFIED}".*\n'
_KINDS = ("exact", "parameters")


@dataclass(frozen=True)
class Checkpoint:
    """One published checkpoint; `bytes` is what is downloaded, `gmac` the cost of one U-Net call at `size` pixels.

    `revision` is a commit of 40 hexadecimal digits, or "unverified": then the commit that the hub calls `main` is
    taken at download time and recorded. `evidence` says where the commit was seen. `parts` are the folders that must
    arrive ("." is the top of the repository); a file among them is a LoRA, which is fused into `base`. `needs` names
    capabilities (capabilities.py): where one is missing, the row is "not yet". `blocked` says why it can never be
    read as published. `base` names the checkpoint that supplies missing parts. `sampler` is what is measured with;
    the picture is drawn with the checkpoint's own scheduler. With "lcm" the guidance costs no second call.
    """

    name: str
    repo: str
    revision: str
    licence: str
    bytes: int = field(metadata=bounds(0, 1 << 40))
    bytes_from: str = field(metadata=choices(*_KINDS))
    parts: tuple[str, ...]
    terms: str = ""
    evidence: str = ""
    needs: tuple[str, ...] = ()
    blocked: str = ""
    base: str = ""
    size: int = field(default=512, metadata=bounds(64, 1536))
    steps: int = field(default=25, metadata=bounds(1, 150))
    guidance: float = field(default=7.5, metadata=bounds(0, 35))
    gmac: float = field(default=0.0, metadata=bounds(0, 1e6))
    sampler: str = field(default="euler", metadata=choices("ddim", "euler", "lcm"))

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ConfigError(f"name {self.name[:80]!r} is not of small letters, digits and dashes")
        if self.revision != UNVERIFIED and not _COMMIT.match(self.revision):
            raise ConfigError(f"{self.name}: revision {self.revision[:80]!r} is no commit of 40 hexadecimal digits")
        if self.revision != UNVERIFIED and not self.evidence:
            raise ConfigError(f"{self.name}: a pinned revision says where it was seen (evidence)")
        if self.lora and not self.base:
            raise ConfigError(f"{self.name}: {self.lora} is a LoRA; name the base that it is fused into")

    @property
    def lora(self) -> str:
        """The file of a LoRA repository, "" for models."""
        return next((part for part in self.parts if part.endswith(".safetensors")), "")

    @property
    def pinned(self) -> str | None:
        """The commit, or None where it is not verified."""
        return None if self.revision == UNVERIFIED else self.revision


@dataclass(frozen=True)
class Catalogue:
    """All checkpoints by name, in the order of the file, and what is drawn with each."""

    prompt: str
    seed: int
    checkpoints: Mapping[str, Checkpoint]

    def chosen(self, names: Iterable[str]) -> list[Checkpoint]:
        """The rows of these names, in the order of the file; all where none is given.

        Raises:
            ConfigError: a name that is not in the catalogue, with the nearest one.
        """
        wanted = list(names)
        for name in wanted:
            if name not in self.checkpoints:
                raise ConfigError(unknown("checkpoint", name, self.checkpoints))
        return [row for name, row in self.checkpoints.items() if not wanted or name in wanted]


@dataclass(frozen=True)
class _File:
    schema: int = field(metadata=bounds(SCHEMA, SCHEMA))
    prompt: str
    seed: int = field(metadata=bounds(0, 2**63 - 1))
    checkpoint: tuple[Checkpoint, ...]


def read_catalogue(path: Path = CATALOGUE) -> Catalogue:
    """The catalogue in a TOML file.

    Raises:
        ConfigError: an unknown key, a wrong value, a name that occurs twice, a base that is not there.
    """
    file = load(_File, read_toml(path, MAX_BYTES), path.name)
    rows = {row.name: row for row in file.checkpoint}
    if len(rows) != len(file.checkpoint):
        raise ConfigError(f"{path.name}: a checkpoint name occurs twice")
    for row in rows.values():
        if row.base and row.base not in rows:
            raise ConfigError(f"{path.name}: {row.name}: {unknown('base', row.base, rows)}")
    return Catalogue(file.prompt, file.seed, rows)


def pin(path: Path, commits: Mapping[str, str]) -> list[str]:
    """Write resolved commits over "unverified" in the file; the names that were written.

    The file is edited as text, so that its comments stay. Raises ConfigError for a value that is no commit.
    """
    for name, commit in commits.items():
        if not _COMMIT.match(commit):
            raise ConfigError(f"{name}: {commit[:80]!r} is no commit of 40 hexadecimal digits")
    head, *blocks = re.split(r"(?m)^(?=\[\[checkpoint\]\])", path.read_text(encoding="utf-8"))
    written = []
    for at, block in enumerate(blocks):
        named = re.search(r'(?m)^name *= *"(.*)"', block)
        if named and named[1] in commits and re.search(_REVISION, block):
            said = f'revision = "{commits[named[1]]}"\nevidence = "resolved from the hub by --pin"\n'
            blocks[at] = re.sub(_REVISION, said, re.sub(r"(?m)^evidence *=.*\n", "", block), count=1)
            written.append(named[1])
    write_file(path, "".join([head, *blocks]))
    return written
