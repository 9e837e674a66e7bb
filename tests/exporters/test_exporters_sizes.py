"""Rules for computed sizes, told by three traces: right at every legal size, or not taken."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import pytest

from diffship.exporters.onnx.capture import trace_sizes
from diffship.exporters.onnx.sizes import Rule, rule_for

Sizes = dict[str, int]
LEAST = {"batch_size": 1, "height": 8, "width": 8, "sequence_length": 77}
AXES = tuple(LEAST)
TRACES = trace_sizes(LEAST)
KNOWN = {axis: tuple(trace[axis] for trace in TRACES) for axis in AXES}
NAMES = {values: axis for axis, values in KNOWN.items()}


def evaluated(rule: Rule, sizes: Sizes) -> int:
    return (rule.offset + rule.factor * prod(sizes[NAMES[values]] for values in rule.of)) // rule.divisor


FOLLOWS: dict[str, Callable[[Sizes], int]] = {
    "half": lambda s: s["height"] // 2,
    "half of any length": lambda s: s["sequence_length"] // 2,
    "half, upwards": lambda s: (s["sequence_length"] + 1) // 2,
    "quarter of any length": lambda s: s["sequence_length"] // 4,
    "double": lambda s: 2 * s["width"],
    "one more": lambda s: s["sequence_length"] + 1,
    "tokens": lambda s: s["height"] * s["width"] // 4,
    "square": lambda s: s["sequence_length"] ** 2,
    "crop of a table": lambda s: (192 - s["height"] // 2) // 2,
    "end of the crop": lambda s: (192 - s["width"] // 2) // 2 + s["width"] // 2,
}


@pytest.mark.parametrize("name", FOLLOWS)
def test_a_rule_holds_at_every_legal_size(name: str) -> None:
    value = FOLLOWS[name]
    rule = rule_for(tuple(map(value, TRACES)), KNOWN.values())
    assert rule is not None
    for batch in (1, 4):
        for side in range(1, 24):
            for length in (1, 2, 5, 16, 77, 256):
                sizes = {"batch_size": batch, "height": 8 * side, "width": 8 * (25 - side), "sequence_length": length}
                assert evaluated(rule, sizes) == value(sizes), (rule, sizes)


@pytest.mark.parametrize(
    "value",
    [
        lambda s: min(s["sequence_length"], 26),
        lambda s: max(s["height"], 64),
        lambda s: s["height"] % 48,
        lambda s: s["sequence_length"] ** 3,
        lambda s: {23: 5, 48: 9, 71: 2}[s["sequence_length"]],
    ],
)
def test_what_follows_from_no_size_has_no_rule(value: Callable[[Sizes], int]) -> None:
    assert rule_for(tuple(map(value, TRACES)), KNOWN.values()) is None


def test_two_rules_that_differ_at_legal_sizes_are_both_refused() -> None:
    odd = (5, 11, 31)  # n // 2 and (n + 1) // 2 - 1 ... agree on these alone
    halves = tuple((n - 1) // 2 for n in odd)
    assert rule_for(halves, [odd]) is None
    mixed = (5, 12, 31)
    assert rule_for(tuple((n - 1) // 2 for n in mixed), [mixed]) == Rule((mixed,), 1, -1, 2)
