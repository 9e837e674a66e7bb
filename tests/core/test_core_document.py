"""Documents are read whole, bounded, and are tables."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from diffship.core import document
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


def test_a_mark_before_the_text_is_no_part_of_it(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": 1}')
    (tmp_path / "a.toml").write_bytes(b"\xef\xbb\xbfa = 1\r\n")
    assert read_json(tmp_path / "a.json", 100) == {"a": 1} == read_toml(tmp_path / "a.toml", 100)


def test_a_pipe_is_read_to_its_end_and_not_waited_for_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, text = tmp_path / "x", b'{"a": "' + b"b" * 200_000 + b'"}'
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(text,))
    writer.start()
    assert read_json(pipe, 1 << 20)["a"] == "b" * 200_000
    writer.join(10)
    monkeypatch.setattr(document, "PIPE_SECONDS", 0.05)
    with pytest.raises(ConfigError, match="cannot be read: nothing came through this pipe"):
        read_json(pipe, 1 << 20)


def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "x").symlink_to("/dev/zero")
    with pytest.raises(ConfigError, match="cannot be read: it is neither a file nor a pipe"):
        read_json(tmp_path / "x", 100)
