"""A folder of images with `metadata.jsonl`, held in memory as one uint8 array."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffship.core.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Pictures:
    """`pixels`: (n, size, size, 3) uint8; `records`: the rows of metadata.jsonl in the same order."""

    pixels: NDArray[np.uint8]
    records: list[dict[str, Any]]

    @classmethod
    def read(cls, folder: Path, keep: Callable[[dict[str, Any]], bool] = lambda record: True) -> Pictures:
        records = cls.records_of(folder, keep)
        pixels = np.stack([np.asarray(Image.open(folder / record["file_name"]).convert("RGB")) for record in records])
        return cls(pixels, records)

    @staticmethod
    def records_of(folder: Path, keep: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        """The kept rows of metadata.jsonl, without their pictures."""
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        return [record for record in map(json.loads, lines) if keep(record)]

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: Tensor) -> Tensor:
        """(b, 3, size, size) float32 in [-1, 1]."""
        batch = torch.from_numpy(self.pixels[rows.numpy()])
        return batch.permute(0, 3, 1, 2).float().div(127.5).sub(1)
