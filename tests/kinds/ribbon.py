"""A kind of model: ribbons, pictures 64 pixels high, whose latents have one axis of space."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from diffship.core.errors import ConfigError, SourceError
from diffship.core.family import Family
from diffship.core.kind import Kind, Shape, Slot
from diffship.core.lazy import lazy, lazy_base
from diffship.core.reading import PLAIN, Reading
from diffship.core.spec import TensorSpec
from diffship.sampling.encode import require_text, run_encoder
from diffship.sampling.tokenizer import ClipTokenizer, Tokenizer

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.nn import Module as Network

    from diffship.models.parts.component import Component
    from diffship.models.pipeline import Material, Module
    from diffship.sampling.model import Model
else:
    torch, nn, Network = lazy("torch"), lazy("torch.nn"), lazy_base("torch.nn", "Module")

HEIGHT, FACTOR, CHANNELS, TOKENS = 64, 8, 4, 77
Config = Mapping[str, Any]


class Ribbon(Kind):
    """What draws needs numpy alone; torch comes with `build`."""

    name = "ribbon"
    slots = (
        Slot("words", ("WordTable",), "transformers", tokenizer="tokenizer"),
        Slot("transformer", ("RibbonTransformer",), shared=False),
        Slot("painter", ("RibbonPainter",)),
    )
    denoiser, decoder, encoder = "transformer", "painter", "reader"  # no reader is made: images are not taken
    sample_input = "hidden_states"
    patch = 1

    # ---- drawing

    def latent_shape(self, family: Family, width: int, height: int) -> tuple[int, ...]:
        if height != HEIGHT:
            raise ConfigError(f"height is {height}; a ribbon is {HEIGHT} pixels high")
        return family.latent_channels, width // family.vae_factor

    def axis_sizes(self, family: Family, width: int, height: int) -> dict[str, int]:
        return {"length": width // family.vae_factor}

    def picture_size(self, family: Family, sizes: Mapping[str, int]) -> tuple[int, int]:
        return sizes["length"] * family.vae_factor, HEIGHT

    def axis_steps(self, family: Family) -> dict[str, int]:
        return {}

    def conditions(self, family: Family) -> dict[str, Shape]:
        return {"encoder_hidden_states": (None, family.text_width)}

    def encode(
        self,
        model: Model,
        prompt: str,
        size: tuple[int, int],
        negative: bool = False,
        reading: Reading = PLAIN,
    ) -> tuple[Mapping[str, Any], tuple[str, ...]]:
        (part,) = require_text(model)
        made = run_encoder(model, part, prompt, reading, output="states")
        return {"encoder_hidden_states": made.states}, made.warnings

    def tokenizer(self, folder: str, files: Mapping[str, bytes]) -> Tokenizer:
        return ClipTokenizer.from_files(files, folder)

    # ---- reading and building

    def recognises(self, modules: Mapping[str, Module]) -> bool:
        return self.denoiser in modules and modules[self.denoiser].class_name == "RibbonTransformer"

    def missing(self, material: Material) -> list[str]:
        found = [slot.folder for slot in self.slots if slot.folder not in material.modules]
        found += [slot.tokenizer for slot in self.text_slots if slot.tokenizer not in material.tokenizers]
        return found if material.scheduler else [*found, "scheduler"]

    def repaired(self, material: Material) -> Material:
        return material

    def family(self, material: Material) -> Family:
        width = int(material.modules["words"].config["width"])
        if width != material.modules[self.denoiser].config["text_width"]:
            raise SourceError(f"the words are {width} wide, and the transformer takes others")
        return Family(
            self.name,
            latent_channels=CHANNELS,
            unet_channels=CHANNELS,
            vae_factor=FACTOR,
            size_step=FACTOR,
            default_size=128,
            default_height=HEIGHT,
            scaling_factor=1.0,
            text_width=width,
            guidance_default=3.0,
            steps_default=4,
        )

    def build(self, slot: Slot, module: Module, family: Family) -> tuple[Component, ...]:
        from diffship.models.parts.component import Component

        network, inputs, outputs, sizes = _PARTS[slot.folder]
        width, made = family.text_width, partial(network, dict(module.config))
        specs = [tuple(spec(width) for spec in side) for side in (inputs, outputs)]
        kind = "word_table" if slot.tokenizer else None
        return (
            Component(
                slot.folder, module.class_name, module.config, made, module.weights, *specs, sizes, text_type=kind
            ),
        )

    def index(self, material: Material, family: Family) -> dict[str, Any]:
        entries: dict[str, Any] = {slot.folder: [slot.library, slot.classes[0]] for slot in self.slots}
        scheduler = (material.scheduler or {})["_class_name"]
        more = {"tokenizer": ["transformers", "CLIPTokenizer"], "scheduler": ["diffusers", scheduler]}
        return {"_class_name": "RibbonPipeline", **entries, **more}


# ---- the networks: each wraps what has weights in `inner`, takes its inputs and gives a tuple of outputs


class Words(Network):
    """(input_ids,) -> (states,)"""

    inner: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"table": nn.Embedding(config["vocab_size"], config["width"])})

    def forward(self, input_ids: torch.Tensor) -> tuple[torch.Tensor]:
        return (self.inner["table"](input_ids),)


class Transformer(Network):
    """(hidden_states, timestep, encoder_hidden_states) -> (out_sample,): two layers that read tokens and words."""

    inner: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        wide = config["width"]
        layers = {f"{part}_{i}": nn.Linear(wide, wide) for i in range(2) for part in ("query", "key", "value", "out")}
        self.inner = nn.ModuleDict(
            {
                **layers,
                **{f"norm_{i}": nn.LayerNorm(wide) for i in range(2)},
                "enter": nn.Linear(CHANNELS, wide),
                "read": nn.Linear(config["text_width"], wide),
                "time": nn.Linear(1, wide),
                "leave": nn.Linear(wide, CHANNELS),
            }
        )

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor
    ) -> tuple[torch.Tensor]:
        inner = self.inner
        time = inner["time"](timestep.reshape(-1, 1) / 1000.0)[:, None, :]
        tokens = inner["enter"](hidden_states.transpose(1, 2)) + time
        words = inner["read"](encoder_hidden_states)
        for i in range(2):
            both = inner[f"norm_{i}"](torch.cat([tokens, words], dim=1))
            heads = [inner[f"{part}_{i}"](both).unsqueeze(1) for part in ("query", "key", "value")]
            seen = nn.functional.scaled_dot_product_attention(*heads).squeeze(1)
            tokens = tokens + inner[f"out_{i}"](nn.functional.silu(seen[:, : tokens.shape[1]]))
        return (inner["leave"](tokens).transpose(1, 2),)


class Painter(Network):
    """(latent_sample,) -> (sample,): each latent becomes 64 x 8 pixels."""

    inner: Any

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"paint": nn.Linear(CHANNELS, 3 * HEIGHT * FACTOR)})

    def forward(self, latent_sample: torch.Tensor) -> tuple[torch.Tensor]:
        pixels = self.inner["paint"](latent_sample.transpose(1, 2))
        batch, length, _ = pixels.shape
        columns = pixels.reshape(batch, length, 3, HEIGHT, FACTOR).permute(0, 2, 3, 1, 4)
        return (columns.reshape(batch, 3, HEIGHT, length * FACTOR),)


def _floats(name: str, *shape: Any) -> Any:
    """A spec whose width of the text (None in `shape`) is known later."""
    return lambda width: TensorSpec(name, "float32", tuple(width if side is None else side for side in shape))


def _ids(width: int) -> TensorSpec:
    return TensorSpec("input_ids", "int64", ("batch_size", "sequence_length"))


_PARTS: Mapping[str, tuple[Any, tuple[Any, ...], tuple[Any, ...], dict[str, int]]] = {
    "words": (
        Words,
        (_ids,),
        (_floats("states", "batch_size", "sequence_length", None),),
        {"batch_size": 1, "sequence_length": TOKENS},
    ),
    "transformer": (
        Transformer,
        (
            _floats("hidden_states", "batch_size", CHANNELS, "length"),
            lambda width: TensorSpec("timestep", "float32", ("batch_size",), exact=True),
            _floats("encoder_hidden_states", "batch_size", "sequence_length", None),
        ),
        (_floats("out_sample", "batch_size", CHANNELS, "length"),),
        {"batch_size": 1, "length": 8, "sequence_length": TOKENS},
    ),
    "painter": (
        Painter,
        (_floats("latent_sample", "batch_size", CHANNELS, "latent_length"),),
        (_floats("sample", "batch_size", 3, HEIGHT, f"latent_length * {FACTOR}"),),
        {"batch_size": 1, "latent_length": 8},
    ),
}
