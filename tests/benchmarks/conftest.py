from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

sys.path.append(str(Path(__file__).parents[1] / "sampling"))  # sampling_toy, the model of numpy runners


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures in the form of `diffship train emoji-data`: colour planes, which the judge will not recognise."""
    folder = tmp_path_factory.mktemp("pictures")
    records = []
    for number, concept in enumerate(("red apple", "black cat", "pizza", "blue heart")):
        Image.new("RGB", (128, 128), (60 * number, 200, 90)).save(folder / f"{number}.png")
        shared = {"file_name": f"{number}.png", "text": concept, "concept": concept, "style": "fluent", "tags": []}
        records.append({**shared, "domain": True, "tone": "", "split": "held_out" if number == 3 else "train"})
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metadata.jsonl").write_text(lines, encoding="utf-8")
    return folder
