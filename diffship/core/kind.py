"""Kind: what a kind of model is made of and how it draws. One class per kind in `diffship/kinds`, named in `registry`.

Everything outside that room asks a Kind (`family.kind`) instead of comparing names. The first half of the methods
serves drawing and needs numpy alone; the second half serves reading and building with torch, which it imports inside.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from diffship.core.errors import UnsupportedError
from diffship.core.lazy import lazy
from diffship.core.limits import LIMITS
from diffship.core.reading import PLAIN, Reading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from diffship.core.family import Family
    from diffship.core.spec import TensorSpec
    from diffship.models.parts.component import Component
    from diffship.models.pipeline import Material, Module
    from diffship.models.sources.ldm.checkpoint import Checkpoint
    from diffship.sampling.model import Model
    from diffship.sampling.sampler import Sampler
    from diffship.sampling.tokenizer import Tokenizer
else:
    np = lazy("numpy")

TEXT, DENOISER, DECODER, ENCODER = "text", "denoiser", "decoder", "encoder"  # roles, which no model calls its parts
CONTROLNET = "controlnet_"  # and the name that its owner gave it: what such a part is called
CONTROL_IMAGE = "controlnet_cond"  # its input that takes the picture, (3, height, width) in [0, 1]
RESIDUAL = (
    "additional_residual_"  # what it gives and the denoiser takes, and a number (apple/ml-stable-diffusion's names)
)
Shape = tuple[int | None, ...]  # None: an axis of any size


def control_names(parts: Iterable[str]) -> list[str]:
    """The names that owners gave the ControlNets among `parts`."""
    return [part.removeprefix(CONTROLNET) for part in parts if part.startswith(CONTROLNET)]


@dataclass(frozen=True)
class Slot:
    """One entry of model_index.json that a kind reads: a folder with config.json and weights.

    classes: legal class names, the usual one first. aliases: names that training scripts save the first class under.
    library: the package that has the classes. parts: canonical names of the components that are made of it, in the
    order in which they run; by default one, called as the folder. tokenizer: the folder of the tokenizer of a text
    encoder. shared: whether models that draw one picture together should have the same weights here.
    """

    folder: str
    classes: tuple[str, ...]
    library: str = "diffusers"
    parts: tuple[str, ...] = ()
    tokenizer: str | None = None
    aliases: tuple[str, ...] = ()
    shared: bool = True

    @property
    def components(self) -> tuple[str, ...]:
        """Canonical names of its components."""
        return self.parts or (self.folder,)


class Kind(ABC):
    """A kind of model: its parts, its latents, its conditioning, and how a diffusers folder becomes one.

    name: of the family in manifests, and in the registry. slots: in the order in which the parts run. denoiser,
    decoder, encoder: canonical part names. sample_input, time_input, output: names of the denoiser's latents, timesteps
    and prediction. controlled: canonical name of the denoiser as the part that also takes the residuals of ControlNets;
    None: there are none for this kind. condition_names: the denoiser's inputs that come of the prompt;
    exact_conditions: those that 16 bits do not hold. patch: latent values a side of one token, by which flow matching
    shifts with the size. begins_with_images: whether a picture can begin with an image. image_strength, mask_strength:
    share of the noise that stock pipelines begin with if they are given an image, and a mask too. classes: the
    diffusers pipelines whose pictures are drawn. foreign: networks of other kinds of models; a folder that has one is
    not read as this kind without it. file_texts: how the names of each text encoder's tensors begin in checkpoints of
    one file, by its folder. vae_facts: keys of the config of its published VAE that no tensor tells.
    """

    name: ClassVar[str]
    slots: ClassVar[tuple[Slot, ...]]
    denoiser: ClassVar[str]
    decoder: ClassVar[str]
    encoder: ClassVar[str]
    sample_input: ClassVar[str] = "sample"
    time_input: ClassVar[str] = "timestep"
    output: ClassVar[str] = "out_sample"
    controlled: ClassVar[str | None] = None
    condition_names: ClassVar[tuple[str, ...]] = ("encoder_hidden_states",)
    exact_conditions: ClassVar[tuple[str, ...]] = ()
    patch: ClassVar[int] = 2
    begins_with_images: ClassVar[bool] = True
    image_strength: ClassVar[float] = 0.8
    mask_strength: ClassVar[float] = 1.0
    classes: ClassVar[Mapping[str, Any]] = {}
    foreign: ClassVar[tuple[str, ...]] = ()
    file_texts: ClassVar[Mapping[str, str]] = {}
    vae_facts: ClassVar[Mapping[str, Any]] = {}

    # ---- parts

    @property
    def text_slots(self) -> tuple[Slot, ...]:
        """The text encoders, in order."""
        return tuple(slot for slot in self.slots if slot.tokenizer is not None)

    @property
    def text_parts(self) -> tuple[str, ...]:
        """Canonical names of the text encoders, in order."""
        return tuple(part for slot in self.text_slots for part in slot.components)

    @property
    def parts(self) -> tuple[str, ...]:
        """Canonical names of all parts, in the order in which they run."""
        return tuple(part for slot in self.slots for part in slot.components)

    @property
    def shared_parts(self) -> tuple[str, ...]:
        """Parts whose weights the models of a handoff should share."""
        return tuple(part for slot in self.slots if slot.shared for part in slot.components)

    def part_of(self, role: str) -> str:
        """Canonical name of the part that is the `denoiser`, the `decoder` or the `encoder`."""
        return {DENOISER: self.denoiser, DECODER: self.decoder, ENCODER: self.encoder}[role]

    def role_of(self, part: str) -> str:
        """What a part does, whatever it is called: `text`, `denoiser`, `decoder` or `encoder`."""
        roles = {self.part_of(role): role for role in (DENOISER, DECODER, ENCODER)}
        return roles.get(part, TEXT)

    def denoises(self, part: str) -> bool:
        """Whether a part is called at every step, with latents, timesteps and conditions: the denoiser, in both forms,
        or a ControlNet."""
        return part in (self.denoiser, self.controlled) or part.startswith(CONTROLNET)

    def slot_of(self, part: str) -> Slot:
        """The slot that a part is made of; KeyError if there is none."""
        return next(slot for slot in self.slots if part in slot.components)

    def tokenizer_of(self, part: str) -> str:
        """The folder of a text encoder's tokenizer."""
        folder = self.slot_of(part).tokenizer
        if folder is None:
            raise KeyError(f"{part} reads no text")
        return folder

    # ---- drawing

    def latent_shape(self, family: Family, width: int, height: int) -> tuple[int, ...]:
        """Shape of the latents, without batch axis, of a picture of `width` x `height` pixels (legal ones)."""
        return family.latent_channels, height // family.vae_factor, width // family.vae_factor

    def tokens(self, latent_shape: Sequence[int]) -> int:
        """How many tokens a transformer of this kind makes of latents of this shape."""
        return math.prod(side // self.patch for side in latent_shape[1:])

    def sized(self, sampler: Sampler, latent_shape: Sequence[int], steps: int) -> Sampler:
        """`sampler` for latents of this shape in `steps` steps, whose levels may depend on both."""
        return sampler.sized(self.tokens(latent_shape))

    def pack_latents(self, latents: Any) -> Any:
        """One picture's latents, without batch axis, as the denoiser takes them; latents are numpy or torch arrays."""
        return latents

    def unpack_output(self, rows: Any, latent_shape: Sequence[int]) -> Any:
        """The denoiser's prediction, with batch axis, in the shape of latents."""
        return rows

    def decoder_factor(self, family: Family) -> int:
        """Pixels a side of one latent as the decoder takes them."""
        return family.vae_factor

    def decoder_latents(self, family: Family, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """What the decoder takes for latents (samples, then their shape), float32: without scale and shift."""
        scale, shift = np.float32(family.scaling_factor), np.float32(family.shift_factor)
        return np.asarray(latents / scale + shift, np.float32)

    def axis_sizes(self, family: Family, width: int, height: int) -> dict[str, int]:
        """Sizes of the denoiser's axes that depend on the picture, which has `width` x `height` pixels."""
        return {"height": height // family.vae_factor, "width": width // family.vae_factor}

    def picture_size(self, family: Family, sizes: Mapping[str, int]) -> tuple[int, int]:
        """(width, height) in pixels of the picture whose denoiser has these `sizes` by axis."""
        return sizes["width"] * family.vae_factor, sizes["height"] * family.vae_factor

    def least_side(self, family: Family) -> int:
        """The smallest legal width and height of a picture, in pixels."""
        return -(-LIMITS.size_px[0] // family.size_step) * family.size_step

    def axis_steps(self, family: Family) -> dict[str, int]:
        """{axis: step} for those axes of the denoiser whose size must be a multiple of `step`."""
        step = family.size_step // family.vae_factor
        return {"height": step, "width": step} if step > 1 else {}

    @abstractmethod
    def conditions(self, family: Family) -> dict[str, Shape]:
        """Shape, without batch axis, of each of `condition_names` in a model of this family."""

    @abstractmethod
    def encode(
        self,
        model: Model,
        prompt: str,
        size: tuple[int, int],
        negative: bool = False,
        reading: Reading = PLAIN,
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        """Conditioning of one prompt (or negative prompt), float32 arrays by name, and warnings.

        size: of the picture, (width, height) in pixels. reading: how the prompt is written and which layers of the
        encoders are used; by default every character is text, and the model's own layers.

        Raises:
            UnsupportedError: the model has no text encoder or tokenizer, or cannot encode so.
            ConfigError: a prompt that its syntax does not allow.
            RunnerError: an encoder's output is not finite.
        """

    def size_conditions(self, size: tuple[int, int], negative: bool = False) -> dict[str, NDArray[np.float32]]:
        """Those conditions that depend on the picture's (width, height) in pixels, and not on the prompt."""
        return {}

    def without_prompt(
        self, model: Model, positive: Mapping[str, Any], size: tuple[int, int]
    ) -> Mapping[str, Any] | None:
        """Conditioning that stands for a negative prompt if none was given; None: the empty prompt is encoded."""
        return None

    def strength_default(self, family: Family, masked: bool) -> float:
        """Share of the noise that a picture begins with if a request gives an image, or (`masked`) a mask too."""
        if family.fills_masks:
            return family.strength_default
        return self.mask_strength if masked else self.image_strength

    def takes_guidance(self, family: Family) -> bool:
        """Whether the denoiser takes the guidance scale as an input, instead of a second row of a batch."""
        return family.time_cond_dim is not None

    def guidance_inputs(
        self, inputs: Sequence[TensorSpec], guidances: Sequence[float]
    ) -> dict[str, NDArray[np.float32]]:
        """Feeds, by name, of those `inputs` that take the guidance scale; one row for each of `guidances`."""
        return {}

    def position_inputs(
        self, inputs: Sequence[TensorSpec], latent_shape: Sequence[int], condition: Mapping[str, Any]
    ) -> dict[str, NDArray[np.float32]]:
        """Feeds, by name, of those `inputs` that say where tokens stand. They have no batch axis: all samples of a call
        have latents of one shape and conditions of the shapes in `condition`."""
        return {}

    @abstractmethod
    def tokenizer(self, folder: str, files: Mapping[str, bytes]) -> Tokenizer:
        """The tokenizer of a folder's files.

        Raises:
            SourceError: the files make none.
        """

    # ---- reading and building; these may import torch, diffusers and transformers

    @abstractmethod
    def recognises(self, modules: Mapping[str, Module]) -> bool:
        """Whether these modules, by folder, are of this kind. Of several kinds the first in the registry wins."""

    def of_checkpoint(self, checkpoint: Checkpoint) -> Material | None:
        """What a checkpoint in one file holds of a model of this kind; None if its denoiser is of another kind, or it
        has none. A kind that reads no such files leaves this out.

        Raises:
            SourceError: its tensors do not make the networks that their names are of.
            UnsupportedError: they make networks that are not run here.
        """
        return None

    @abstractmethod
    def missing(self, material: Material) -> list[str]:
        """Folders that a pipeline needs and `material` lacks, the denoiser's first."""

    def few_steps_index(self, family: Family) -> dict[str, Any]:
        """What the model_index says of a model of this family that was made for a few steps (LCM)."""
        return {}

    def texts_fit(self, modules: Mapping[str, Module]) -> bool:
        """Whether the text encoders among `modules` are all that the denoiser needs, so that no base must supply
        others."""
        return all(slot.folder in modules for slot in self.text_slots)

    def scheduler_from(self, scheduler: Mapping[str, Any], modules: Mapping[str, Module]) -> dict[str, Any]:
        """The scheduler config for `modules` that come without one, derived from that of a base (`scheduler`)."""
        return dict(scheduler)

    def complete_tokenizer(self, slot: Slot, files: Mapping[str, bytes], where: str) -> dict[str, bytes]:
        """The tokenizer files of a text encoder in every form that other clients read; `where` is for errors."""
        return dict(files)

    def new_index(self, modules: Mapping[str, Module]) -> dict[str, Any]:
        """What the model_index of a new model of these modules says beside its parts: a class, options."""
        return {}

    @abstractmethod
    def repaired(self, material: Material) -> Material:
        """`material` as the stock pipeline makes it: absent keys have defaults, old configs are repaired.

        Raises:
            UnsupportedError: the model_index names a class that is not drawn here.
        """

    @abstractmethod
    def family(self, material: Material) -> Family:
        """The facts of complete and repaired material.

        Raises:
            SourceError: the parts do not fit each other, or a config lacks what it must say.
            UnsupportedError: a part does something that is not built.
        """

    @abstractmethod
    def build(self, slot: Slot, module: Module, family: Family) -> tuple[Component, ...]:
        """The components of one slot, in its order.

        Raises:
            SourceError, UnsupportedError: its config makes none.
        """

    def with_controlnets(
        self, denoiser: Component, family: Family, modules: Mapping[str, Module]
    ) -> tuple[Component, ...]:
        """`denoiser` as the part `controlled`, then a part for each ControlNet of `modules`, by the name that its owner
        gave it.

        Raises:
            UnsupportedError: there are no ControlNets for this kind of model, or not such ones.
            SourceError: one was trained for another family.
        """
        raise UnsupportedError(f"ControlNets control U-Nets here; this model is of the kind {self.name}")

    @abstractmethod
    def index(self, material: Material, family: Family) -> dict[str, Any]:
        """The model_index.json of complete material; entries and options of the source are kept."""

    def notes(self, material: Material) -> list[str]:
        """What the source asks for and is not done here, a sentence each."""
        return []
