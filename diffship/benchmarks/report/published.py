"""Published hardware tables, copied as they stand, with the step counts and sizes that they were measured at.

They are shown beside our rows and never compared in one: other machines, other precisions, other step counts.
"""

from __future__ import annotations

from dataclasses import dataclass

KOALA = "KOALA (NeurIPS 2024), README figure: fp16, seconds per image / GB"
LCM_LORA = "LCM-LoRA article (2023): batch 1, SDXL at 1024 px, seconds per image"


@dataclass(frozen=True)
class Published:
    """One published cell; `seconds` is None if the table says out of memory, `steps` if it does not say."""

    source: str
    model: str
    hardware: str
    size: int
    steps: int | None
    seconds: float | None
    memory_gb: float | None = None


_KOALA_HARDWARE = ("RTX 3060 Ti 8 GB", "RTX 2080 Ti 11 GB", "RTX 4090 24 GB")
_KOALA_ROWS = (
    ("koala-turbo-700M", 512, None, ((0.74, 5.3), (0.54, 4.7), (0.19, 4.9))),
    ("koala-turbo-1B", 512, None, ((0.92, 6.1), (0.66, 5.5), (0.24, 5.7))),
    ("koala-lightning-700M", 1024, 10, ((2.88, 6.8), (1.94, 8.2), (0.66, 8.3))),
    ("koala-lightning-1B", 1024, 10, ((3.53, 7.2), (2.33, 8.9), (0.79, 9.1))),
    ("sdxl-base-1.0", 1024, 25, (None, (9.65, 10.4), (3.23, 11.9))),
    ("sdxl-turbo", 512, None, (None, (0.64, 8.3), (0.24, 8.5))),
    ("sdxl-lightning", 1024, None, (None, (2.05, 10.8), (0.72, 11.7))),
    ("PixArt-alpha", 1024, None, (None, None, (3.72, 17.3))),
    ("PixArt-sigma", 1024, None, (None, None, (3.98, 17.3))),
    ("SSD-1B", 1024, None, (None, (6.34, 9.3), (2.09, 9.4))),
    ("SSD-Vega", 1024, None, ((6.75, 7.2), (4.52, 8.1), (1.49, 8.2))),
)
_LCM_ROWS = (
    ("Mac M1 Max", 6.5, 64.0),
    ("RTX 2080 Ti", 4.7, 10.2),
    ("RTX 3090", 1.4, 7.0),
    ("RTX 4090", 0.7, 3.4),
    ("T4 (Google Colab)", 8.4, 26.5),
    ("A100 80 GB", 1.2, 3.8),
    ("Intel i9-10980XE, 1 of 36 cores", 29.0, 219.0),
)


def koala() -> list[Published]:
    return [
        Published(KOALA, model, hardware, size, steps, *(cell or (None, None)))
        for model, size, steps, cells in _KOALA_ROWS
        for hardware, cell in zip(_KOALA_HARDWARE, cells, strict=True)
    ]


def lcm_lora() -> list[Published]:
    return [
        Published(LCM_LORA, model, hardware, 1024, steps, seconds)
        for hardware, few, many in _LCM_ROWS
        for model, steps, seconds in (("SDXL + LCM-LoRA", 4, few), ("SDXL", 25, many))
    ]
