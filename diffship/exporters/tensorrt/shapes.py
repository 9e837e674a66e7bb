"""Optimisation profiles: the least, the best and the largest shape of every input, from sizes in pixels and flags."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from diffship.core.errors import ConfigError, RunnerError
from diffship.core.family import Family
from diffship.core.limits import LIMITS
from diffship.core.spec import TensorSpec
from diffship.core.strict import unknown
from diffship.models.parts.component import Component
from diffship.targets.tensorrt.plan import KINDS

Sizes = dict[str, int]
Shape = tuple[int, ...]
_ROWS = (1, 2, 8)  # of the U-Net: one image with guidance is two, four are eight
_IMAGES = (1, 1, 4)


@dataclass(frozen=True)
class Range:
    """Shapes of one input: an engine takes anything from `min` to `max`, and is fastest at `opt`."""

    min: Shape
    opt: Shape
    max: Shape

    def to_json(self) -> dict[str, list[int]]:
        return {kind: list(getattr(self, kind)) for kind in KINDS}


def parse_shapes(flag: str, entries: Sequence[str]) -> dict[str, Shape]:
    """`("sample:2x4x64x64", ...)` as {name: shape}; a name may begin with its part: `unet.sample:2x4x64x64`.

    Raises:
        ConfigError: anything else, or a name twice.
    """
    found: dict[str, Shape] = {}
    for entry in entries:
        name, _, text = entry.rpartition(":")
        try:
            shape = tuple(int(side) for side in text.lower().split("x"))
        except ValueError:
            shape = ()
        if not name or not shape or min(shape) < 1:
            raise ConfigError(f"--{flag}-shapes {entry!r} is not NAME:AxBx..., such as sample:2x4x64x64")
        if name in found:
            raise ConfigError(f"--{flag}-shapes names {name} twice")
        found[name] = shape
    return found


def profile(component: Component, family: Family, asked: Mapping[str, Mapping[str, Shape]]) -> dict[str, Range]:
    """The range of every input of a part. `asked` has shapes by kind (`min`, `opt`, `max`) and input name.

    A shape that is asked for sets its axes in all inputs of the part. What is not asked for comes from the family: half
    to one and a half times its size, and four images with guidance.

    Raises:
        ConfigError: a shape that does not fit its input, or ranges in which min, opt and max do not rise.
    """
    sizes = axis_ranges(component, family, asked)
    return {spec.name: Range(*(spec.resolve(sizes[kind]) for kind in KINDS)) for spec in component.inputs}


def axis_ranges(component: Component, family: Family, asked: Mapping[str, Mapping[str, Shape]]) -> dict[str, Sizes]:
    """The same by kind and axis.

    Raises:
        ConfigError: as `profile`.
    """
    sizes = _defaults(component, family)
    for kind, made in sizes.items():
        made |= _asked(component, kind, asked.get(kind, {}))
    for axis in sizes["min"]:
        low, best, high = (sizes[kind][axis] for kind in KINDS)
        if not low <= best <= high:
            raise ConfigError(f"{component.name}: {axis} is min {low}, opt {best}, max {high}; they must rise")
    return sizes


def check_names(components: Iterable[Component], asked: Mapping[str, Mapping[str, Shape]]) -> None:
    """Raises ConfigError for a shape whose input no part has."""
    listed = list(components)
    legal = {name for part in listed for spec in part.inputs for name in (spec.name, f"{part.name}.{spec.name}")}
    for kind, shapes in asked.items():
        for name in shapes:
            if name not in legal:
                raise ConfigError(f"--{kind}-shapes: {unknown('input', name, sorted(legal))}")


def _defaults(component: Component, family: Family) -> dict[str, Sizes]:
    rows = _ROWS if component.name in (family.kind.denoiser, *family.kind.text_parts) else _IMAGES
    pixels = dict(zip(("width", "height"), (_pixels(family, side) for side in family.default_sides), strict=True))
    found: dict[str, Sizes] = {}
    for place, kind in enumerate(KINDS):
        sizes = dict(component.smallest_sizes())  # the length of a text is always the same
        picture = {f"sample_{side}": pixels[side][place] for side in pixels}
        decoded = {f"latent_{side}": pixels[side][place] // family.kind.decoder_factor(family) for side in pixels}
        drawn = family.kind.axis_sizes(family, pixels["width"][place], pixels["height"][place])
        known = {**picture, **decoded, **drawn, "batch_size": rows[place]}
        sizes.update((axis, known[axis]) for axis in sizes if axis in known)
        found[kind] = sizes
    return found


def _pixels(family: Family, side: int) -> tuple[int, int, int]:
    """Half of the family's `side` in pixels, the side, and one and a half times it, as far as legal."""
    step, (low, high) = family.size_step, LIMITS.size_px
    least = max(-(-low // step) * step, side // 2 // step * step)
    most = min(high // step * step, side * 3 // 2 // step * step)
    return least, side, most


def _asked(component: Component, kind: str, shapes: Mapping[str, Shape]) -> Sizes:
    sizes: Sizes = {}
    for spec in component.inputs:
        for name in (spec.name, f"{component.name}.{spec.name}"):
            if name in shapes and (name != spec.name or len(shapes[name]) == len(spec.shape)):
                sizes = _bound(component, kind, spec, shapes[name], sizes)
    return sizes


def _bound(component: Component, kind: str, spec: TensorSpec, shape: Shape, known: Sizes) -> Sizes:
    try:
        return spec.bind(shape, known)
    except RunnerError as fault:
        raise ConfigError(f"--{kind}-shapes: {component.name}: {fault}") from None
