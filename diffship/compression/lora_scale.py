"""How strongly a LoRA changes its layers where its file has no alphas: what peft and diffusers note beside it.

peft scales by alpha / rank, or by alpha / sqrt(rank) with `use_rslora` (Kalajdzievski, arXiv 2312.03732, eq. 5), and
keeps alpha apart from the tensors: in `adapter_config.json`, or in the header of a file that diffusers wrote. Who takes
alpha for the rank then is wrong by their ratio: eight times with the defaults of LCM-LoRA's training (64 and 8).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffship.core.document import read_json
from diffship.core.errors import SourceError
from diffship.core.limits import LIMITS

ADAPTER = "adapter_config.json"
METADATA = "lora_adapter_metadata"
PEFT = "base_model.model."  # what the keys of peft's own files begin with
_LITERAL = re.compile(r"[\w.\-]+\Z")
_OTHER_BASE = ("pissa", "olora", "corda", "loftq")  # these begin by changing the weights that the LoRA is added to


@dataclass(frozen=True)
class Scaling:
    """alpha: of every layer that `patterns` does not name; these are ends of layer names, the first that fits counts.
    root: whether the square root of the rank is divided by. where: the place that says so."""

    alpha: float
    patterns: Mapping[str, float]
    root: bool
    where: str

    def of(self, layer: str, rank: int) -> float:
        """The factor of `up @ down` of this layer."""
        named = (value for end, value in self.patterns.items() if f".{layer}".endswith(f".{end}"))
        return next(named, self.alpha) / (math.sqrt(rank) if self.root else rank)


@dataclass(frozen=True)
class Notes:
    """The scalings of one file: of each part, or of all (`""`); none where nothing is noted, and the rank is alpha."""

    parts: Mapping[str, Scaling]

    def of(self, part: str) -> Scaling | None:
        return self.parts.get(part, self.parts.get(""))


def read_notes(path: Path, keys: tuple[str, ...], metadata: Mapping[str, str]) -> Notes:
    """What is noted of the LoRA file `path`, whose tensors are `keys` and whose header holds `metadata`.

    Raises:
        SourceError: peft's file without its `adapter_config.json`, or notes that cannot be read or are not of a LoRA.
    """
    if METADATA in metadata:
        return _from_header(metadata[METADATA], f"{path.name}: {METADATA}")
    if not any(key.startswith(PEFT) for key in keys):
        return Notes({})
    config = adapter_config(path)
    if config is None:
        raise SourceError(f"{path.name} is peft's, which keeps alpha in {ADAPTER}; put that file beside it")
    return Notes({"": _scaling(read_json(config, LIMITS.recipe_bytes, SourceError), f"{ADAPTER} beside {path.name}")})


def adapter_config(path: Path) -> Path | None:
    """peft's config beside a LoRA file, or None where there is none."""
    config = path.parent / ADAPTER
    return config if config.is_file() else None


def _from_header(text: str, where: str) -> Notes:
    """diffusers': one table with the part before each name (`unet.lora_alpha`), or that of a U-Net alone."""
    try:
        table = json.loads(text) if len(text) <= LIMITS.recipe_bytes else None
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict):
        raise SourceError(f"{where} is no JSON object of at most {LIMITS.recipe_bytes:,} bytes")
    if "lora_alpha" in table:
        return Notes({"": _scaling(table, where)})
    parts: dict[str, dict[str, Any]] = {}
    for name, value in table.items():
        part, _, key = name.partition(".")
        parts.setdefault(part, {})[key] = value
    return Notes({part: _scaling(found, f"{where} ({part})") for part, found in parts.items()})


def _scaling(table: Mapping[str, Any], where: str) -> Scaling:
    kind, start = table.get("peft_type") or "LORA", str(table.get("init_lora_weights", ""))
    if kind != "LORA" or table.get("use_dora"):
        raise SourceError(f"{where}: it is of the kind {'DORA' if kind == 'LORA' else kind}; LORA alone can be fused")
    if start.startswith(_OTHER_BASE):
        raise SourceError(
            f"{where}: init_lora_weights is {start!r}, so it belongs to other weights than the model's own"
        )
    patterns = table.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(_LITERAL.match(str(end)) for end in patterns):
        raise SourceError(f"{where}: alpha_pattern is to name layers, with no regular expressions: {patterns!r:.200}")
    alphas = {str(end): _number(value, f"{where}: alpha of {end}") for end, value in patterns.items()}
    return Scaling(
        _number(table.get("lora_alpha"), f"{where}: lora_alpha"), alphas, bool(table.get("use_rslora")), where
    )


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SourceError(f"{what} is {value!r:.100}, and not a number")
    return float(value)
