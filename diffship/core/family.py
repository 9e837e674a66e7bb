"""Family: the facts of a model kind that samplers, runtimes and exporters need and no weight file states."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from diffship.core.errors import ConfigError
from diffship.core.kind import Kind
from diffship.core.limits import LIMITS
from diffship.core.registry import kind
from diffship.core.strict import bounded, bounds, choices, load, plain

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
# fields that the first manifests did not have
_LATER = ("default_height", "strength_default", "guided", "latents_mean", "latents_std")


@dataclass(frozen=True)
@bounded
class Family:
    """Shapes and conventions of one model kind; sizes in pixels, scaling as in diffusers' VAE config.

    `name` is that of its kind in the registry. `size_step` is vae_factor * 2**(levels - 1) for a U-Net, vae_factor *
    patch for a transformer. `unet_channels` is how many channels the denoiser reads, whatever it is called.
    `time_ids` is 6 for SDXL, 5 for its refiner; `time_cond_dim` is the width of LCM's guidance embedding.
    Pictures are `default_size` wide and `default_height` high (None: as high as wide) unless a request says otherwise.
    `strength_default` is how much of the noise an inpainting model begins with.
    `guided` is False for a model that is distilled to draw without guidance, whatever is asked (FLUX.2-klein).
    `latents_mean` and `latents_std` hold a number per channel of the latents: latents * std + mean is what the VAE
    made, where one `scaling_factor` does not say it (the batch norm of FLUX.2's VAE).
    """

    name: str
    latent_channels: int = field(default=4, metadata=bounds(1, 256))
    vae_factor: int = field(default=8, metadata=bounds(1, 64))
    size_step: int = field(default=64, metadata=bounds(1, 512))
    default_size: int = field(default=512, metadata=bounds(8, 4096))
    scaling_factor: float = field(default=0.18215, metadata=bounds(1e-6, 1e6))
    shift_factor: float = field(default=0.0, metadata=bounds(-1e6, 1e6))
    prediction_type: str = field(default="epsilon", metadata=choices(*PREDICTIONS))
    text_width: int = field(default=768, metadata=bounds(1, 65536))
    pooled_width: int | None = field(default=None, metadata=bounds(1, 65536))
    time_ids: int | None = field(default=None, metadata=bounds(1, 64))
    time_cond_dim: int | None = field(default=None, metadata=bounds(4, 65536))
    unet_channels: int = field(default=4, metadata=bounds(1, 256))
    force_zeros_for_empty_prompt: bool = False
    guidance_default: float = field(default=7.5, metadata=bounds(0.0, 35.0))
    steps_default: int = field(default=25, metadata=bounds(1, 150))
    default_height: int | None = field(default=None, metadata=bounds(8, 4096))
    strength_default: float = field(default=1.0, metadata=bounds(*LIMITS.strength))
    guided: bool = True
    latents_mean: tuple[float, ...] | None = field(default=None, repr=False, metadata=bounds(-1e6, 1e6))
    latents_std: tuple[float, ...] | None = field(default=None, repr=False, metadata=bounds(1e-6, 1e6))

    def __post_init__(self) -> None:
        for name, numbers in (("latents_mean", self.latents_mean), ("latents_std", self.latents_std)):
            if numbers is not None and len(numbers) != self.latent_channels:
                raise ConfigError(
                    f"{name} has {len(numbers)} numbers; legal is {self.latent_channels}, one per channel"
                )

    @property
    def kind(self) -> Kind:
        """What a model of this family is made of and how it draws; ConfigError if this version knows no such kind."""
        return kind(self.name)

    @property
    def takes_guidance(self) -> bool:
        """Whether the denoiser takes the guidance scale as an input; there is no second row of a batch then."""
        return self.kind.takes_guidance(self)

    @property
    def default_sides(self) -> tuple[int, int]:
        """(width, height) in pixels of a picture whose request names no size."""
        return self.default_size, self.default_height or self.default_size

    @property
    def fills_masks(self) -> bool:
        """Whether the denoiser reads a mask and masked latents beside the latents, as inpainting models do."""
        return self.unet_channels == 2 * self.latent_channels + 1

    def check_size(self, width: int, height: int) -> None:
        """Raises ConfigError, naming the nearest two legal sizes, unless the model can draw width x height pixels."""
        for name, size in (("width", width), ("height", height)):
            self._check_side(name, size)
        if width * height > LIMITS.pixels:
            raise ConfigError(f"{width}x{height} is {width * height} pixels; at most {LIMITS.pixels} are allowed")

    def latent_shape(self, width: int, height: int) -> tuple[int, ...]:
        """Shape of the latents of one picture of `width` x `height` pixels: (channels, height, width) as a rule.

        Raises:
            ConfigError: the model cannot draw this size.
        """
        self.check_size(width, height)
        return self.kind.latent_shape(self, width, height)

    def to_json(self) -> dict[str, object]:
        """All fields, but for later ones that have their default: older readers refuse keys that they do not know."""
        later = {name: _DEFAULTS[name] for name in _LATER}
        return {key: value for key, value in plain(self).items() if key not in later or value != later[key]}

    @classmethod
    def from_json(cls, data: Mapping[str, object]) -> Family:
        """The inverse of `to_json`; raises ConfigError for an unknown key, a wrong type or a value out of range."""
        return load(cls, data, "family")

    def _check_side(self, name: str, size: int) -> None:
        low, high = LIMITS.size_px
        step = self.size_step
        whole = isinstance(size, int) and not isinstance(size, bool)
        if whole and low <= size <= high and size % step == 0:
            return
        first, last = -(-low // step) * step, high // step * step
        below = min(max(size // step * step, first), last - step) if whole else self.default_size
        raise ConfigError(
            f"{name} is {str(size)[:40]}; {self.name} draws multiples of {step} from {first} to {last}: "
            f"the nearest are {below} and {below + step}"
        )


_DEFAULTS = {one.name: one.default for one in fields(Family)}
