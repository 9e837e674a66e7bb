"""Text from elsewhere, made safe to print: control characters are shown as escapes, so that a terminal does not obey
them."""

from __future__ import annotations

import re

# C0 but for tab and newline, DEL and C1, line and paragraph separators, and what turns the direction of writing
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """`text` with control characters, but for tab and newline, written as Python writes them: `\\x1b`, `\\u202e`."""
    return _ACTS.sub(lambda found: ascii(found[0])[1:-1], text)
