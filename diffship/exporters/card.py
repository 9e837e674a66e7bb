"""README.md of a bundle: the model card that hubs and people read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffship.core.atomic import write_file
from diffship.core.manifest import Manifest, Part
from diffship.core.staging import clients_text
from diffship.models.card import front_matter_text, provenance, write_notices


def write_card(manifest: Manifest, folder: Path, licence: Mapping[str, Any]) -> None:
    """README.md, and the licence texts that came with the source."""
    write_notices(licence, folder)
    write_file(folder / "README.md", card_text(manifest))


def card_text(manifest: Manifest) -> str:
    """YAML header (licence, tags), what the bundle is, and how each part was proved."""
    fields = {
        "library_name": "diffship",
        "pipeline_tag": "text-to-image",
        "tags": [manifest.target, manifest.family.name, "diffship"],
    }
    lines = front_matter_text(manifest.licence, fields)
    name = manifest.source.get("id") or "a model"
    lines += [f"# {name}, compiled for {manifest.target}", "", *provenance(manifest.source, manifest.licence)]
    lines += [] if manifest.staging is None else [clients_text(manifest.staging), ""]
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
