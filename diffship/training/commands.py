"""What `diffship train NAME` runs, resumable; `core.registry.STAGES` has the names, in the order of a whole run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from diffship.core.errors import ConfigError
from diffship.core.lazy import lazy
from diffship.core.registry import STAGES, load
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
    stage = load(STAGES, name, "training stage")
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    reached: dict[str, object] = stage(options)
    leave()
    return reached


def make_data(options: TrainOptions) -> dict[str, object]:
    """Pictures and captions, out of the npm archives in `data`."""
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


def train_vae(options: TrainOptions) -> dict[str, object]:
    """The auto-encoder."""
    from diffship.training import emoji_stages

    return emoji_stages.train_vae(options, decoder_only=False)


def train_decoder(options: TrainOptions) -> dict[str, object]:
    """Its decoder alone, longer."""
    from diffship.training import emoji_stages

    return emoji_stages.train_vae(options, decoder_only=True)


def train_unet(options: TrainOptions) -> dict[str, object]:
    """The U-Net and its text encoder."""
    from diffship.training import emoji_stages

    return emoji_stages.train_unet(options)


def train_judge(options: TrainOptions) -> dict[str, object]:
    """The judge, on real pictures alone."""
    from diffship.training import emoji_stages

    return emoji_stages.train_judge(options)


def pack(options: TrainOptions) -> dict[str, object]:
    """The trained family as the package that a wheel holds."""
    from diffship.training import emoji_pack

    return emoji_pack.pack(options)


def unpack(options: TrainOptions) -> dict[str, object]:
    """A packed family as runs again."""
    from diffship.training import emoji_unpack

    return emoji_unpack.unpack(options)
