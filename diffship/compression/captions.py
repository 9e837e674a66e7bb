"""Prompts that layers are scored with: a built-in list, or a file with one a line."""

from __future__ import annotations

from pathlib import Path

from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.core.lines import prompt_lines
from diffship.sampling.tokenizer import check_prompt

# Fifty short captions: things that `emoji` was trained on and that every text-to-image model knows.
CAPTIONS = (
    *("red apple", "green apple", "banana", "strawberry", "pineapple", "watermelon", "cherries", "avocado", "carrot"),
    *("mushroom", "broccoli", "pizza", "hamburger", "french fries", "birthday cake", "doughnut", "ice cream"),
    *("popcorn", "croissant", "pancakes", "tulip", "sunflower", "rose", "cactus", "palm tree", "evergreen tree"),
    *("maple leaf", "black cat", "dog face", "frog", "octopus", "penguin", "elephant", "giraffe", "lion", "zebra"),
    *("butterfly", "lady beetle", "shark", "parrot", "owl", "snail", "red heart", "blue heart", "grinning face"),
    *("crying face", "robot", "ghost", "man astronaut", "woman farmer"),
)


def read_captions(path: str | Path) -> tuple[str, ...]:
    """The prompts of a UTF-8 text file, one a line; empty lines and comments (`# ...`) are passed over.

    Raises:
        ConfigError: no such file, too large, not UTF-8, no prompt, or a prompt that is too long (its line is named).
    """
    try:
        with open(path, "rb") as file:
            raw = file.read(LIMITS.manifest_bytes + 1)
        text = raw.decode("utf-8-sig")
    except OSError as fault:
        raise ConfigError(f"prompts: {path} cannot be read: {fault.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"prompts: {path} is not UTF-8 text") from None
    if len(raw) > LIMITS.manifest_bytes:
        raise ConfigError(f"prompts: {path} is larger than {LIMITS.manifest_bytes} bytes")
    found, _ = prompt_lines(text)
    for number, line in found:
        check_prompt(line, f"prompts: {path}, line {number}")
    if not found:
        raise ConfigError(f"prompts: {path} has none; write one a line")
    return tuple(line for _, line in found)
