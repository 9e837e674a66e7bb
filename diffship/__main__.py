"""`python -m diffship` is the `diffship` command."""

from __future__ import annotations

from typing import NoReturn

from diffship.cli.main import main
from diffship.core.distributed import end


def command() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    end(main())


if __name__ == "__main__":
    command()
