"""Layouts of full size: which there are, and what a row says of an export that failed."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffship.benchmarks.measure.process import Measured
from diffship.benchmarks.studies.cost import layout_export
from diffship.benchmarks.studies.cost.layout_export import SOURCES, chosen, rows_of
from diffship.core.errors import ConfigError
from diffship.models.reduced.layouts import LAYOUTS
from diffship.models.sources.arch import PREFIX, parse_arch


def test_every_layout_is_among_them() -> None:
    names = {parse_arch(source)[0] if source.startswith(PREFIX) else source for source in SOURCES}
    assert set(LAYOUTS) <= names and {"bk-v2-base", "bk-v2-small", "bk-v2-tiny"} <= names
    assert chosen([]) == list(SOURCES) and chosen(["arch:vega"]) == ["arch:vega"]
    with pytest.raises(ConfigError, match="arch:bk-tini"):
        chosen(["arch:bk-tini"])


def test_a_failed_export_is_a_row_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_export, "measure", lambda command, timeout: Measured(1.0, 5, 2, "it is broken"))
    (row,) = rows_of("arch:bk-tiny", tmp_path)
    assert (row.value, row.status) == (None, "failed") and "it is broken" in row.reason
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_small_one_in_whole(tmp_path: Path) -> None:
    rows = {row.metric: row.value for row in rows_of("arch:tiny-sd", tmp_path)}
    assert rows["parameters"] > 1e4 and rows["psnr_db"] > 100 and rows["export_peak_resident_bytes"] > 1e8
    assert not list(tmp_path.iterdir())
