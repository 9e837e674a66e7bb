from __future__ import annotations

import sys
from pathlib import Path

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
pytest.importorskip("httpx")
# serve_toy, a served model that can be slow or held, and sampling_toy, the model of numpy runners
for room in ("runtimes/serve", "sampling"):
    sys.path.append(str(Path(__file__).parents[3] / room))
