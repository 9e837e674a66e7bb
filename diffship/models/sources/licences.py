"""The licence and use restrictions of a source: read once, carried into everything made from it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffship.core.lazy import lazy

yaml = lazy("yaml")  # comes with huggingface_hub

_TEXTS = ("license", "licence", "notice", "copying")
_MAX_BYTES, _MAX_FILES, _NAME_CHARS = 256 << 10, 8, 200
_AND = " AND "
# families of use-based restrictions; their text must go with every derivative (Attachment A, paragraph 4a and 5)
_PASS_ON = "its use-based restrictions bind every user and must be passed on"
_RESTRICTED = {
    "creativeml-openrail-m": f"CreativeML Open RAIL-M, Attachment A: {_PASS_ON}",
    "openrail++": f"Open RAIL++-M, Attachment A: {_PASS_ON}",
    "openrail": f"Open RAIL: {_PASS_ON}",
    "bigscience-openrail-m": f"BigScience Open RAIL-M, Attachment A: {_PASS_ON}",
    "stabilityai-ai-community": "Stability AI Community License: commercial use is limited by revenue",
    "faipl-1.0-sd": f"Fair AI Public License 1.0-SD: {_PASS_ON}",
    "playground-v2dot5-community": "Playground v2.5 Community License: commercial use is limited by monthly users",
    "sai-nc-community": "Stability AI Non-Commercial Community License: no commercial use",
}


def licence_of(folder: Path) -> dict[str, Any]:
    """id, name, link, restrictions and notices ({file, text}) from README.md's front matter and licence files."""
    fields = front_matter(_card(folder))
    identity, name = fields.get("license", ""), fields.get("license_name", "")
    found = [_restriction(one) for one in (*identity.split(_AND), name)]
    return {
        "id": identity,
        "name": name,
        "link": fields.get("license_link", ""),
        "restrictions": "; ".join(dict.fromkeys(text for text in found if text)),
        "notices": _notices(folder),
    }


def front_matter(text: str) -> dict[str, str]:
    """The YAML header of a model card: its texts, and its lists of texts as `a AND b`; empty if there is none, or
    it is no YAML."""
    lines = text.lstrip("\ufeff").splitlines()
    ends = [number for number, line in enumerate(lines) if line.strip() == "---"][:2]
    if len(ends) < 2 or ends[0] != 0:
        return {}
    try:
        table = yaml.safe_load("\n".join(lines[1 : ends[1]]))
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    fields = table.items() if isinstance(table, dict) else ()
    return {str(key): joined for key, value in fields if (joined := _joined(value))}


def _joined(value: object) -> str:
    texts = value if isinstance(value, list) else [value]
    return _AND.join(text.strip() for text in texts if isinstance(text, str))


def _restriction(name: str) -> str:
    told = _RESTRICTED.get(name.lower(), "")
    words = re.split(r"[^a-z]+", name.lower())
    return told or ("non-commercial use only" if "nc" in words or "noncommercial" in "".join(words) else "")


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
        "id": both("id", _AND),
        "name": both("name", _AND),
        "link": both("link", " "),
        "restrictions": both("restrictions", "; "),
        "notices": notices,
    }


def _notices(folder: Path) -> list[dict[str, str]]:
    files = [file for file in sorted(folder.iterdir()) if file.name.lower().startswith(_TEXTS)]
    found = [{"file": file.name, "text": _text(file)} for file in files[:_MAX_FILES]]
    return [notice for notice in found if notice["text"]]


def _card(folder: Path) -> str:
    """The beginning of README.md, under whatever letters it is written; a header is there or nowhere."""
    cards = sorted(path for path in folder.iterdir() if path.name.lower() == "readme.md" and path.is_file())
    if not cards:
        return ""
    with open(cards[0], "rb") as file:
        return file.read(_MAX_BYTES).decode("utf-8", "replace").replace("\r\n", "\n")


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _MAX_BYTES:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


def terms(metadata: Mapping[str, str]) -> dict[str, Any]:
    """id, name, link, restrictions and notices of a single file, as its header says them (ModelSpec's keys)."""
    name = metadata.get("modelspec.license", "").strip()[:_NAME_CHARS]
    identity = name.lower().replace(" ", "-")
    known = identity in _RESTRICTED
    return {
        "id": identity if known else "",
        "name": name,
        "link": "",
        "restrictions": _restriction(identity),
        "notices": [],
    }
