"""How strongly a LoRA changes its layers if its file has no alphas: what peft and diffusers note beside it.

peft scales by alpha / rank, or by alpha / sqrt(rank) with `use_rslora` (Kalajdzievski, arXiv 2312.03732, eq. 5), and
keeps alpha apart from the tensors: in `adapter_config.json`, or in the header of a file that diffusers wrote. Who takes
alpha for the rank then is wrong by their ratio: eight times with the defaults of LCM-LoRA's training (64 and 8).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffship.core.document import read_json
from diffship.core.errors import SourceError
from diffship.core.limits import LIMITS

ADAPTER = "adapter_config.json"
METADATA = "lora_adapter_metadata"
PEFT = "base_model.model."  # what the keys of peft's own files begin with
TEXT_LEVEL = "text_model."  # transformers 5 leaves this level of names out
_LITERAL = re.compile(r"\^?[\w.\-]+\Z")
# Beginnings that leave the model's own weights alone. Others change them: pissa, olora, corda, loftq, lora_ga.
_OWN_BASE = ("true", "false", "none", "gaussian", "eva", "orthogonal", "mica")
# What peft's config says without a say in what a fused LoRA computes.
_HARMLESS = {
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "r", "target_modules", "exclude_modules", "lora_alpha", "lora_dropout", "use_rslora"),
    *("init_lora_weights", "layers_to_transform", "layers_pattern", "rank_pattern", "alpha_pattern", "use_dora"),
    *("megatron_core", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config"),
    *("qalora_group_size", "runtime_config", "ensure_weight_tying"),
}


@dataclass(frozen=True)
class Scaling:
    """alpha: of every layer that `patterns` does not name; these are ends of layer names, or whole ones behind a `^`,
    and the first that fits counts. root: whether the square root of the rank is divided by. where: the place that says
    so. ranks: the rank of the layers that a pattern names, and of all others under `""`; empty if none is said."""

    alpha: float
    patterns: Mapping[str, float]
    root: bool
    where: str
    ranks: Mapping[str, float] = field(default_factory=dict)

    def of(self, layer: str, rank: int) -> float:
        """The factor of `up @ down` of this layer.

        Raises:
            SourceError: the layer has another rank than is noted, so the notes are those of another file.
        """
        noted = next((value for name, value in self.ranks.items() if name and _fits(name, layer)), self.ranks.get(""))
        if noted is not None and noted != rank:
            raise SourceError(
                f"{self.where}: says rank {noted:g} for {layer}, whose tensors have rank {rank}; is it of another file?"
            )
        named = (value for name, value in self.patterns.items() if _fits(name, layer))
        return next(named, self.alpha) / (math.sqrt(rank) if self.root else rank)

    def idle(self, layers: Iterable[str]) -> list[str]:
        """Patterns that name none of `layers`."""
        known = list(layers)
        return [name for name in self.patterns if not any(_fits(name, layer) for layer in known)]


def _fits(name: str, layer: str) -> bool:
    """As peft matches it, for names without other regular expressions."""
    if name.startswith("^"):
        return name[1:] in (layer, layer.removeprefix(TEXT_LEVEL))
    return f".{layer}".endswith(f".{name}")


@dataclass(frozen=True)
class Notes:
    """The scalings of one file: of each part, or of all (`""`); none if nothing is noted, and the rank is alpha."""

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
    """peft's config beside a LoRA file, or None if there is none."""
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
    kind, start = table.get("peft_type") or "LORA", str(table.get("init_lora_weights"))
    if kind != "LORA" or table.get("use_dora"):
        raise SourceError(f"{where}: it is of the kind {'DORA' if kind == 'LORA' else kind}; LORA alone can be fused")
    if start.lower() not in _OWN_BASE:
        raise SourceError(
            f"{where}: init_lora_weights is {start[:80]!r}, so it belongs to other weights than the model's own: that "
            "beginning changed them. Save it with peft's path_initial_model_for_weight_conversion, and give that file"
        )
    odd = [str(key) for key, value in table.items() if key not in _HARMLESS and value and value != "none"]
    if odd:
        raise SourceError(f"{where}: {', '.join(odd)[:200]}: plain LoRA alone can be fused; merge it with peft")
    patterns = table.get("alpha_pattern") or {}
    if not isinstance(patterns, dict) or not all(_LITERAL.match(str(end)) for end in patterns):
        raise SourceError(f"{where}: alpha_pattern is to name layers, with no regular expressions: {patterns!r:.200}")
    alphas = {str(end): _number(value, f"{where}: alpha of {end}") for end, value in patterns.items()}
    return Scaling(
        _number(table.get("lora_alpha"), f"{where}: lora_alpha"),
        alphas,
        bool(table.get("use_rslora")),
        where,
        _ranks(table, where),
    )


def _ranks(table: Mapping[str, Any], where: str) -> dict[str, float]:
    patterns = table.get("rank_pattern") or {}
    if table.get("r") is None or not isinstance(patterns, dict) or not all(map(_LITERAL.match, map(str, patterns))):
        return {}
    return {str(name): _number(rank, f"{where}: rank") for name, rank in {**patterns, "": table["r"]}.items()}


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SourceError(f"{what} is {value!r:.100}, and not a number")
    return float(value)
