"""`arch:NAME[+lcm][+taesd|+small-vae]`: an architecture from its config; weights are drawn from a seed when read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from diffship.core.errors import SourceError
from diffship.core.lazy import lazy
from diffship.core.strict import unknown
from diffship.core.weights import SeededWeights, TensorMeta
from diffship.models.assemble import kind_of
from diffship.models.parts.autoencoder import KL, TINY, Decoder, Encoder, narrower
from diffship.models.parts.clip import PROJECTED, TextEncoder
from diffship.models.parts.component import weight_metas
from diffship.models.parts.unet import CLASS as UNET
from diffship.models.parts.unet import UNet
from diffship.models.pipeline import Material, Module
from diffship.models.reduced.layouts import LAYOUTS, layout_widths, student_config
from diffship.models.reduced.widths import KEY, with_widths
from diffship.models.sources import arch_configs as configs
from diffship.models.sources.tokenizer_files import clip_files
from diffship.sampling.tokenizer import END

if TYPE_CHECKING:
    import torch
    from torch import nn
else:
    torch = lazy("torch")

PREFIX = "arch:"
SUFFIXES = ("lcm", "taesd", "small-vae")
# whose text encoders, VAE and scheduler an architecture has, where they are not its own
_SHARED = {
    "sd21-base": ("sd21", "sd15", "sd21-base"),
    "lcm-sd15": ("sd15", "sd15", "sd15"),
    "sd15-inpaint": ("sd15", "sd15", "sd15"),
    "sdxl-refiner": ("sdxl-refiner", "sdxl", "sdxl"),
    "tiny-sd": ("tiny-sd", "tiny-sd", "sd15"),
    "tiny-lcm": ("tiny-sd", "tiny-sd", "sd15"),
    "tiny-inpaint": ("tiny-sd", "tiny-sd", "sd15"),
    "tiny-sdxl": ("tiny-sdxl", "tiny-sdxl", "sdxl"),
    "tiny-refiner": ("tiny-refiner", "tiny-sdxl", "sdxl"),
}
_SEEDS = {"text_encoder": 1, "text_encoder_2": 2, "unet": 3, "vae": 4}
# published reductions by the architecture that they reduce; BK-SDM has a second series, made of SD 2.1 base
_TEACHERS = {name: "sd15" if layout.levels == 4 else "sdxl" for name, layout in LAYOUTS.items()}
_SECOND = {name.replace("bk-", "bk-v2-"): name for name in LAYOUTS if name.startswith("bk-")}
_TEACHERS |= dict.fromkeys(_SECOND, "sd21-base")
NAMES = (*configs.UNETS, *_TEACHERS)


def arch_material(text: str) -> Material:
    """Configs, seeded weights, tokenizers and scheduler of `arch:NAME[+lcm][+taesd|+small-vae]`; nothing is drawn yet.

    Raises:
        SourceError: an unknown name or suffix.
    """
    name, suffixes = parse_arch(text)
    unet, name = _unet(name), _TEACHERS.get(name, name)
    if "lcm" in suffixes:
        unet.setdefault("time_cond_proj_dim", 32 if name.startswith("tiny") else 256)
    text_of, vae_of, scheduler_of = _SHARED.get(name, (name, name, name))
    vae_class, vae = (TINY, configs.TAESD[_size(name)]) if "taesd" in suffixes else (KL, configs.VAES[vae_of])
    vae = {**vae, KEY: {"decoder": list(narrower(vae))}} if "small-vae" in suffixes else vae
    modules = {"unet": Module(UNET, {**unet, "_class_name": UNET}, _ArchWeights([partial(UNet, unet)], _SEEDS["unet"]))}
    modules["vae"] = Module(
        vae_class,
        {**vae, "_class_name": vae_class},
        _ArchWeights([partial(half, vae_class, vae) for half in (Encoder, Decoder)], _SEEDS["vae"]),
    )
    for part, (class_name, config) in configs.TEXTS[text_of].items():
        config = {**config, "architectures": [class_name]}
        modules[part] = Module(
            class_name,
            config,
            _ArchWeights([partial(TextEncoder, config, class_name == PROJECTED, False)], _SEEDS[part]),
        )
    return Material(
        source={"id": text, "revision": None, "kind": "arch"},
        modules=modules,
        tokenizers=_tokenizers(name, modules),
        scheduler=_scheduler(scheduler_of, unet),
        index=_index(modules),
        licence={"id": "", "name": "none (random weights)", "link": "", "restrictions": "", "notices": []},
    )


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
    for suffix in suffixes:
        if suffix not in SUFFIXES:
            raise SourceError(f"{text}: {unknown('suffix', suffix, SUFFIXES)}")
    if {"taesd", "small-vae"} <= set(suffixes):
        raise SourceError(f"{text}: a model has one VAE; name one of taesd and small-vae")
    return name, tuple(suffixes)


def _size(name: str) -> str:
    return "tiny" if name.startswith("tiny") else "full"


def _scheduler(name: str, unet: Mapping[str, Any]) -> dict[str, Any]:
    own = configs.SCHEDULERS[name]
    if not unet.get("time_cond_proj_dim"):
        return dict(own)
    return {**configs.LCM_SCHEDULER, "prediction_type": own["prediction_type"]}


def _index(modules: Mapping[str, Module]) -> dict[str, Any]:
    kind = kind_of(modules)
    return {} if kind is None else kind.new_index(modules)


def _tokenizers(name: str, modules: Mapping[str, Module]) -> dict[str, dict[str, bytes]]:
    found = {}
    for part in ("text_encoder", "text_encoder_2"):
        if part in modules:
            pad = "!" if part == "text_encoder_2" or name == "sd21" else END
            found[part.replace("text_encoder", "tokenizer")] = clip_files(modules[part].config["vocab_size"], pad)
    return found


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
