from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "sampling"))  # sampling_toy, whose scheduler these tests step with
