"""The `emoji` data set: Fluent 3D pictures with the captions of emojibase, as a folder of images and `metadata.jsonl`.

Sources (all MIT): npm `@lobehub/fluent-emoji-3d` (pictures), `emojibase-data` (labels, tags, skin tones) and
`emoji-datasource-google` (a second drawing style: for the judge, and for a LoRA of that style).
"""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffship.training.diffusion import caption_variants
from diffship.training.judge import style_held_out

SIZE = 128
GROUPS = ("smileys", "people", "component", "animals", "food", "travel", "activities", "objects", "symbols", "flags")
DOMAIN_GROUPS = ("smileys", "animals", "food")
# People whose skin tones the model learns; the rest of that group stays out of the stated domain.
DOMAIN_PEOPLE = (
    "waving hand",
    "raised hand",
    "OK hand",
    "victory hand",
    "thumbs up",
    "thumbs down",
    "raised fist",
    "clapping hands",
    "folded hands",
    "flexed biceps",
    "ear",
    "nose",
    "baby",
    "boy",
    "girl",
    "man",
    "woman",
    "man: beard",
    "old man",
    "old woman",
    "woman cook",
    "man cook",
    "woman pilot",
    "man pilot",
    "man farmer",
    "woman scientist",
    "man artist",
    "woman singer",
    "man police officer",
    "man astronaut",
    "prince",
    "princess",
    "Santa Claus",
    "woman with headscarf",
)
HELD_OUT_SHARE = 0.1


Entry = dict[str, Any]


@dataclass(frozen=True)
class Record:
    """One picture: `split` is `train` or `held_out` (a skin-tone combination the model must never see)."""

    file_name: str
    text: str
    tags: tuple[str, ...]
    concept: str
    group: str
    tone: int
    domain: bool
    split: str
    style: str = "fluent"


def prepare(fluent: Path, labels: Path, folder: Path, google: Path | None = None, size: int = SIZE) -> int:
    """Write the data set from the three npm archives (`npm pack NAME`); returns the number of pictures.

    Pictures are `size` px RGB on a white ground. Held-out skin-tone combinations are drawn once by a fixed seed. The
    folder `google` in it is also one that a LoRA of that style is trained on.
    """
    entries = list(_entries(json.loads(_member(labels, "en/data.json"))))
    held_out = _held_out(entries)
    records = []
    for style, archive in (("fluent", fluent), ("google", google)):
        if archive is None:
            continue
        (folder / style).mkdir(parents=True, exist_ok=True)
        for code, data in _pictures(archive, style):
            found = next((entry for entry in entries if entry[0] == code), None)
            if found is None:
                continue
            name = f"{style}/{code.lower()}.png"
            _on_white(data, size).save(folder / name)
            split = "held_out" if code in held_out else "train"
            records.append(_record(found, name, split, style))
    records.sort(key=lambda record: record.file_name)
    _write_table(folder, [asdict(record) for record in records])
    if google is not None:
        _write_table(folder / "google", [_captioned(record) for record in records if _teaches_style(record)])
    return len(records)


def _teaches_style(record: Record) -> bool:
    """The second style of the domain, but for that fifth of the concepts of which the judge has not seen it either."""
    seen = record.split == "train" and not style_held_out(record.concept)
    return record.style == "google" and record.domain and seen


def _captioned(record: Record) -> dict[str, Any]:
    """The row of a folder of pictures with captions; every caption is one way to describe the picture."""
    return {"file_name": Path(record.file_name).name, "text": caption_variants(record.text, record.tags)}


def _write_table(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")


def _entries(data: list[Entry]) -> Iterator[tuple[str, Entry, Entry]]:
    """(code, the entry itself, its base entry), skins included; codes without variation selectors."""
    for base in data:
        for entry in (base, *base.get("skins", ())):
            yield _code(entry["hexcode"]), entry, base


def _code(hexcode: str) -> str:
    return "-".join(part for part in hexcode.upper().split("-") if part != "FE0F")


def _tone(entry: Entry) -> int:
    tone = entry.get("tone", 0)
    return tone if isinstance(tone, int) else tone[0]


def _held_out(entries: list[tuple[str, Entry, Entry]]) -> set[str]:
    """A tenth of the skin-tone combinations, drawn apart inside and outside the stated domain."""
    draw = random.Random(2026)
    chosen: set[str] = set()
    for inside in (True, False):
        codes = sorted(code for code, entry, base in entries if _tone(entry) and _in_domain(base) == inside)
        chosen.update(draw.sample(codes, round(len(codes) * HELD_OUT_SHARE)))
    return chosen


def _in_domain(base: Entry) -> bool:
    return _group(base) in DOMAIN_GROUPS or base["label"] in DOMAIN_PEOPLE


def _group(base: Entry) -> str:
    return GROUPS[base["group"]] if "group" in base else "component"


def _record(found: tuple[str, Entry, Entry], name: str, split: str, style: str) -> Record:
    _, entry, base = found
    return Record(
        file_name=name,
        text=entry["label"].lower(),
        tags=tuple(tag.lower() for tag in base.get("tags", ())),
        concept=base["label"].lower(),
        group=_group(base),
        tone=_tone(entry),
        domain=_in_domain(base),
        split=split,
        style=style,
    )


def _pictures(archive: Path, style: str) -> Iterator[tuple[str, bytes]]:
    folder = {"fluent": "package/assets/", "google": "package/img/google/64/"}[style]
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            stem, _, ending = member.name.removeprefix(folder).partition(".")
            if member.isfile() and member.name.startswith(folder) and ending in ("webp", "png"):
                opened = tar.extractfile(member)
                if opened is not None:
                    yield _code(stem), opened.read()


def _member(archive: Path, name: str) -> bytes:
    with tarfile.open(archive, "r:gz") as tar:
        opened = tar.extractfile(f"package/{name}")
        if opened is None:
            raise FileNotFoundError(f"{archive} has no {name}")
        return opened.read()


def _on_white(data: bytes, size: int) -> Image.Image:
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture).convert("RGB").resize((size, size), Image.Resampling.LANCZOS)
