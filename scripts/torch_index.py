"""Where to install torch from so that no CUDA packages come along; prints the pip arguments, and on stderr the choice.

python scripts/torch_index.py [auto | pypi | URL]
"""

from __future__ import annotations

import sys
import urllib.request

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 3.0


def reachable(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=PROBE_SECONDS) as answer:
            return bool(answer.status == 200)
    except (OSError, ValueError):
        return False


def choose(asked: str) -> tuple[list[str], str]:
    """(pip arguments, why). macOS and Windows wheels on PyPI hold no CUDA; Linux ones pull gigabytes of it."""
    if asked == "pypi":
        return [], "torch comes from pip's own index, as asked"
    if asked != "auto":
        return ["--index-url", asked], f"torch comes from {asked}, as asked"
    if not sys.platform.startswith("linux"):
        return [], "torch comes from pip's own index: its wheels for this system are CPU (or Metal) builds"
    if reachable(CPU_INDEX):
        return ["--index-url", CPU_INDEX], f"torch comes from {CPU_INDEX} (CPU build); TORCH_INDEX=pypi for CUDA"
    return [], f"{CPU_INDEX} cannot be reached: torch comes from pip's own index, which may bring CUDA packages"


if __name__ == "__main__":
    arguments, reason = choose(sys.argv[1] if len(sys.argv) > 1 else "auto")
    print(reason, file=sys.stderr)
    print(" ".join(arguments))
