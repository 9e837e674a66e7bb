"""inspect --placement: where a U-Net is cut for several devices, what each holds, what travels, and what that gains."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.cli.output import Result, size_text, table
from diffship.cli.places import add_overwrite, refuse_taken, require_file_place
from diffship.core.errors import ConfigError

if TYPE_CHECKING:
    from diffship.models.parts.component import Component
    from diffship.models.walks.cost import Cost
    from diffship.models.walks.cuts import Cuts
    from diffship.runtimes.partition.prospect import Prospect
    from diffship.runtimes.partition.timetable import Scheme, Timetable

CUTS = ("published", "speed", "memory")
_DEFAULTS: dict[str, Any] = {"stages": 2, "stride": 1, "warm_up": 1, "time_shift": False, "steps": 10}
NOTE = "speed-ups are of counted multiply-accumulates: nothing was measured, and what is sent takes no time in them"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("partitioned execution (sources, and bundles of stages)")
    group.add_argument("--placement", action="store_true", help="show where the U-Net is cut for several devices")
    group.add_argument("--stages", metavar="N", type=int, help="stages that lag behind each other (default: 2)")
    group.add_argument(
        "--cut",
        choices=CUTS,
        help="AsyncDiff's, or the one that spreads time or bytes (default: published where there is one, else speed)",
    )
    group.add_argument("--stride", metavar="S", type=int, help="steps that one round makes, 1 or 2 (default: 1)")
    group.add_argument("--warm-up", metavar="W", type=int, help="model calls that are exact (default: 1)")
    group.add_argument("--time-shift", action="store_const", const=True, help="embed the timestep before, after them")
    group.add_argument("--steps", metavar="T", type=int, help="model calls of the timetable (default: 10)")
    group.add_argument("--chart", metavar="FILE", type=Path, help="write the timetable as an SVG drawing, too")
    add_overwrite(group, "charts")


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for flags that only --placement heeds."""
    names = [name for name in (*_DEFAULTS, "cut", "chart", "overwrite") if getattr(options, name) not in (None, False)]
    if names and not options.placement:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in names)
        raise ConfigError(f"{flags} without --placement; add it to see where the U-Net is cut")
    if options.chart:
        require_file_place(options.chart, "--chart")
        refuse_taken([("--chart", options.chart)], options.overwrite)


def inspect_placement(pipeline: Any, options: argparse.Namespace) -> Result:
    """Counted on the meta device at guidance's two rows; no weight is read."""
    from diffship.models.walks.cuts import KINDS, find_cuts, table_of, usual_kind

    chosen, scheme = _chosen(options)
    if pipeline.family.kind.denoiser not in pipeline.components:
        raise ConfigError(f"{options.what} has no {pipeline.family.kind.denoiser}; one is needed to be cut")
    subject = _Subject.of(pipeline, options.size)
    config, stages = subject.unet.config, chosen["stages"]
    kind = options.cut or usual_kind(config, stages)
    others = [
        name for name in KINDS if name != "published" or (table_of(config) and usual_kind(config, stages) == name)
    ]
    cuts = {name: find_cuts(subject.unet, stages, name, subject.sizes) for name in dict.fromkeys((kind, *others))}
    plans = {name: subject.prospect(each, scheme, chosen["steps"]) for name, each in cuts.items()}
    document = {"kind": "placement", "name": options.what, "size": list(subject.size), "cut": kind, **chosen}
    document |= _figures(cuts[kind].at, cuts[kind].homes, plans[kind])
    return _result(document | {"compared": _compared(plans), "note": NOTE}, plans[kind].table, options)


def inspect_staged(options: argparse.Namespace) -> Result:
    """The same of a bundle of stages, from its manifest alone: what was cut, counted and exported.

    Raises:
        ConfigError: its denoiser is one part, or another cut is asked for.
    """
    from diffship.core.bundle import Bundle
    from diffship.runtimes.partition.prospect import Prospect
    from diffship.runtimes.partition.staged import boundary_sizes, placement_of
    from diffship.runtimes.partition.timetable import timetable

    bundle = Bundle.open(Path(options.what))
    manifest, placed = bundle.manifest, placement_of(bundle)
    staging = manifest.staging
    assert staging is not None  # placement_of refuses others
    chosen, scheme = _chosen(options)
    if options.cut or options.stages not in (None, staging.devices):
        raise ConfigError(
            f"{options.what} is cut already, for {staging.devices} devices; --stages and --cut are for sources"
        )
    files = [sum(manifest.files[file].size for file in manifest.part(stage).files) for stage in staging.stages]
    held = placed.per_device(files)
    macs = tuple(float(count) for count in staging.macs or [1] * len(files))
    plan = Prospect(
        timetable(placed, chosen["steps"], scheme), macs, tuple(map(int, held)), sum(files), boundary_sizes(bundle)
    )
    document = {"kind": "placement", "name": options.what, "size": list(manifest.family.default_sides)}
    document |= {"cut": staging.cut, **chosen, "stages": staging.devices}
    document |= _figures(staging.after, staging.homes, plan)
    return _result(document | {"compared": _compared({staging.cut: plan}), "note": NOTE}, plan.table, options)


def _chosen(options: argparse.Namespace) -> tuple[dict[str, Any], Scheme]:
    """What the flags say or leave to be chosen, and the scheme in it."""
    from diffship.core.limits import LIMITS, check_range
    from diffship.runtimes.partition.timetable import Scheme

    given = {name: getattr(options, name) for name in _DEFAULTS}
    chosen = {name: _DEFAULTS[name] if value is None else value for name, value in given.items()}
    check_range("steps", chosen["steps"], *LIMITS.steps)
    return chosen, Scheme(chosen["stride"], chosen["warm_up"], chosen["time_shift"])


def _result(document: dict[str, Any], chart: Timetable, options: argparse.Namespace) -> Result:
    """The document and its text; the timetable is drawn into the file of --chart too."""
    from diffship.runtimes.partition import gantt

    if options.chart:
        from diffship.core.atomic import write_file

        options.chart.parent.mkdir(parents=True, exist_ok=True)
        write_file(options.chart, gantt.svg(chart))
    return Result(document, _text(document, f"{gantt.title(chart)}\n\n{gantt.text(chart)}"))


@dataclass(frozen=True)
class _Subject:
    """A U-Net and the size at which it is counted."""

    unet: Component
    size: tuple[int, int]
    sizes: Mapping[str, int]
    costs: Mapping[str, Cost]

    @classmethod
    def of(cls, pipeline: Any, size: tuple[int, int] | None) -> _Subject:
        from diffship.models.walks.cost import layer_costs

        unet, size = pipeline.denoiser, size or pipeline.family.default_sides
        axes = pipeline.family.kind.axis_sizes(pipeline.family, *size)
        sizes = {**unet.smallest_sizes(), "batch_size": 2, **axes}
        return cls(unet, size, sizes, layer_costs(unet, sizes))

    def prospect(self, cuts: Cuts, scheme: Scheme, steps: int) -> Prospect:
        from diffship.models.walks.cuts import ON_THE_WIRE, held_bytes, partition
        from diffship.runtimes.partition.placement import boundary_bytes, place
        from diffship.runtimes.partition.prospect import Prospect
        from diffship.runtimes.partition.timetable import timetable

        stages = partition(self.unet, cuts)
        return Prospect(
            timetable(place(stages, cuts.homes), steps, scheme),
            tuple(float(sum(self.costs[layer].macs for layer in stage.layers)) for stage in stages),
            tuple(held_bytes(stages, cuts.homes)),
            self.unet.weights.nbytes,
            boundary_bytes(stages, self.sizes, ON_THE_WIRE),
        )


def _figures(after: Sequence[str], homes: Sequence[int], plan: Prospect) -> dict[str, Any]:
    return {
        "cut_after": list(after),
        "homes": list(homes),
        "devices": plan.devices(),
        "links": [
            {"from": link.source, "to": link.target, "tensors": list(link.tensors), "bytes": link.bytes}
            for link in plan.links
        ],
        "bytes_per_round": plan.wire_bytes,
        "speed_up": {"after_warm_up": plan.steady, "of_all_steps": plan.overall},
    }


def _compared(plans: Mapping[str, Prospect]) -> list[dict[str, Any]]:
    """The frontier of memory and speed: one row for each way of cutting."""
    return [
        {
            "cut": name,
            "largest_share": plan.largest_share,
            "bytes_per_round": plan.wire_bytes,
            "after_warm_up": plan.steady,
            "of_all_steps": plan.overall,
        }
        for name, plan in plans.items()
    ]


def _text(document: Mapping[str, Any], chart: str) -> str:
    width, height = document["size"]
    after = ", ".join(document["cut_after"]) or "nothing"
    devices = [
        [row["device"], ", ".join(row["stages"]), size_text(row["bytes"]), f"{row['share']:.1%}", f"{row['work']:.1%}"]
        for row in document["devices"]
    ]
    links = [
        [f"{link['from']} > {link['to']}", len(link["tensors"]), size_text(link["bytes"])] for link in document["links"]
    ]
    compared = [
        [
            *(row["cut"], f"{row['largest_share']:.1%}", size_text(row["bytes_per_round"])),
            *(f"{row['after_warm_up']:.2f}", f"{row['of_all_steps']:.2f}"),
        ]
        for row in document["compared"]
    ]
    return "\n\n".join(
        [
            f"unet of {document['name']} at {width}x{height} with guidance, cut ({document['cut']}) after {after}",
            table(("device", "stages", "weights", "of all weights", "of all work"), devices),
            table(("sent in a round, float16", "tensors", "bytes"), links) if links else "nothing is sent",
            table(("cut", "largest share", "bytes a round", "speed-up after warm-up", "of all steps"), compared),
            chart,
            document["note"],
        ]
    )
