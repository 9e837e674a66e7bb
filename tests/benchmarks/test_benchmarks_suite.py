"""Suites are strict: what is wrong is said with the nearest legal word."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffship.benchmarks.measure.peers.table import PEERS
from diffship.benchmarks.measure.suite import parse_suite, read_suite
from diffship.core.errors import ConfigError
from diffship.core.registry import RUNNERS

FOLDER = Path(__file__).parents[2] / "benchmarks" / "suites"
BENCH = {"targets": ["emoji"]}


@pytest.mark.parametrize("name", sorted(file.stem for file in FOLDER.glob("*.toml")))
def test_every_suite_of_the_repository_is_legal(name: str) -> None:
    suite = read_suite(name, FOLDER)
    assert suite.name == name and suite.title
    for bench in suite.benches:
        assert set(bench.engines) <= set(RUNNERS) and set(bench.against) <= set(PEERS)


def test_the_suites_that_were_promised_are_there() -> None:
    assert {file.stem for file in FOLDER.glob("*.toml")} >= {"cpu-edge", "cpu-image", "export", "gpu"}
    edge = read_suite("cpu-edge", FOLDER)
    assert {name for bench in edge.benches for name in bench.against} == set(PEERS)
    assert {target for bench in edge.benches for target in bench.targets} == {"emoji", "arch:sd15"}


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"schema": 1, "title": "x"}, "nothing to measure"),
        ({"schema": 2, "title": "x", "bench": [BENCH]}, "legal is from 1 to 1"),
        ({"title": "x", "bench": [BENCH]}, "'schema' is missing"),
        ({"schema": 1, "title": "x", "bench": [{"targetz": ["emoji"]}]}, "did you mean 'targets'?"),
        ({"schema": 1, "title": "x", "bench": [{**BENCH, "parts": ["unett"]}]}, "did you mean 'unet'?"),
        ({"schema": 1, "title": "x", "bench": [{**BENCH, "calls": 0}]}, "legal is from 1"),
        ({"schema": 1, "title": "x", "bench": [{**BENCH, "steps": [0]}]}, "legal is from 1"),
        ({"schema": 1, "title": "x", "bench": [{"targets": []}]}, "name a bundle or a source"),
        ({"schema": 1, "title": "x", "export": [{"source": "emoji", "against": ["optimus"]}]}, "'optimum'"),
        ({"schema": 1, "title": "x", "rounds": True, "bench": [BENCH]}, "must be a whole number"),
    ],
)
def test_what_is_not_legal_is_refused(table: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as fault:
        parse_suite(table, "s")
    assert message in str(fault.value)


def test_an_unknown_suite_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'cpu-edge'"):
        read_suite("cpu-edje", FOLDER)
    for name in ("../suites/gpu", "a/b", ""):
        with pytest.raises(ConfigError, match="unknown suite"):
            read_suite(name, FOLDER)
    (tmp_path / "mine.toml").write_text("schema = ", encoding="utf-8")
    with pytest.raises(ConfigError, match="is not TOML"):
        read_suite(str(tmp_path / "mine.toml"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_suite(str(tmp_path / "none.toml"))
