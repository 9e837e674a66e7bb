"""A bundle of stages as a placement: which device holds which part, and what travels between them."""

from __future__ import annotations

from diffship.core.bundle import Bundle
from diffship.core.errors import BundleError, ConfigError
from diffship.core.manifest import Part
from diffship.core.staging import Staging
from diffship.runtimes.partition.placement import Piece, Placement, boundary_bytes, place

_ON_THE_WIRE = 2  # bytes of a value: float16, as all published figures count


def staging_of(bundle: Bundle) -> Staging:
    """How the denoiser of a bundle is cut. Raises ConfigError if it is one part."""
    staging = bundle.manifest.staging
    if staging is None:
        raise ConfigError(
            f"{bundle.path} holds its {bundle.manifest.family.kind.denoiser} as one part. "
            "Run: diffship export SOURCE --to onnx --stages 2 -o DIR"
        )
    return staging


def placement_of(bundle: Bundle) -> Placement:
    """The stages of a bundle on their devices.

    Raises:
        ConfigError: the denoiser is one part. BundleError: its stages cannot be placed.
    """
    staging = staging_of(bundle)
    try:
        return place(stages_of(bundle), staging.homes)
    except ConfigError as fault:
        raise BundleError(f"{bundle.path}: {fault}") from None


def whole_placement(bundle: Bundle) -> Placement:
    """The denoiser of a bundle as the only stage, on one device."""
    return Placement((Piece(bundle.manifest.family.kind.denoiser, 0, (), ()),))


def stages_of(bundle: Bundle) -> list[Part]:
    """The parts that are stages, in order."""
    return [bundle.part(name) for name in staging_of(bundle).stages]


def boundary_sizes(bundle: Bundle) -> dict[str, int]:
    """Bytes of every boundary tensor in float16, at the model's own size with guidance's two rows."""
    family = bundle.manifest.family
    sizes = {"batch_size": 2, "sequence_length": 77, **family.kind.axis_sizes(family, *family.default_sides)}
    return boundary_bytes(stages_of(bundle), sizes, _ON_THE_WIRE)
