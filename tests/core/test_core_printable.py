"""Text of others, as it may stand on a terminal."""

from __future__ import annotations

import unicodedata

from diffship.core.printable import printable


def test_what_acts_on_a_terminal_is_shown_instead() -> None:
    assert printable("\x1b]0;owned\x07\x1b[2Jred\r\n\tapple") == r"\x1b]0;owned\x07\x1b[2Jred\r" + "\n\tapple"
    assert printable("\x9b31m \x7f \u202etxt.exe \u2028") == r"\x9b31m \x7f \u202etxt.exe \u2028"


def test_text_of_every_script_stays_as_it_is() -> None:
    """All but control characters, separators of lines and what turns the direction of writing."""
    for code in (*range(0x3000), *range(0xFE00, 0x10000), *range(0x1F300, 0x1FA00), *range(0xE0000, 0xE0080)):
        letter = chr(code)
        acts = unicodedata.category(letter) in ("Cc", "Zl", "Zp") or unicodedata.bidirectional(letter) in (
            *("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"),
        )
        assert (printable(letter) == letter) == (letter in "\t\n" or not acts), hex(code)
