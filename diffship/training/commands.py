"""What `diffship train NAME` runs: each stage of the `emoji` family, resumable, in the order of `STAGES`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.training.loop import leave
from diffship.training.options import TrainOptions

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def run(name: str, options: TrainOptions) -> dict[str, object]:
    """Run one stage; returns what it reached.

    Raises:
        ConfigError: unknown stage, or a stage that this one stands on has not been run.
    """
    if name not in STAGES:
        raise ConfigError(f"unknown training stage {name!r}; known: {', '.join(STAGES)}")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    reached = STAGES[name](options)
    leave()
    return reached


def _data(options: TrainOptions) -> dict[str, object]:
    from diffship.training.emoji import prepare

    archives = [_archive(options.data, stem) for stem in ("lobehub-fluent-emoji-3d", "emojibase-data")]
    google = _archive(options.data, "emoji-datasource-google")
    return {"pictures": prepare(archives[0], archives[1], options.out, google)}


def _archive(folder: Path, stem: str) -> Path:
    found = sorted(folder.glob(f"{stem}-*.tgz"))
    if not found:
        package = stem.replace("lobehub-", "@lobehub/")
        raise ConfigError(f"{folder} has no {stem}-*.tgz; get it with: npm pack {package}")
    return found[-1]


def _vae(options: TrainOptions) -> dict[str, object]:
    from diffship.training import emoji_stages

    return emoji_stages.train_vae(options, decoder_only=False)


def _decoder(options: TrainOptions) -> dict[str, object]:
    from diffship.training import emoji_stages

    return emoji_stages.train_vae(options, decoder_only=True)


def _unet(options: TrainOptions) -> dict[str, object]:
    from diffship.training import emoji_stages

    return emoji_stages.train_unet(options)


def _judge(options: TrainOptions) -> dict[str, object]:
    from diffship.training import emoji_stages

    return emoji_stages.train_judge(options)


def _pack(options: TrainOptions) -> dict[str, object]:
    from diffship.training import emoji_pack

    return emoji_pack.pack(options)


def _unpack(options: TrainOptions) -> dict[str, object]:
    from diffship.training import emoji_unpack

    return emoji_unpack.unpack(options)


STAGES: dict[str, Callable[[TrainOptions], dict[str, object]]] = {
    "emoji-data": _data,
    "emoji-vae": _vae,
    "emoji-unet": _unet,
    "emoji-decoder": _decoder,
    "judge": _judge,
    "emoji-pack": _pack,
    "emoji-unpack": _unpack,
}
