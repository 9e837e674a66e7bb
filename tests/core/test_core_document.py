"""Documents are read whole, bounded, and are tables."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffship.core.document import read_json, read_toml
from diffship.core.errors import ConfigError, SourceError


def test_documents(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": [1, "\u00e9"]}', encoding="utf-8")
    (tmp_path / "a.toml").write_text('a = [1, "\u00e9"]', encoding="utf-8")
    size = (tmp_path / "a.json").stat().st_size
    assert read_json(tmp_path / "a.json", size) == {"a": [1, "\u00e9"]} == read_toml(str(tmp_path / "a.toml"), 100)
    with pytest.raises(SourceError, match=rf"a\.json is too large: at most {size - 1} bytes are read"):
        read_json(tmp_path / "a.json", size - 1, SourceError)


@pytest.mark.parametrize(
    ("content", "said"),
    [(b"{", "is not JSON"), (b'"\xff"', "is not JSON"), (b"[" * 9999, "is not JSON"), (b"[]", "holds a list")],
)
def test_what_is_no_table(content: bytes, said: str, tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(ConfigError, match=said):
        read_json(tmp_path / "x", 1 << 20)


def test_what_cannot_be_read(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="cannot be read: "):
            read_toml(path, 1 << 20)
    (tmp_path / "x").write_bytes(b"a = ")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_toml(tmp_path / "x", 1 << 20)
