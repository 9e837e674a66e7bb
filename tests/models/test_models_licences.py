"""Model cards as people write them: the licence, and what it asks of whoever passes the model on."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffship.models.sources.licences import licence_of

RAIL = "creativeml-openrail-m"
CARDS = {
    "plain": (f"---\nlicense: {RAIL}\n---\n", RAIL, "Attachment A"),
    "a list": (f"---\nlicense:\n- mit\n- {RAIL}\n---\n", f"mit AND {RAIL}", "Attachment A"),
    "a list in a line": (f"---\nlicense: [{RAIL}]\n---\n", RAIL, "Attachment A"),
    "a comment": ("---\nlicense: openrail++ # of SDXL\n---\n", "openrail++", "Open RAIL\\+\\+-M"),
    "a mark and other ends of lines": (f"\ufeff---\r\nlicense: {RAIL}\r\n---\r\n", RAIL, "Attachment A"),
    "capitals": ("---\nlicense: CreativeML-OpenRAIL-M\n---\n", "CreativeML-OpenRAIL-M", "Attachment A"),
    "a long card": (f"---\nlicense: {RAIL}\n---\n{'x' * 300_000}", RAIL, "Attachment A"),
    "a name": ("---\nlicense: other\nlicense_name: faipl-1.0-sd\n---\n", "other", "Fair AI"),
    "not commercial": (
        "---\nlicense: other\nlicense_name: x-non-commercial-license\n---\n",
        "other",
        "non-commercial use",
    ),
    "nc": ("---\nlicense: cc-by-nc-4.0\n---\n", "cc-by-nc-4.0", "non-commercial use"),
    "no licence": ("# a model\n---\nlicense: mit\n---\n", "", "^$"),
    "no YAML": ("---\nlicense: [\n---\n", "", "^$"),
    "free": ("---\nlicense: mit\ntags: [a]\nmodel-index: 5\n---\n", "mit", "^$"),
}


@pytest.mark.parametrize("case", CARDS)
def test_a_licence_is_read_in_every_form(case: str, tmp_path: Path) -> None:
    text, identity, restriction = CARDS[case]
    (tmp_path / "readme.MD").write_text(text, encoding="utf-8", newline="")
    found = licence_of(tmp_path)
    assert found["id"] == identity
    assert re.search(restriction, found["restrictions"]), found["restrictions"]


def test_a_link_over_two_lines_is_whole(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_link: >-\n  https://example.org/x\n---\n")
    assert licence_of(tmp_path)["link"] == "https://example.org/x"
