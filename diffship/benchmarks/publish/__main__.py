"""`python -m diffship.benchmarks.publish`: see `pages`."""

from __future__ import annotations

from diffship.benchmarks.publish.pages import main

if __name__ == "__main__":
    raise SystemExit(main())
