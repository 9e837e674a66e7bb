"""`python -m diffship.benchmarks`: see `publish.runner`, which a clone has and a wheel has not."""

from __future__ import annotations

from importlib.util import find_spec

from diffship.benchmarks.entry import enter
from diffship.core.errors import ConfigError


def main() -> int:
    """The runner; raises ConfigError if this installation has none."""
    if find_spec("diffship.benchmarks.publish") is None:
        raise ConfigError("a wheel holds no studies: run this in a clone of diffship. Your own models: diffship bench")
    from diffship.benchmarks.publish import runner

    return runner.main()


if __name__ == "__main__":
    enter(main)
