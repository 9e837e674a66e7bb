"""Text files with one prompt or caption a line, as editors write them."""

from __future__ import annotations

import re

_END = re.compile(r"\r\n|\r|\n")
_COMMENT = re.compile(r"#(\s|#|\Z)")  # "# words" and "##"; "#1 fan" is a prompt


def lines_of(text: str) -> list[str]:
    """Lines without their ends. What Unicode alone calls one (U+2028, U+0085, form feed) is part of a line: it stands
    in prompts that were copied from web pages."""
    return _END.split(text)


def prompt_lines(text: str) -> tuple[list[tuple[int, str]], int]:
    """(number of the line, prompt) of every line but blank ones and comments, and how many comments there are."""
    written = [(number, line.strip()) for number, line in enumerate(lines_of(text), 1) if line.strip()]
    prompts = [(number, line) for number, line in written if not _COMMENT.match(line)]
    return prompts, len(written) - len(prompts)
