"""Model cards: the front matter that hubs read, and what was done to a model, from its history."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffship.core.atomic import write_file
from diffship.models.reduced.widths import KEY

if TYPE_CHECKING:
    from diffship.models.pipeline import Pipeline

_CELL = 60  # characters of one option in the table
_COUNTS = ("parameters_before", "parameters")


def write_card(pipeline: Pipeline, folder: Path) -> None:
    """README.md of a diffusers folder, and the licence texts that came with the source."""
    write_notices(pipeline.licence, folder)
    write_file(folder / "README.md", card_text(pipeline))


def write_notices(licence: Mapping[str, Any], folder: Path) -> None:
    """LICENSE and NOTICE texts of the source, under the names that they had."""
    for notice in licence.get("notices", ()):
        write_file(folder / notice["file"], notice["text"])


def front_matter_text(licence: Mapping[str, Any], fields: Mapping[str, Any]) -> list[str]:
    """Lines of a card's YAML header: the licence as hubs spell it (`other` if it only has a name), then `fields`."""
    identity, name = licence.get("id") or "", licence.get("name") or ""
    header = {
        "license": identity or ("other" if name else None),
        "license_name": name if identity in ("", "other") else None,
        "license_link": licence.get("link"),
        **fields,
    }
    return ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items() if value), "---", ""]


def provenance(source: Mapping[str, Any], licence: Mapping[str, Any]) -> list[str]:
    """Where a model came from, and the use restrictions that came with it."""
    name = source.get("id") or "a model"
    revision = f" at revision `{source['revision']}`" if source.get("revision") else ""
    base = source.get("base") or {}
    parts = f", with parts of `{base['id']}`" if base.get("id") else ""
    lines = [f"Made by diffship from `{name}`{revision}{parts}.", ""]
    for text in source.get("notes", ()):
        lines += [f"{text[0].upper()}{text[1:]}.", ""]
    if licence.get("restrictions"):
        lines += [f"Use restrictions carried from the source: {licence['restrictions']}", ""]
    return lines


def card_text(pipeline: Pipeline) -> str:
    """YAML header, where the model came from, what was done to it, and how it is used."""
    source, history = pipeline.source, pipeline.history
    name = source.get("id") or "a model"
    fields = {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["diffship", pipeline.family.name],
        "base_model": name if source.get("kind") == "hub" or source.get("revision") else None,
    }
    lines = front_matter_text(pipeline.licence, fields)
    lines += [f"# {name}, compressed" if history else f"# {name}", "", *provenance(source, pipeline.licence)]
    if history:
        head = ("pass", "options and findings", "U-Net parameters before", "after")
        lines += ["## What was done", "", _row(head), _row(["---"] * 4), *map(_entry_row, history), ""]
    if KEY in pipeline.denoiser.config:
        lines += [
            f"Inner widths of the U-Net lie under `{KEY}` in `{pipeline.denoiser.name}/config.json`: stock diffusers "
            "cannot load it.",
            "",
        ]
    if KEY in pipeline.decoder.config:
        lines += [f"Widths of the decoder lie under `{KEY}` in `vae/config.json`: stock diffusers cannot load it.", ""]
    commands = ["diffship export . --to onnx -o onnx", 'diffship run onnx "..." -o pictures/']
    return "\n".join([*lines, "```", *commands, "```", ""])


def _entry_row(entry: Mapping[str, Any]) -> str:
    rest = {key: value for key, value in entry.items() if key not in ("pass", *_COUNTS) and value is not None}
    said = "; ".join(f"{key} {_short(value)}" for key, value in rest.items())
    before, after = (f"{entry[key]:,}" if isinstance(entry.get(key), int) else "-" for key in _COUNTS)
    return _row((str(entry.get("pass", "?")), said or "-", before, after))


def _short(value: object) -> str:
    """A value as the table shows it; the whole of it is in model_index.json."""
    text = value if isinstance(value, str) else json.dumps(value)
    if len(text) > _CELL and isinstance(value, (Mapping, list, tuple)):
        return f"({len(value)} entries)"
    return text if len(text) <= _CELL else f"{text[: _CELL - 3]}..."


def _row(cells: tuple[str, ...] | list[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|').replace(chr(10), ' ') for cell in cells)} |"
