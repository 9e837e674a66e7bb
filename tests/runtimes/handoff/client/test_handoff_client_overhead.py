"""The overhead benchmark: its arithmetic, and a smoke of the whole over a toy server."""

from __future__ import annotations

from pathlib import Path

import pytest
from sampling_toy import ToyModel
from serve_toy import HeldModel, toy_server

from diffship.benchmarks.measure.record import read_result, write_result
from diffship.benchmarks.studies.service.handoff_overhead import Overhead, Plan, measure, rows
from diffship.core.errors import RunnerError
from diffship.runtimes.handoff.client import HybridClient

PLAN = Plan(Path("out/toy"), (2, 4), 3)


def test_rows_are_medians_with_their_spread() -> None:
    handoffs = [Overhead(1, 2, 3, 10), Overhead(2, 2, 3, 10), Overhead(9, 2, 3, 10)]
    made = {(row.metric, row.conditions.get("embeddings")): row for row in rows(PLAN, {True: handoffs}, [100, 70, 140])}
    total = made["handoff_total_ms", True]
    assert (total.value, total.low, total.high, total.n, total.unit) == (7, 6, 14, 3, "ms")
    share = made["handoff_share", True]
    assert share.value == 0.1 and share.low == 0.06 and share.high == 0.1
    assert made["handoff_bytes", True].kind == "size" and made["generation_ms", None].value == 100


@pytest.mark.slow
def test_a_toy_in_whole(tmp_path: Path) -> None:
    with toy_server(HeldModel(delay=0.005)) as (url, _), HybridClient(ToyModel(), url) as client:
        found, whole = measure(client, PLAN)
    assert [len(handoffs) for handoffs in found.values()] == [3, 3] and len(whole) == 3
    for handoff in (*found[True], *found[False]):
        assert 0 < handoff.pack_ms < 100 and 0 < handoff.unpack_ms < 100 and 0 < handoff.http_ms < 1000
    assert found[True][0].size_bytes > found[False][0].size_bytes + 2 * 77 * 8 * 4
    assert min(whole) > 10  # two calls of 5 ms
    made = rows(PLAN, found, whole)
    write_result(tmp_path / "r.json", "handoff-overhead", "x", made)
    assert [row.metric for row in read_result(tmp_path / "r.json").rows] == [row.metric for row in made]


@pytest.mark.slow
def test_a_cloud_that_fails_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    place = "diffship.benchmarks.studies.service.handoff_overhead.overhead"
    monkeypatch.setattr(place, lambda *_: Overhead(1, 1, 1, 1))
    with HybridClient(ToyModel(), "http://127.0.0.1:9") as client:
        with pytest.raises(RunnerError, match="the cloud failed: down"):
            measure(client, PLAN)
