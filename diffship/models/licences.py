"""The licence and use restrictions of a source: read once, carried into everything made from it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TEXTS = ("license", "licence", "notice", "copying")
_MAX_BYTES, _MAX_FILES = 256 << 10, 8
# families of use-based restrictions; their text must go with every derivative (Attachment A, paragraph 4a and 5)
_PASS_ON = "its use-based restrictions bind every user and must be passed on"
_RESTRICTED = {
    "creativeml-openrail-m": f"CreativeML Open RAIL-M, Attachment A: {_PASS_ON}",
    "openrail++": f"Open RAIL++-M, Attachment A: {_PASS_ON}",
    "openrail": f"Open RAIL: {_PASS_ON}",
    "bigscience-openrail-m": f"BigScience Open RAIL-M, Attachment A: {_PASS_ON}",
    "stabilityai-ai-community": "Stability AI Community License: commercial use is limited by revenue",
    "sai-nc-community": "Stability AI Non-Commercial Community License: no commercial use",
}


def licence_of(folder: Path) -> dict[str, Any]:
    """id, name, link, restrictions and notices ({file, text}) from README.md's front matter and licence files."""
    fields = front_matter(_text(folder / "README.md"))
    identity = fields.get("license", "")
    name = fields.get("license_name", "")
    restrictions = _RESTRICTED.get(identity.lower()) or _RESTRICTED.get(name.lower(), "")
    if not restrictions and "-nc" in f"{identity}-{name}".lower():
        restrictions = "non-commercial use only"
    return {
        "id": identity,
        "name": name,
        "link": fields.get("license_link", ""),
        "restrictions": restrictions,
        "notices": _notices(folder),
    }


def front_matter(text: str) -> dict[str, str]:
    """The plain `key: value` lines between the two `---` lines that a model card starts with."""
    lines = text.lstrip("\ufeff").splitlines()
    if not lines or lines[0].strip() != "---":
        return {}
    fields: dict[str, str] = {}
    for line in lines[1:200]:
        if line.strip() == "---":
            return fields
        key, separator, value = line.partition(":")
        if separator and key == key.strip():
            fields[key] = value.strip().strip("\"'")
    return {}


def joined(own: Mapping[str, Any], base: Mapping[str, Any]) -> dict[str, Any]:
    """The terms of a model made of two sources: both licences, all restrictions, all notices."""

    def both(key: str, separator: str) -> str:
        values = dict.fromkeys(str(terms[key]) for terms in (own, base) if terms.get(key))
        return separator.join(values)

    notices = list(own.get("notices", ()))
    names = {notice["file"] for notice in notices}
    for notice in base.get("notices", ()):
        if notice["file"] in names:
            notice = {**notice, "file": f"BASE-{notice['file']}"}
        notices.append(notice)
    return {
        "id": both("id", " AND "),
        "name": both("name", " AND "),
        "link": both("link", " "),
        "restrictions": both("restrictions", "; "),
        "notices": notices,
    }


def _notices(folder: Path) -> list[dict[str, str]]:
    files = [file for file in sorted(folder.iterdir()) if file.name.lower().startswith(_TEXTS)]
    found = [{"file": file.name, "text": _text(file)} for file in files[:_MAX_FILES]]
    return [notice for notice in found if notice["text"]]


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")
