"""run in parts: the stages of a bundle, or the halves of guidance, on several devices or in several processes."""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.cli.flags import REQUEST_FIELDS, engine_options, names
from diffship.cli.progress import note
from diffship.core.errors import ConfigError

if TYPE_CHECKING:
    from diffship.core.bundle import Bundle
    from diffship.runtimes.engines.model import BundleModel
    from diffship.runtimes.partition.distributed import Team
    from diffship.runtimes.partition.placement import Placement
    from diffship.runtimes.partition.ranks import Place
    from diffship.runtimes.partition.timetable import Scheme
    from diffship.sampling.loop import Denoiser
    from diffship.sampling.model import Model
    from diffship.sampling.trajectory import Trajectory

WAIT_SECONDS = 600.0
_FLAGS = ("stride", "warm_up", "time_shift", "cfg_parallel", "devices", "wait", "auto", "fidelity")
Make = Callable[["Model"], "Denoiser"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("several devices for one picture (a bundle of export --stages; torchrun)")
    group.add_argument("--stride", metavar="S", type=int, help="steps that one round makes, 1 or 2 (default: 1)")
    group.add_argument(
        "--warm-up", metavar="W", type=int, help="model calls that are exact, the first ones (default: 1)"
    )
    group.add_argument("--time-shift", action="store_true", help="embed the timestep before, after them")
    group.add_argument(
        "--cfg-parallel", action="store_true", help="the halves of guidance apart: twice as many devices, any bundle"
    )
    group.add_argument("--devices", metavar="A,B", type=names, help="one for each, in this process or by rank")
    group.add_argument(
        "--auto", action="store_true", help="measure the --devices, and take the fastest way of sharing the picture"
    )
    group.add_argument(
        "--fidelity", metavar="DB", type=float, help="for --auto: least PSNR to the sequential picture (default: 30)"
    )
    # what --auto settles: the device of each stage
    parser.set_defaults(homes=None)
    group.add_argument(
        "--wait", metavar="SECONDS", type=float, help=f"for another device, at most (default: {WAIT_SECONDS:g})"
    )


def asked(options: argparse.Namespace) -> bool:
    """Whether this run is partitioned: a flag says so, or other processes run beside this one."""
    from diffship.runtimes.partition.ranks import place_of

    return any(is_given(options, name) for name in _FLAGS) or place_of() is not None


def is_given(options: argparse.Namespace, name: str) -> bool:
    """Whether the command line has this flag: 0 and an empty list are values, which are refused rather than passed
    over."""
    value = getattr(options, name)
    return value is not None and value is not False


def check(options: argparse.Namespace) -> None:
    """Raises ConfigError for what does not go together with a partition."""
    from diffship.core.limits import check_range

    others = [
        flag
        for flag, given in (
            ("--large", options.large), ("--models", options.models), ("--cloud", options.cloud),
            ("--memory low", options.memory == "low"), ("--engines", options.engines),
        )
        if given
    ]  # fmt: skip
    if others:
        raise ConfigError(f"{others[0]} does not go with a partitioned run; leave it out, or run with one device")
    if options.devices is not None and not options.devices:
        raise ConfigError("--devices names no device; give for example --devices cuda:0,cuda:1")
    if options.devices and options.device:
        raise ConfigError("--device is for one device, --devices for several: give one of them")
    if options.wait is not None:
        check_range("wait", options.wait, 0.1, 86_400.0)
    if options.auto or options.fidelity is not None:
        from diffship.cli.auto import check_flags

        check_flags(options)


@dataclass(frozen=True)
class Plan:
    """What the flags make of one bundle. `parts` is 2 if the halves of guidance are apart."""

    bundle: Bundle
    placement: Placement
    scheme: Scheme
    parts: int
    wait: float

    @property
    def needed(self) -> int:
        """Devices, or processes."""
        from diffship.runtimes.partition.distributed import ranks_needed

        return ranks_needed(self.placement, self.scheme, self.parts)

    @property
    def stages(self) -> list[str]:
        """The part of each stage."""
        return [piece.name for piece in self.placement.pieces]

    def facts(self, options: argparse.Namespace) -> dict[str, str]:
        """What all processes must have in common."""
        digest = hashlib.sha256(self.bundle.manifest.to_bytes()).hexdigest()[:16]
        scheme = f"stride {self.scheme.stride}, warm-up {self.scheme.warm_up}, shift {self.scheme.time_shift}"
        return {"bundle": digest, "scheme": f"{scheme}, halves {self.parts}"}


def plan_of(options: argparse.Namespace) -> Plan:
    """What the flags ask for of the bundle DIR.

    Raises:
        ConfigError: DIR is no bundle, or its denoiser is one part. BundleError: it is damaged.
    """
    from diffship.runtimes.partition.forecast import placed
    from diffship.runtimes.partition.staged import placement_of, whole_placement
    from diffship.runtimes.partition.timetable import Scheme

    bundle = bundle_of(options)
    stride = 1 if options.stride is None else options.stride
    alone = options.cfg_parallel and stride == 1 and not options.time_shift
    one_part = bundle.manifest.staging is None and (alone or options.homes is not None)
    placement = whole_placement(bundle) if one_part else placement_of(bundle)
    if options.homes is not None:
        placement = placed(placement, options.homes)
    scheme = Scheme(stride, 1 if options.warm_up is None else options.warm_up, options.time_shift)
    return Plan(bundle, placement, scheme, 2 if options.cfg_parallel else 1, options.wait or WAIT_SECONDS)


def bundle_of(options: argparse.Namespace) -> Bundle:
    """The bundle DIR. Raises ConfigError: DIR is none. BundleError: it is damaged."""
    from diffship.core.bundle import Bundle
    from diffship.core.manifest import MANIFEST_NAME

    if options.bundle is None or not (Path(options.bundle) / MANIFEST_NAME).is_file():
        raise ConfigError(
            f"a partitioned run takes a bundle, and {options.bundle} is none. "
            "Run: diffship export SOURCE --to onnx --stages 2 -o DIR"
        )
    return Bundle.open(Path(options.bundle))


@contextmanager
def denoisers(options: argparse.Namespace) -> Iterator[Make]:
    """How the denoiser of the run's model is made; on leaving, threads end and other processes are sent home.

    Raises:
        ConfigError: another number of devices or processes than the stages take. PeerError: a process is lost.
    """
    from diffship.runtimes.partition.ranks import place_of

    plan, place = plan_of(options), place_of()
    with ExitStack() as stack:
        if place is not None:
            led = _led(stack, plan, place, options)
            yield lambda model: _counting(led(model), plan.scheme.warm_up)
            return
        if options.devices and len(options.devices) != plan.needed:
            raise ConfigError(f"these stages take {plan.needed} devices, and --devices names {len(options.devices)}")
        if not options.devices:
            note(f"note: the picture is that of {plan.needed} devices, the time that of one; name them with --devices")
        yield lambda model: _counting(_loaded(stack, plan, model, options), plan.scheme.warm_up)


def _counting(denoiser: Denoiser, warm_up: int) -> Denoiser:
    """The same denoiser, which says once if a warm-up of all steps is not one of all calls."""
    told: list[bool] = []

    def run(batch: Sequence[Trajectory]) -> Sequence[Any]:
        if not told:
            told.append(True)
            first = batch[0]
            if first.steps <= warm_up < first.calls:
                note(
                    f"note: {first.sampler.name} makes {first.calls} model calls of {first.steps} steps, and a warm-up "
                    f"counts calls: --warm-up {warm_up} leaves {first.calls - warm_up} to stages that lag"
                )
        return denoiser(batch)

    return run


def follow(options: argparse.Namespace) -> None:
    """Every process but the first: compute its stages until the first one says that all is over.

    Raises:
        PeerError: a process is lost. RunnerError: a stage of this one fails.
    """
    from diffship.runtimes.engines.model import BundleModel
    from diffship.runtimes.partition.distributed import work
    from diffship.runtimes.partition.ranks import Ranks, place_of

    plan, place = plan_of(options), place_of()
    assert place is not None  # `run` asks before
    _require_ranks(plan, place)
    chosen = _engine(plan.bundle, options, place.rank)
    with Ranks(place, plan.facts(options), plan.wait) as ranks, BundleModel(plan.bundle, options.engine, **chosen) as m:
        work(_team(plan, ranks, m))


def continued(options: argparse.Namespace) -> None:
    """After torchrun has started the processes anew: go on from the trajectory that the first ones saved."""
    from diffship.runtimes.partition.ranks import place_of

    place, kept = place_of(), options.save_trajectory
    if place is None or not place.attempt or kept is None or not kept.is_file():
        return
    note(f"note: start number {place.attempt + 1} goes on from {kept}, with a warm-up of its own")
    options.resume, options.overwrite = kept, True  # what is there was written by the first start
    options.prompts, options.prompts_file, options.image, options.mask = [], None, None, None
    for name in REQUEST_FIELDS:
        setattr(options, name, None)


def _led(stack: ExitStack, plan: Plan, place: Place, options: argparse.Namespace) -> Make:
    from diffship.runtimes.partition.distributed import Distributed
    from diffship.runtimes.partition.ranks import Ranks

    _require_ranks(plan, place)
    ranks = stack.enter_context(Ranks(place, plan.facts(options), plan.wait))
    made: list[Distributed] = []

    def leave(kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            for denoiser in made:
                denoiser.end()

    stack.push(leave)

    def make(model: Any) -> Denoiser:
        made.append(Distributed(_team(plan, ranks, model)))
        return made[-1]

    return make


def _team(plan: Plan, ranks: Any, model: BundleModel) -> Team:
    """The team with the stages of this rank, which are loaded now, and no others."""
    from diffship.runtimes.partition.denoiser import seats
    from diffship.runtimes.partition.distributed import Team

    device = ranks.rank % plan.scheme.devices(plan.placement.devices)
    pieces = [piece for where, piece in seats(plan.placement, plan.scheme) if where == device]
    runners = {piece: model.use(plan.stages[piece]) for piece in pieces}
    parts = [plan.bundle.part(name) for name in plan.stages]
    boundaries = {spec.name: spec for part in parts for spec in part.outputs}
    written = {name for piece in plan.placement.pieces for name in piece.reads}
    inputs = {spec.name: spec for part in parts for spec in part.inputs if spec.name not in written}
    kind = plan.bundle.manifest.family.kind
    return Team(ranks, plan.placement, plan.scheme, tuple(inputs.values()), boundaries, runners, kind, plan.parts)


def _loaded(stack: ExitStack, plan: Plan, model: Any, options: argparse.Namespace) -> Denoiser:
    """As `_here`; what it takes to open the models of other devices is loading, and not drawing."""
    since, own = time.perf_counter(), model.load_seconds
    made = _here(stack, plan, model, options)
    model.load_seconds = own + time.perf_counter() - since
    return made


def _here(stack: ExitStack, plan: Plan, model: Any, options: argparse.Namespace) -> Denoiser:
    """All devices in this process: a thread for each if they are named, else one after the other."""
    from diffship.runtimes.partition.denoiser import Partitioned, seats
    from diffship.runtimes.partition.halves import Halves
    from diffship.runtimes.partition.lanes import OneByOne, ThreadEach

    own = plan.needed // plan.parts
    made = []
    for part in range(plan.parts):
        models = _models(stack, model, plan, options, range(part * own, (part + 1) * own))
        runners = {
            (device, piece): models[device].use(plan.stages[piece])
            for device, piece in seats(plan.placement, plan.scheme)
        }
        lanes = ThreadEach(plan.wait) if options.devices else OneByOne()
        kind = model.family.kind
        made.append(stack.enter_context(Partitioned(plan.placement, plan.scheme, runners, lanes, kind)))
    if plan.parts == 1:
        return made[0]
    outer = ThreadEach(plan.wait * (len(plan.stages) + 1)) if options.devices else OneByOne()
    return stack.enter_context(Halves(made[0], made[1], outer))


def _models(stack: ExitStack, model: Any, plan: Plan, options: argparse.Namespace, devices: Sequence[int]) -> list[Any]:
    """A model for each device; the run's own one for all of them if none is named."""
    from diffship.runtimes.engines.model import BundleModel

    if not options.devices:
        return [model for _ in devices]
    return [
        stack.enter_context(BundleModel(plan.bundle, options.engine, **_engine(plan.bundle, options, device)))
        for device in devices
    ]


def _engine(bundle: Bundle, options: argparse.Namespace, device: int) -> dict[str, Any]:
    return device_options(bundle, options, options.devices[device]) if options.devices else engine_options(options)


def device_options(bundle: Bundle, options: argparse.Namespace, name: str) -> dict[str, Any]:
    """Options of the engine on the device `name`: an engine that counts its devices takes `cuda:1` as two options."""
    from diffship.core.registry import RUNNERS, load
    from diffship.runtimes.engines.engine import choose_engine

    kind, _, number = name.partition(":")
    fields = {
        field.name for field in dataclasses.fields(load(RUNNERS, choose_engine(bundle.manifest.target, options.engine)))
    }
    if number.isdigit() and "device_id" in fields:
        return {**engine_options(options), "device": kind, "device_id": int(number)}
    return {**engine_options(options), "device": name}


def _require_ranks(plan: Plan, place: Place) -> None:
    """Raises ConfigError if other numbers of processes or devices are there than the stages take."""
    from diffship.runtimes.partition.distributed import too_many

    if place.size != plan.needed:
        raise ConfigError(too_many(place.size, plan.needed))
