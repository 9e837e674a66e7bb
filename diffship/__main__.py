"""`python -m diffship` is the `diffship` command."""

from __future__ import annotations

import sys

from diffship.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
