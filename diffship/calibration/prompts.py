"""Prompts that ranges are measured with: a built-in set, or a file with one a line."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

from diffship.core.errors import ConfigError
from diffship.core.limits import LIMITS
from diffship.core.lines import prompt_lines
from diffship.sampling.tokenizer import check_prompt

_THINGS = (
    *("red apple", "black cat", "old lighthouse", "crowded market", "woman with silver hair", "steam locomotive"),
    *("bowl of noodles", "snowy mountain", "robot that plays chess", "child on a swing", "glass of water", "red fox"),
    *("violin on a chair", "city street in the rain", "sunflower", "desert with dunes", "astronaut", "wooden bridge"),
    *("stack of books", "jellyfish", "medieval castle", "two dancers", "green parrot", "birthday cake", "empty room"),
    *("sailing ship in a storm", "bicycle against a brick wall"),
)
_FORMS = (
    *("{}", "a photograph of a {}", "an oil painting of a {}", "a pencil drawing of a {}", "a {} made of glass"),
    *("a {}, studio lighting, plain white background", "a close-up of a {}, shallow depth of field"),
    *("a {} at night, neon lights", "a {} in the style of a woodblock print", "isometric 3d render of a {}"),
    "a wide view of a {} under a cloudy sky, muted colours, highly detailed, sharp focus",
)


def built_in() -> tuple[str, ...]:
    """Every thing in every form, 297 prompts, in an order in which any first few differ in both.

    The numbers of things and of forms have no common divisor, so that counting both at once meets every pair.
    """
    count = len(_THINGS) * len(_FORMS)
    return tuple(_FORMS[i % len(_FORMS)].format(_THINGS[i % len(_THINGS)]) for i in range(count))


def chosen(path: str | Path | None, samples: int) -> tuple[str, ...]:
    """The first `samples` prompts of a file, or of the built-in set if `path` is None.

    Raises:
        ConfigError: the file cannot be read (`read_captions`), or there are fewer.
    """
    known = built_in() if path is None else read_captions(path)
    if len(known) < samples:
        where = "the built-in set" if path is None else str(path)
        raise ConfigError(
            f"{where} has {len(known)} prompts; {samples} samples need as many. Use --samples {len(known)}"
        )
    return tuple(islice(known, samples))


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
