"""Prompts of a command line: words, and files or pipes with one a line."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import BinaryIO

from diffship.cli.progress import note
from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.core.lines import prompt_lines

MAX_PROMPTS = 256
STDIN = Path("-")
_BYTES = 4 * MAX_PROMPTS * LIMITS.prompt_chars


def read_prompts(options: argparse.Namespace) -> list[str]:
    """Prompts of the command line, then those of the file, without comments and blank lines.

    Raises:
        ConfigError: there is none, there are too many, or the file is missing, too long or not UTF-8.
    """
    prompts = list(options.prompts)
    if options.prompts_file is not None:
        prompts += _prompts_of(options.prompts_file, options.quiet)
    if not prompts:
        raise ConfigError(
            "no prompt is given; the bundle comes first: diffship run DIR PROMPT... or --prompts-file FILE "
            "(a prompt that begins with a dash stands behind --)"
        )
    if len(prompts) > MAX_PROMPTS:
        raise ConfigError(f"{len(prompts)} prompts; legal is 1 to {MAX_PROMPTS}: PROMPT... or --prompts-file FILE")
    return prompts


def _prompts_of(file: Path, quiet: bool) -> list[str]:
    try:
        text = _bytes_of(file).decode("utf-8-sig")  # some editors put a mark before the text
    except UnicodeDecodeError as fault:
        raise ConfigError(f"--prompts-file {str(file)!r} is not UTF-8: {fault.reason} at byte {fault.start}") from None
    prompts, comments = prompt_lines(text)
    if comments:
        told = "1 line is a comment" if comments == 1 else f"{comments} lines are comments"
        note(f"{file}: {'1 prompt' if len(prompts) == 1 else f'{len(prompts)} prompts'}; {told}", quiet)
    return [prompt for _, prompt in prompts]


def _bytes_of(file: Path) -> bytes:
    """What the file or pipe holds, or stdin for `-`; never more than prompts can be."""
    try:
        if file == STDIN:
            data = _bounded(sys.stdin.buffer)
        else:
            with open(file, "rb") as stream:
                data = _bounded(stream)
    except (OSError, AttributeError, ValueError) as fault:  # stdin may be None or closed
        reason = getattr(fault, "strerror", None) or "there is nothing to read"
        raise ConfigError(f"--prompts-file {str(file)!r} is not a file, a pipe or -: {reason}") from None
    if len(data) > _BYTES:
        raise ConfigError(f"--prompts-file {str(file)!r} is longer than {MAX_PROMPTS} prompts can be")
    return data


def _bounded(stream: BinaryIO) -> bytes:
    return stream.read(_BYTES + 1)
