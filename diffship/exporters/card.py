"""README.md of a bundle: the model card that hubs and people read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffship.core.atomic import write_file
from diffship.core.manifest import Manifest, Part


def write_card(manifest: Manifest, folder: Path, licence: Mapping[str, Any]) -> None:
    """README.md, and the licence texts that came with the source."""
    for notice in licence.get("notices", ()):
        write_file(folder / notice["file"], notice["text"])
    write_file(folder / "README.md", card_text(manifest))


def card_text(manifest: Manifest) -> str:
    """YAML header (licence, base model, tags), what the bundle is, and how each part was proved."""
    licence, source = manifest.licence, manifest.source
    header = {
        "license": licence.get("id") or ("other" if licence.get("name") else None),
        "license_name": licence.get("name") if not licence.get("id") else None,
        "license_link": licence.get("link"),
        "library_name": "diffship",
        "pipeline_tag": "text-to-image",
        "tags": [manifest.target, manifest.family.name, "diffship"],
    }
    lines = ["---", *(f"{key}: {json.dumps(value)}" for key, value in header.items() if value), "---", ""]
    name = source.get("id") or "a model"
    revision = f" at revision `{source['revision']}`" if source.get("revision") else ""
    lines += [f"# {name}, compiled for {manifest.target}", "", f"Made by diffship from `{name}`{revision}.", ""]
    if licence.get("restrictions"):
        lines += [f"Use restrictions carried from the source: {licence['restrictions']}", ""]
    lines += [
        "| part | precision | proof | max abs error | PSNR | source tensors (sha256) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [_row(part) for part in manifest.parts]
    commands = ["diffship verify .", 'diffship run . "a red apple" -o out/']
    return "\n".join([*lines, "", "```", *commands, "```", ""])


def _row(part: Part) -> str:
    proof = part.proof
    error, psnr = proof.get("max_abs"), proof.get("psnr_db")
    figures = ("-" if error is None else f"{error:.2g}", "-" if psnr is None else f"{psnr:.1f} dB")
    cells = (part.name, part.precision, str(proof["status"]), *figures, part.source_digest[:16])
    return f"| {' | '.join(cells)} |"
