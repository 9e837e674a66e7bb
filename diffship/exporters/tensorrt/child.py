"""The process that builds one engine: `python -m diffship.exporters.tensorrt.child ORDER`, ORDER as JSON.

A process of its own, because a builder takes gigabytes that it does not give back, and may die. It prints JSON lines:
progress, and at last what it made or why not. Other lines are the library's.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from diffship.core.child import kinds
from diffship.core.errors import ConfigError, DiffshipError
from diffship.core.strict import load
from diffship.exporters.tensorrt.build import Order, build


def main(words: Sequence[str]) -> int:
    """Exit code; an expected error is a line like the others."""
    try:
        if len(words) != 1:
            raise ConfigError("usage: python -m diffship.exporters.tensorrt.child ORDER")
        _say({"made": build(load(Order, json.loads(words[0]), "order"), _say)})
    except DiffshipError as fault:
        _say({"fault": str(fault), "kinds": kinds(fault)})
        return fault.exit_code
    return 0


def _say(document: dict[str, Any]) -> None:
    print("\n" + json.dumps(document), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
