"""Write diffship/models/emoji/onnx: the proved bundle of `emoji` without its weights. Run after `train emoji-pack`.

python scripts/prepare_emoji.py
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from diffship.export import export
from diffship.exporters.onnx.prepared import restore, strip

HOME = Path(__file__).resolve().parents[1] / "diffship" / "models" / "emoji"


def main() -> None:
    with tempfile.TemporaryDirectory() as work:
        bundle = export("emoji", out=Path(work) / "emoji")
        stripped = Path(work) / "onnx"
        strip(bundle, stripped)
        restore(stripped, HOME, Path(work) / "again").verify()
        shutil.rmtree(HOME / "onnx", ignore_errors=True)
        shutil.copytree(stripped, HOME / "onnx")
    print(f"{HOME / 'onnx'}: {sum(file.stat().st_size for file in (HOME / 'onnx').rglob('*') if file.is_file())} bytes")


if __name__ == "__main__":
    main()
