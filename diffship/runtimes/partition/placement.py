"""Placement: which device holds which stages of a denoiser, and what has to travel between them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from diffship.core.errors import ConfigError
from diffship.core.spec import TensorSpec


class Cut(Protocol):
    """What a placement needs to know of a stage; `models.walks.stages.Stage` has it, and so has one on any engine."""

    @property
    def name(self) -> str: ...

    @property
    def inputs(self) -> tuple[TensorSpec, ...]: ...

    @property
    def outputs(self) -> tuple[TensorSpec, ...]: ...


@dataclass(frozen=True)
class Piece:
    """A stage on a device, with the tensors that it takes from earlier stages and leaves to later ones. Inputs of the
    whole are not among them, because every device has those."""

    name: str
    home: int
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True)
class Link:
    """Tensors that go from one device to another in every step."""

    source: int
    target: int
    tensors: tuple[str, ...]
    bytes: int


@dataclass(frozen=True)
class Placement:
    """Pieces in the order in which one device would run them; the last one makes the prediction, on the last device."""

    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        faults = list(_faults(self.pieces))
        if faults:
            raise ConfigError(f"these stages cannot be placed: {faults[0]}")

    @property
    def devices(self) -> int:
        return self.pieces[-1].home + 1

    @cached_property
    def writer(self) -> Mapping[str, int]:
        """Tensor -> index of the piece that writes it."""
        return {name: i for i, piece in enumerate(self.pieces) for name in piece.writes}

    def links(self, sizes: Mapping[str, int]) -> list[Link]:
        """What crosses between devices, each tensor once for every device that reads it; `sizes` holds their bytes."""
        found: dict[tuple[int, int], dict[str, None]] = {}
        for piece in self.pieces:
            for name in piece.reads:
                source = self.pieces[self.writer[name]].home
                if source != piece.home:
                    found.setdefault((source, piece.home), {})[name] = None
        return [Link(*ends, tuple(names), sum(sizes[name] for name in names)) for ends, names in sorted(found.items())]

    def per_device(self, figures: Sequence[float]) -> list[float]:
        """Sums of one figure for each piece."""
        return [
            sum(figure for piece, figure in zip(self.pieces, figures, strict=True) if piece.home == device)
            for device in range(self.devices)
        ]


def place(stages: Sequence[Cut], homes: Sequence[int]) -> Placement:
    """Stages in their order, `homes[k]` the device of stage k."""
    made = {spec.name for stage in stages for spec in stage.outputs}
    read = {spec.name for stage in stages for spec in stage.inputs}
    return Placement(
        tuple(
            Piece(stage.name, home, _names(stage.inputs, made), _names(stage.outputs, read))
            for stage, home in zip(stages, homes, strict=True)
        )
    )


def boundary_bytes(stages: Iterable[Cut], sizes: Mapping[str, int], width: int = 2) -> dict[str, int]:
    """Bytes of every output of the stages at `sizes`, `width` of them for a value (2: float16)."""
    return {spec.name: spec.nbytes(sizes, width) for stage in stages for spec in stage.outputs}


def _names(specs: Iterable[TensorSpec], among: set[str]) -> tuple[str, ...]:
    return tuple(spec.name for spec in specs if spec.name in among)


def _faults(pieces: Sequence[Piece]) -> Iterable[str]:
    if not pieces:
        yield "there is none"
        return
    homes = {piece.home for piece in pieces}
    if homes != set(range(pieces[-1].home + 1)):
        yield f"they stand on devices {sorted(homes)}; legal: 0, 1, ... with the last stage on the highest"
    seen: set[str] = set()
    for piece in pieces:
        missing = [name for name in piece.reads if name not in seen]
        if missing:
            yield f"{piece.name} reads {missing[0]}, which no stage before it writes"
        twice = [name for name in piece.writes if name in seen]
        if twice:
            yield f"{piece.name} writes {twice[0]} once more"
        seen.update(piece.writes)
