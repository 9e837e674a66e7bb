"""`arch:NAME[+lcm][+no-t5][+taesd|+small-vae]`: an architecture from its config; weights come from a seed when read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import SourceError
from diffship.core.lazy import lazy
from diffship.core.registry import kinds
from diffship.core.strict import unknown
from diffship.core.weights import SeededWeights, TensorMeta
from diffship.models.assemble import kind_of
from diffship.models.parts.autoencoder import FLUX2 as FLUX2_VAE
from diffship.models.parts.autoencoder import KL, TINY, Decoder, Encoder, narrower
from diffship.models.parts.clip import PLAIN, PROJECTED, TextEncoder
from diffship.models.parts.component import weight_metas
from diffship.models.parts.flux2 import CLASS as FLUX2
from diffship.models.parts.flux2 import Flux2Transformer
from diffship.models.parts.qwen3 import CLASS as QWEN3
from diffship.models.parts.qwen3 import Qwen3Encoder
from diffship.models.parts.sd3 import CLASS as SD3
from diffship.models.parts.sd3 import SD3Transformer
from diffship.models.parts.t5 import CLASS as T5
from diffship.models.parts.t5 import T5Encoder
from diffship.models.parts.unet import CLASS as UNET
from diffship.models.parts.unet import UNet
from diffship.models.pipeline import Material, Module
from diffship.models.reduced.layouts import LAYOUTS, layout_widths, student_config
from diffship.models.reduced.widths import KEY, with_widths
from diffship.models.sources import arch_configs as configs
from diffship.models.sources import arch_flux2 as flux2
from diffship.models.sources.qwen_files import qwen_files
from diffship.models.sources.t5_files import t5_files
from diffship.models.sources.tokenizer_files import clip_files
from diffship.sampling.tokenizer import END

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

PREFIX = "arch:"
SUFFIXES = ("lcm", "no-t5", "taesd", "small-vae")
# whose text encoders, VAE and scheduler an architecture has, where they are not its own
_SHARED = {
    "sd21-base": ("sd21", "sd15", "sd21-base"),
    "lcm-sd15": ("sd15", "sd15", "sd15"),
    "lcm-sdxl": ("sdxl", "sdxl", "sdxl"),
    "sd15-inpaint": ("sd15", "sd15", "sd15"),
    "sdxl-refiner": ("sdxl-refiner", "sdxl", "sdxl"),
    "tiny-sd": ("tiny-sd", "tiny-sd", "sd15"),
    "tiny-lcm": ("tiny-sd", "tiny-sd", "sd15"),
    "tiny-inpaint": ("tiny-sd", "tiny-sd", "sd15"),
    "tiny-sdxl": ("tiny-sdxl", "tiny-sdxl", "sdxl"),
    "tiny-refiner": ("tiny-refiner", "tiny-sdxl", "sdxl"),
    "tiny-sd3": ("tiny-sd3", "tiny-sd3", "sd3-medium"),
    "sd35-medium": ("sd3-medium", "sd3-medium", "sd3-medium"),
    "sd35-large": ("sd3-medium", "sd3-medium", "sd3-medium"),
    "tiny-flux2": ("tiny-flux2", "tiny-flux2", "flux2-klein-4b"),
}
# published reductions by the architecture that they reduce; BK-SDM has a second series, made of SD 2.1 base
_TEACHERS = {name: "sd15" if layout.levels == 4 else "sdxl" for name, layout in LAYOUTS.items()}
_SECOND = {name.replace("bk-", "bk-v2-"): name for name in LAYOUTS if name.startswith("bk-")}
_TEACHERS |= dict.fromkeys(_SECOND, "sd21-base")
NAMES = (*configs.UNETS, *configs.TRANSFORMERS, *flux2.TRANSFORMERS, *_TEACHERS)


def arch_material(text: str) -> Material:
    """Configs, seeded weights, tokenizers and scheduler of `arch:NAME[+SUFFIX...]`; nothing is drawn yet.

    Raises:
        SourceError: an unknown name or suffix, or one that is not for this architecture.
    """
    name, suffixes = parse_arch(text)
    class_name, config, name = _denoiser(name, suffixes)
    text_of, vae_of, scheduler_of = _SHARED.get(name, (name, name, name))
    own_vae = FLUX2_VAE if name in flux2.TRANSFORMERS else KL
    vae_class, vae = (TINY, _taesd(name, vae_of)) if "taesd" in suffixes else (own_vae, configs.VAES[vae_of])
    vae = {**vae, KEY: {"decoder": list(narrower(vae))}} if "small-vae" in suffixes else vae
    texts = {part: made for part, made in configs.TEXTS[text_of].items() if not (made[0] == T5 and "no-t5" in suffixes)}
    networks = {_folder(class_name): (class_name, config), _folder(vae_class): (vae_class, vae), **texts}
    modules = {folder: _module(*network, configs.SEEDS[folder]) for folder, network in networks.items()}
    return Material(
        source={"id": text, "revision": None, "kind": "arch"},
        modules=modules,
        tokenizers=_tokenizers(modules),
        scheduler=_scheduler(scheduler_of, config),
        index=_index(modules),
        licence={"id": "", "name": "none (random weights)", "link": "", "restrictions": "", "notices": []},
    )


def _denoiser(name: str, suffixes: Sequence[str]) -> tuple[str, dict[str, Any], str]:
    """Class and config of the denoiser, and the architecture whose other parts it has."""
    if name in configs.TRANSFORMERS:
        return SD3, dict(configs.TRANSFORMERS[name]), name
    if name in flux2.TRANSFORMERS:
        return FLUX2, dict(flux2.TRANSFORMERS[name]), name
    unet, name = _unet(name), _TEACHERS.get(name, name)
    if "lcm" in suffixes:
        unet.setdefault("time_cond_proj_dim", 32 if name.startswith("tiny") else 256)
    return UNET, unet, name


def _folder(class_name: str) -> str:
    """The folder that a pipeline has for a network of this class."""
    return next(slot.folder for kind in kinds().values() for slot in kind.slots if class_name in slot.classes)


def _module(class_name: str, config: Mapping[str, Any], seed: int) -> Module:
    text = class_name in (PLAIN, PROJECTED, T5, QWEN3)
    named = {**config, "architectures": [class_name]} if text else {**config, "_class_name": class_name}
    return Module(class_name, named, _ArchWeights(_builds(class_name, config), seed))


def _builds(class_name: str, config: Mapping[str, Any]) -> list[Callable[[], nn.Module]]:
    """What makes the networks of a module, one after the other."""
    if class_name in (KL, TINY, FLUX2_VAE):
        return [partial(half, class_name, config) for half in (Encoder, Decoder)]
    if class_name in (PLAIN, PROJECTED):
        return [partial(TextEncoder, config, class_name == PROJECTED, False)]
    if class_name == QWEN3:  # a folder has the layers that are not read, too
        return [partial(Qwen3Encoder, config, whole=True)]
    return [partial({UNET: UNet, SD3: SD3Transformer, FLUX2: Flux2Transformer, T5: T5Encoder}[class_name], config)]


def _unet(name: str) -> dict[str, Any]:
    """Config of a whole U-Net, or of a published reduction of one, its inner widths included."""
    if name in configs.UNETS:
        return dict(configs.UNETS[name])
    layout = LAYOUTS[_SECOND.get(name, name)]
    config = student_config(layout, configs.UNETS[_TEACHERS[name]])
    return with_widths(config, layout_widths(layout, config))


def parse_arch(text: str) -> tuple[str, tuple[str, ...]]:
    """("sd15", ("lcm",)) of `arch:sd15+lcm`."""
    name, *suffixes = text.removeprefix(PREFIX).split("+")
    if name not in NAMES:
        raise SourceError(f"{text}: {unknown('architecture', name, NAMES)}")
    legal = [suffix for suffix in SUFFIXES if suffix != ("lcm" if name in configs.TRANSFORMERS else "no-t5")]
    legal = [] if name in flux2.TRANSFORMERS else legal
    for suffix in suffixes:
        if suffix not in legal:
            raise SourceError(f"{text}: {unknown('suffix', suffix, legal)}")
    if {"taesd", "small-vae"} <= set(suffixes):
        raise SourceError(f"{text}: a model has one VAE; name one of taesd and small-vae")
    return name, tuple(suffixes)


def _taesd(name: str, vae_of: str) -> dict[str, Any]:
    size = "tiny" if name.startswith("tiny") else "full"
    latents = configs.VAES[vae_of]["latent_channels"] if name in configs.TRANSFORMERS else 4
    return {**configs.TAESD[size], "latent_channels": latents}


def _scheduler(name: str, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    own = configs.SCHEDULERS[name]
    if not denoiser.get("time_cond_proj_dim"):
        return dict(own)
    return {**configs.LCM_SCHEDULER, "prediction_type": own["prediction_type"]}


def _index(modules: Mapping[str, Module]) -> dict[str, Any]:
    kind = kind_of(modules)
    return {} if kind is None else kind.new_index(modules)


def _tokenizers(modules: Mapping[str, Module]) -> dict[str, dict[str, bytes]]:
    kind = kind_of(modules)
    slots = [slot for slot in (kind.text_slots if kind else ()) if slot.folder in modules]
    return {str(slot.tokenizer): _tokenizer(modules[slot.folder]) for slot in slots}


def _tokenizer(module: Module) -> dict[str, bytes]:
    """OpenAI's CLIP, which has quick_gelu, pads with its end token, and the OpenCLIP models with "!"."""
    size = int(module.config["vocab_size"])
    made = {T5: t5_files, QWEN3: qwen_files}.get(module.class_name)
    if made is not None:
        return made(size)
    return clip_files(size, END if module.config["hidden_act"] == "quick_gelu" else "!")


class _ArchWeights:
    """Seeded weights whose names and shapes are found when they are first asked for."""

    def __init__(self, builds: Sequence[Callable[[], nn.Module]], seed: int) -> None:
        self._builds = tuple(builds)
        self._seed = seed

    @cached_property
    def _drawn(self) -> SeededWeights:
        metas: dict[str, TensorMeta] = {}
        with torch.device("meta"):
            for build in self._builds:
                metas.update(weight_metas(build()))
        return SeededWeights(metas, self._seed)

    @property
    def nbytes(self) -> int:
        return self._drawn.nbytes

    def names(self) -> tuple[str, ...]:
        return self._drawn.names()

    def meta(self, name: str) -> TensorMeta:
        return self._drawn.meta(name)

    def read(self, name: str) -> NDArray[np.generic]:
        return self._drawn.read(name)
