"""Which sampler a LoRA file wants: what its header says, or the name that a published one is called by.

No standard has a key for it. Files that diffship writes say it in their header; of others the names of published files
and repositories are known (LCM-LoRA, TCD, Hyper-SD, SDXL-Lightning), with the settings that their model cards give.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from diffship.compression.few_steps import LCM, SAMPLERS, TCD, FewSteps
from diffship.core.errors import SourceError
from diffship.core.limits import LIMITS

_KEY = "diffship."  # what the keys of a header begin with
_SHARED_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors", "kohya.safetensors")


def header_of(how: FewSteps) -> dict[str, str]:
    """What the header of a LoRA file says of the sampler that it was made for."""
    said = {"sampler": how.sampler, "steps": str(how.steps), "original_steps": str(how.original_steps)}
    return {f"{_KEY}{name}": value for name, value in said.items()}


def wanted(path: Path, header: Mapping[str, str]) -> tuple[FewSteps, str] | None:
    """(how a model with the LoRA of this file is drawn with, what says so); None if nothing does.

    Raises:
        SourceError: the header names a sampler or numbers that there are not.
    """
    if f"{_KEY}sampler" in header:
        return _from_header(path, header), f"the header of {path.name}"
    return next(((made, f"the name {name}") for name in _names(path) if (made := _named(name))), None)


def _from_header(path: Path, header: Mapping[str, str]) -> FewSteps:
    sampler = header[f"{_KEY}sampler"]
    if sampler not in SAMPLERS:
        raise SourceError(f"{path.name}: its header names the sampler {sampler[:40]!r}; legal: {', '.join(SAMPLERS)}")
    steps, original = (_whole(path, header, name, usual) for name, usual in (("steps", 4), ("original_steps", 50)))
    return FewSteps(sampler, steps, original_steps=original)


def _whole(path: Path, header: Mapping[str, str], name: str, usual: int) -> int:
    text = header.get(f"{_KEY}{name}", str(usual))
    low, high = (1, 1000) if name == "original_steps" else LIMITS.steps
    if not re.fullmatch("[0-9]{1,4}", text) or not low <= int(text) <= high:
        raise SourceError(f"{path.name}: its header has {name} {text[:40]!r}; legal are whole numbers {low} to {high}")
    return int(text)


def _names(path: Path) -> list[str]:
    """Names that may say what a file is: its own, or those of its folders if many files are called like it.

    A hub cache has `models--OWNER--NAME/snapshots/COMMIT/FILE`.
    """
    if path.name not in _SHARED_NAMES:
        return [path.stem]
    folders = path.absolute().parts[:-1]
    return [folder.rpartition("--")[2] for folder in (folders[-1:] if "snapshots" not in folders else folders[-3:])]


def _named(name: str) -> FewSteps | None:
    return next((make(found) for pattern, make in _PUBLISHED.items() if (found := re.fullmatch(pattern, name))), None)


def _hyper(found: re.Match[str]) -> FewSteps:
    """Hyper-SD (arXiv 2404.13686): that of one step serves 1 to 8 steps of TCD, others have DDIM's own timesteps."""
    steps = int(found["steps"])
    if steps == 1:
        return FewSteps(TCD, 1, eta=1.0)
    return FewSteps("ddim", steps, guidance=None if found["cfg"] else 1.0)


_PUBLISHED: dict[str, Callable[[re.Match[str]], FewSteps]] = {
    r"lcm-lora-(?:sdv1-5|sdxl|ssd-1b)": lambda _: FewSteps(LCM, 4),
    r"TCD-(?:SD15|SD21-base|SDXL)-LoRA": lambda _: FewSteps(TCD, 4, eta=0.3),
    r"Hyper-(?:SD15|SDXL)-(?P<steps>\d{1,2})steps?(?P<cfg>-CFG)?-lora": _hyper,
    r"sdxl_lightning_(?P<steps>[248])step_lora": lambda found: FewSteps("euler", int(found["steps"])),
}
