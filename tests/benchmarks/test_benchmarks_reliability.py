"""What is tried, counted and told; the tries themselves against a real server, of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffship.benchmarks.studies.service import reliability
from diffship.benchmarks.studies.service.fault_proxy import fault_proxy
from diffship.benchmarks.studies.service.reliability import bad_requests, bad_trajectories, damaged_files, run
from diffship.core.errors import ConfigError


def test_every_bad_request_is_another_and_no_trajectory_is_whole() -> None:
    whole = bytes(range(256)) * 8
    tried = [(bad.path, bad.body, bad.kind, bad.method, tuple(bad.headers.items())) for bad in bad_requests(whole)]
    assert len(tried) > 250 and len(set(tried)) >= len(tried) - 3  # a bit may be flipped twice
    damaged = dict(bad_trajectories(whole))
    assert whole not in damaged.values() and b"" in damaged.values()


def test_what_was_not_refused_is_told_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reliability, "refusals", lambda bundle: (5, ["/v1/generate, steps=0: 200"]))
    monkeypatch.setattr(reliability, "damaged_files", lambda bundle: (3, []))
    monkeypatch.setattr(
        reliability, "survived", lambda bundle: {"down": (True, "down: x", 0.5), "hang": (False, "", 9.0)}
    )
    said: list[str] = []
    rows = {(row.subject, row.metric): row for row in run(tmp_path, said.append)}
    refused = rows["requests that are not legal", "refused"]
    assert (refused.value, refused.n, refused.status) == (4, 5, "failed") and "steps=0" in refused.reason
    assert rows["files with a changed byte", "refused"].status == "ok"
    faults = rows["faults of the cloud", "survived"]
    assert (faults.value, faults.n, faults.reason) == (1, 2, "hang")
    assert rows["faults of the cloud", "slowest_seconds"].value == 9.0
    assert said[0] == "not refused: /v1/generate, steps=0: 200" and "hang: NOT SURVIVED" in said[2]


def test_an_unknown_fault_is_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'hang'"), fault_proxy("http://127.0.0.1:1", "hank"):
        pass


@pytest.mark.slow
def test_a_tiny_model_refuses_and_survives_all(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fastapi")
    pytest.importorskip("httpx")
    monkeypatch.setattr(reliability, "DEADLINE", 6.0)
    said: list[str] = []
    rows = {(row.subject, row.metric): row for row in run(tiny_bundle, said.append)}
    assert all(row.status == "ok" for row in rows.values()), said
    assert rows["faults of the cloud", "survived"].value == 7
    count, wrong = damaged_files(tiny_bundle)
    assert count >= 15 and not wrong
