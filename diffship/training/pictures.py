"""A folder of images with `metadata.jsonl`, held in memory as one uint8 array."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True)
class Pictures:
    """`pixels`: (n, size, size, 3) uint8; `records`: the rows of metadata.jsonl in the same order."""

    pixels: np.ndarray
    records: list[dict]

    @classmethod
    def read(cls, folder: Path, keep: Callable[[dict], bool] = lambda record: True) -> Pictures:
        lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
        records = [record for record in map(json.loads, lines) if keep(record)]
        pixels = np.stack([np.asarray(Image.open(folder / record["file_name"]).convert("RGB")) for record in records])
        return cls(pixels, records)

    def __len__(self) -> int:
        return len(self.records)

    def take(self, rows: Tensor) -> Tensor:
        """(b, 3, size, size) float32 in [-1, 1]."""
        batch = torch.from_numpy(self.pixels[rows.numpy()])
        return batch.permute(0, 3, 1, 2).float().div(127.5).sub(1)
