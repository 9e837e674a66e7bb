"""What one run of a pass that trains needs, whatever it trains: its file, its schedule, its folder and its captions."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from diffship.core.errors import ConfigError
from diffship.core.job import require_disk
from diffship.core.lazy import lazy
from diffship.training.loop import Schedule
from diffship.training.paired import PairedPictures

if TYPE_CHECKING:
    import accelerate
    import torch
    from torch import nn
else:
    torch = lazy("torch")

STATE = "state.safetensors"
MIXED = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}  # precision of a pass -> mixed precision of accelerate
_PROMPTS = 8


class Paced(Protocol):
    """The options that every pass that trains has by the same names; each pass says what they are."""

    @property
    def steps(self) -> int: ...

    @property
    def batch(self) -> int: ...

    @property
    def accumulate(self) -> int: ...

    @property
    def warmup(self) -> int: ...

    @property
    def decay(self) -> int: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def clip(self) -> float: ...

    @property
    def ema(self) -> float: ...

    @property
    def seed(self) -> int: ...

    @property
    def save_seconds(self) -> float: ...

    @property
    def validate_every(self) -> int: ...


def schedule(options: Paced, rate: float) -> Schedule:
    """AdamW as published: betas .9 and .999. `rate` is the learning rate, which a pass may choose by itself."""
    return Schedule(
        steps=options.steps,
        batch=options.batch,
        rate=rate,
        warmup=options.warmup,
        decay=options.decay,
        weight_decay=options.weight_decay,
        clip=options.clip,
        ema=options.ema,
        seed=options.seed,
        save_seconds=options.save_seconds,
        validate_every=options.validate_every,
        accumulate=options.accumulate,
        betas=(0.9, 0.999),
    )


def spread_captions(pictures: PairedPictures, count: int = _PROMPTS) -> tuple[str, ...]:
    """Plain captions of pictures that lie evenly over the data."""
    count = min(count, len(pictures))
    return tuple(pictures.captions(at * len(pictures) // count)[0] for at in range(count))


def require_one_folder(folder: Path, accelerator: accelerate.Accelerator) -> None:
    """Raises ConfigError if the processes of a distributed run would train in different folders."""
    if accelerator.num_processes == 1:
        return
    mark = int.from_bytes(hashlib.sha256(str(folder.resolve()).encode()).digest()[:7], "little")
    span = torch.tensor([mark, -mark], device=accelerator.device)
    torch.distributed.all_reduce(span, op=torch.distributed.ReduceOp.MAX)  # no timeout: torch's own, for every exchange
    if int(span[0]) != -int(span[1]):
        raise ConfigError("the processes have no folder in common; give the job one (compress --cache DIR)")


def require_room(folder: Path, parameters: int, what: str) -> None:
    """Raises UnsupportedError if a checkpoint of so many trained parameters does not fit on the disk of `folder`."""
    # weights, their average and two moments, twice while a checkpoint takes the place of the last one
    require_disk(folder, 8 * 4 * parameters, what)


def trainable(module: nn.Module) -> int:
    """How many of a module's parameters are trained."""
    return sum(value.numel() for value in module.parameters() if value.requires_grad)
