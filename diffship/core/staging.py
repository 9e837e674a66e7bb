"""Staging: how a bundle holds its denoiser as several parts, one for each stage, for partitioned execution."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from diffship.core.brief import brief
from diffship.core.errors import BundleError
from diffship.core.spec import TensorSpec
from diffship.core.strict import bounded, bounds

MOST = 64  # stages of one bundle
Ports: TypeAlias = tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]


_CLIENTS = (
    "Other clients (optimum, diffusers) look for {part} and cannot load it; diffship runs, verifies and serves it"
)


@brief
@dataclass(frozen=True)
@bounded
class Staging:
    """`stages` are the parts that stand for the part `part`, in the order in which one device would run them.

    Their inputs are inputs of the whole, or outputs of stages before them under the same names. homes: the device that
    holds each stage; the last one stands on the device with the highest number. cut: how the places were chosen
    (`models.walks.cuts.KINDS`); after: the block after which each cut falls. macs: multiply-accumulates of each stage
    in a call with guidance at the model's own size.
    """

    part: str
    stages: tuple[str, ...]
    homes: tuple[int, ...] = field(metadata=bounds(0, MOST - 1))
    cut: str
    after: tuple[str, ...] = ()
    macs: tuple[int, ...] = field(default=(), metadata=bounds(0, 2**63))

    def __post_init__(self) -> None:
        if not 1 <= len(self.stages) <= MOST or len(set(self.stages)) != len(self.stages):
            raise BundleError(f"{self.part} has {len(self.stages)} stages; legal are 1 to {MOST}, of different names")
        if len(self.homes) != len(self.stages) or sorted(set(self.homes)) != list(range(self.homes[-1] + 1)):
            raise BundleError(f"{self.part}: {len(self.stages)} stages cannot stand on devices {list(self.homes)}")
        if self.macs and len(self.macs) != len(self.stages):
            raise BundleError(f"{self.part}: {len(self.macs)} costs are given for {len(self.stages)} stages")

    @property
    def devices(self) -> int:
        """How many devices hold a stage."""
        return self.homes[-1] + 1

    def require_fit(self, parts: Mapping[str, Ports]) -> None:
        """Raises BundleError unless `parts`, (inputs, outputs) by name, have the stages, and each finds its inputs."""
        if self.part in parts:
            raise BundleError(f"{self.part} is cut into stages, and is a part of the bundle too")
        missing = [name for name in self.stages if name not in parts]
        if missing:
            raise BundleError(f"{self.part} is cut into stages, and the bundle has no part {missing[0][:80]!a}")
        made: dict[str, TensorSpec] = {}
        for name in self.stages:
            inputs, outputs = parts[name]
            for spec in inputs:
                if made.get(spec.name, spec).shape != spec.shape:
                    raise BundleError(f"{name} takes {spec.text()}, and a stage before it writes another shape")
            twice = [spec.name for spec in outputs if spec.name in made]
            if twice:
                raise BundleError(f"{name} writes {twice[0][:80]!a}, which a stage before it writes")
            made |= {spec.name: spec for spec in outputs}

    def inputs(self, parts: Mapping[str, Ports]) -> tuple[TensorSpec, ...]:
        """The inputs of the whole: what no stage writes, in the order in which stages take them."""
        made = {spec.name for name in self.stages for spec in parts[name][1]}
        taken = [spec for name in self.stages for spec in parts[name][0] if spec.name not in made]
        return tuple({spec.name: spec for spec in taken}.values())

    def outputs(self, parts: Mapping[str, Ports]) -> tuple[TensorSpec, ...]:
        """The outputs of the whole: what no stage takes."""
        taken = {spec.name for name in self.stages for spec in parts[name][0]}
        return tuple(spec for name in self.stages for spec in parts[name][1] if spec.name not in taken)


def clients_text(staging: Staging) -> str:
    """What a bundle of stages says of itself: which parts it has, and who can load it."""
    names = ", ".join(staging.stages)
    return f"{staging.part} is cut into {len(staging.stages)} stages ({names}) for {staging.devices} devices. " + (
        _CLIENTS.format(part=staging.part)
    )
