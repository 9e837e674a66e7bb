from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from partition_oracle import placed

from diffship.core.errors import ConfigError
from diffship.runtimes.partition import gantt
from diffship.runtimes.partition.placement import Piece, Placement
from diffship.runtimes.partition.timetable import Made, Scheme, Timetable, timetable

# (stages, stride, warm-up, shift, steps) -> per round: {device: timestep}, steps predicted; by hand, from the paper
TABLES = {
    (2, 1, 1, False, 4): [
        ({0: 0, 1: 0}, (0,)),
        ({0: 1, 1: 1}, (1,)),
        ({0: 2, 1: 2}, (2,)),
        ({0: 3, 1: 3}, (3,)),
    ],
    (2, 1, 2, True, 4): [({0: 0, 1: 0}, (0,)), ({0: 1, 1: 1}, (1,)), ({0: 1, 1: 1}, (2,)), ({0: 2, 1: 2}, (3,))],
    (2, 2, 1, False, 5): [({0: 0, 1: 0}, (0,)), ({0: 2, 1: 2, 2: 1}, (1, 2)), ({0: 4, 1: 4, 2: 3}, (3, 4))],
    # an even warm-up: rounds begin where it ends, and the last step is left alone
    (3, 2, 2, False, 7): [
        ({0: 0, 1: 0, 2: 0}, (0,)),
        ({0: 1, 1: 1, 2: 1}, (1,)),
        ({0: 3, 1: 3, 2: 3, 3: 2}, (2, 3)),
        ({0: 5, 1: 5, 2: 5, 3: 4}, (4, 5)),
        ({0: 6, 1: 6, 2: 6, 3: 6}, (6,)),
    ],
    (2, 2, 1, True, 5): [({0: 0, 1: 0}, (0,)), ({0: 1, 1: 1, 2: 0}, (1, 2)), ({0: 3, 1: 3, 2: 2}, (3, 4))],
    (1, 2, 1, False, 3): [({0: 0}, (0,)), ({0: 2, 1: 1}, (1, 2))],
}
CASES = st.tuples(
    st.integers(1, 4), st.booleans(), st.integers(1, 2), st.integers(1, 12), st.booleans(), st.integers(1, 14)
)


def table_of(stages: int, stride: int, warm_up: int, shift: bool, calls: int, ends: bool = False) -> Timetable:
    return timetable(placed(stages, ends), calls, Scheme(stride, warm_up, shift))


@pytest.mark.parametrize("case", TABLES, ids=str)
def test_small_tables_by_hand(case: tuple[int, int, int, bool, int]) -> None:
    table = table_of(*case)
    assert [each.predicts for each in table.rounds] == [predicts for _, predicts in TABLES[case]]
    read: set[tuple[int, int]] = set()
    for i in reversed(range(len(table.rounds))):
        times = {task.device: task.time for task in table.rounds[i].tasks}
        # whoever is left out makes nothing that the rounds after this one read
        full = TABLES[case][i][0]
        assert times.items() <= full.items() and not {(i, device) for device in full.keys() - times.keys()} & read
        read |= {(made.round, made.device) for task in table.rounds[i].tasks for made in task.reads}


@pytest.mark.slow
@given(CASES)
@settings(max_examples=150, deadline=None)
def test_every_timetable_holds_and_says_what_it_costs(case: tuple[int, bool, int, int, bool, int]) -> None:
    stages, ends, stride, warm_up, shift, calls = case
    shift = shift and (stages > 1 or stride > 1)
    table = table_of(stages, stride, warm_up, shift, calls, ends)  # raises where a read has no source, or an old one
    alone = stages == stride == 1
    assert sum(each.synchronous for each in table.rounds) == (calls if alone else min(warm_up, calls))
    hops = len(table.placement.pieces) - 1 if stages > 1 else 0
    for step in range(calls):
        lag = table.lag(step)
        assert lag == 0 if step < warm_up else 0 <= lag <= hops * stride + stride - 1
        assert step in table.rounds[table.by_step[step]].predicts
    assert table.devices <= stages + stride - 1
    if calls >= warm_up + 2 * stride * stages:
        assert table.devices == stages + stride - 1
        steady = max(table.lag(step) for step in range(calls))
        assert steady == hops * stride + stride - 1 if stages > 1 else steady == stride - 1
    costs = [1.0 + i for i in range(len(table.placement.pieces))]
    assert 1.0 <= table.speed_up(costs) + 1e-9 <= stages * stride + 1e-6
    for i, each in enumerate(table.rounds):
        for task in each.tasks:
            sources = {(made.device, made.tensor) for made in task.reads if made.device != task.device}
            before = {
                (link.source, name)
                for link in (*table.sends(i - 1 if i else 0), *table.sends(i))
                if link.target == task.device
                for name in link.tensors
            }
            assert sources <= before


def test_skips_go_straight_to_the_stage_that_reads_them_once() -> None:
    table = table_of(3, 1, 1, False, 6)
    links = [(link.source, link.target, link.tensors) for link in table.sends(2)]
    assert links == [(0, 1, ("hidden.0",)), (0, 2, ("skip.0",)), (1, 2, ("hidden.1", "skip.1"))]
    double = table_of(2, 2, 1, False, 7)
    assert [(link.source, link.target, link.tensors) for link in double.sends(1)] == [
        (0, 1, ("hidden.0", "skip.0")),
        (0, 2, ("hidden.0", "skip.0")),
    ]


def test_ends_on_one_device_have_fresh_skips() -> None:
    table = table_of(2, 1, 1, False, 5, ends=True)
    assert [piece.home for piece in table.placement.pieces] == [1, 0, 1]
    reads = {made.tensor: made.round for task in table.rounds[3].tasks if task.piece == 2 for made in task.reads}
    assert reads == {"hidden.1": 2, "skip.0": 3, "skip.1": 2}
    assert [(link.source, link.target) for link in table.sends(2)] == [(0, 1), (1, 0)]


def test_one_stage_on_one_device_is_the_plain_run() -> None:
    table = table_of(1, 1, 1, False, 5)
    assert all(each.synchronous for each in table.rounds) and table.speed_up([3.0]) == 1.0
    with pytest.raises(ConfigError, match="time_shift"):
        table_of(1, 1, 1, True, 5)


def test_what_a_run_gains() -> None:
    # 2 steps of 4 s one after another, then 8 rounds of the slower device's 3 s: 40 s of work in 32 s
    assert table_of(2, 1, 2, False, 10).speed_up([1.0, 3.0]) == pytest.approx(40 / 32)
    # stride 2: the same 8 steps in 4 rounds
    assert table_of(2, 2, 2, False, 10).speed_up([1.0, 3.0]) == pytest.approx(40 / 20)


@pytest.mark.parametrize("scheme", [{"stride": 3}, {"stride": 0}, {"warm_up": 0}])
def test_schemes_out_of_bounds_are_refused(scheme: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=next(iter(scheme))):
        Scheme(**scheme)
    with pytest.raises(ConfigError, match="at least one step"):
        table_of(2, 1, 1, False, 0)


def _read(table: Timetable, index: int, made: Made) -> Timetable:
    each = table.rounds[index]
    task = replace(each.tasks[-1], reads=(made, *each.tasks[-1].reads[1:]))
    rounds = [*table.rounds]
    rounds[index] = replace(each, tasks=(*each.tasks[:-1], task))
    return replace(table, rounds=tuple(rounds))


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (Made(1, 0, "hidden.0"), "too old"),
        (Made(2, 1, "hidden.0"), "not made"),
        (Made(3, 0, "hidden.0"), "while it is being made"),
        (Made(2, 0, "skip.0"), "does not read what it takes"),
    ],
)
def test_a_table_that_does_not_hold_cannot_be_made(made: Made, why: str) -> None:
    table = table_of(2, 1, 1, False, 6)
    with pytest.raises(ConfigError, match=why):
        _read(table, 3, made)


def test_a_table_with_a_hole_cannot_be_made() -> None:
    table = table_of(2, 1, 1, False, 6)
    with pytest.raises(ConfigError, match="predictions come for steps"):
        replace(table, rounds=table.rounds[:-1])
    with pytest.raises(ConfigError, match="timestep 9"):
        last = table.rounds[-1]
        tasks = tuple(replace(task, time=9) for task in last.tasks)
        replace(table, rounds=(*table.rounds[:-1], replace(last, tasks=tasks)))


@pytest.mark.parametrize(
    ("pieces", "why"),
    [
        ([], "none"),
        ([Piece("a", 1, (), ("h",)), Piece("b", 0, ("h",), ())], "last stage on the highest"),
        ([Piece("a", 0, (), ()), Piece("b", 1, ("h",), ())], "b reads h"),
        ([Piece("a", 0, (), ("h",)), Piece("b", 1, ("h",), ("h",))], "once more"),
    ],
)
def test_stages_that_cannot_be_placed(pieces: list[Piece], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        Placement(tuple(pieces))


CHART = """\
device 0 0 . 1 .   3   5 .
device 1 . 0 . 1   3   5 .
device 2 . . . .   2   4 6
predicts   0   1 2,3 4,5 6"""


def test_the_chart_in_text_and_svg() -> None:
    table = table_of(2, 2, 2, False, 7)
    assert gantt.text(table) == CHART
    assert CHART in (Path(__file__).parents[3] / "docs" / "partition.md").read_text(encoding="utf-8")
    assert gantt.title(table) == "2 stages, stride 2: 3 devices, 7 steps, warm-up 2"
    narrow = gantt.text(table, 20)
    assert max(map(len, narrow.splitlines())) <= 20 and narrow.count("predicts") == 2
    root = ElementTree.fromstring(gantt.svg(table))
    assert len(root.findall("{*}rect")) == 4 + 3 + 3 + 1
    assert [text.text for text in root.findall("{*}text")][-1] == "6"
