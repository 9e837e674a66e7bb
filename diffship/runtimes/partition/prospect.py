"""Prospect: what each device of a timetable holds and does, what travels, and what that gains. Nothing is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from diffship.runtimes.partition.placement import Link
from diffship.runtimes.partition.timetable import Timetable


@dataclass(frozen=True)
class Prospect:
    """`costs` are those of the pieces (seconds, or multiply-accumulates), `held` the bytes of weights on each device,
    `whole` those of the part that was cut, `sizes` the bytes of every boundary tensor."""

    table: Timetable
    costs: tuple[float, ...]
    held: tuple[int, ...]
    whole: int
    sizes: Mapping[str, int]

    @property
    def links(self) -> list[Link]:
        """What travels in every round after the warm-up, to the device that stride 2 adds as well."""
        links = self.table.placement.links(self.sizes)
        last = self.table.placement.devices - 1
        extra = range(last + 1, self._devices)
        return [*links, *(replace(link, target=device) for device in extra for link in links if link.target == last)]

    @property
    def wire_bytes(self) -> int:
        """Bytes of one round."""
        return sum(link.bytes for link in self.links)

    @property
    def steady(self) -> float:
        """Speed-up of the steps after the warm-up: the whole over the slowest device."""
        return self.table.scheme.stride * sum(self.costs) / max(self.table.placement.per_device(self.costs))

    @property
    def overall(self) -> float:
        """Speed-up of the whole run, warm-up included."""
        return self.table.speed_up(self.costs)

    @property
    def largest_share(self) -> float:
        """The share of the whole's weights on the device that holds most of them."""
        return max(self.held) / self.whole

    def devices(self) -> list[dict[str, Any]]:
        """For each device: its stages, bytes of weights, and shares of the whole's weights and work."""
        last = self.table.placement.devices - 1
        work = self.table.placement.per_device(self.costs)
        rows = []
        for device in range(self._devices):
            home = min(device, last)
            stages = [piece.name for piece in self.table.placement.pieces if piece.home == home]
            share, load = self.held[home] / self.whole, work[home] / sum(self.costs)
            rows.append({"device": device, "stages": stages, "bytes": self.held[home], "share": share, "work": load})
        return rows

    @property
    def _devices(self) -> int:
        return self.table.scheme.devices(self.table.placement.devices)
