"""What the commands `python -m diffship.benchmarks.NAME` share: how they end, and where they look for what is named."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from diffship.core.errors import DiffshipError
from diffship.core.outcome import outcome
from diffship.core.streams import prepare

BUNDLES = Path("out")  # where README and `make demo` put them
EXPERIMENTS = Path("benchmarks") / "experiments"


def enter(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` and leave with its exit code; an expected error is one line on stderr, as of the verbs."""
    name = Path(sys.argv[0]).stem.replace("__main__", "diffship.benchmarks")
    prepare()
    try:
        code = main() or 0
    except (DiffshipError, OSError) as fault:
        _, message, code = outcome(fault)
        print(f"{name}: {message.strip()}", file=sys.stderr)
    raise SystemExit(code)


def named_bundle(text: str) -> Path:
    """A bundle's folder; results record its name alone, which is also found in `out`."""
    return _nearby(Path(text), BUNDLES)


def named_experiment(text: str) -> Path:
    """An experiment's file; results record its name alone, which is also found in `benchmarks/experiments`."""
    return _nearby(Path(text), EXPERIMENTS)


def _nearby(path: Path, folder: Path) -> Path:
    bare = path == Path(path.name)
    return folder / path if bare and not path.exists() and (folder / path).exists() else path
