from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "sampling"))  # sampling_toy, the model of numpy runners

_MISSING = [name for name in ("fastapi", "uvicorn", "httpx") if importlib.util.find_spec(name) is None]
_PURE = ("test_serve_batcher.py", "test_serve_forms.py")  # what needs nothing of the extra
collect_ignore = [file.name for file in Path(__file__).parent.glob("test_*.py") if _MISSING and file.name not in _PURE]
