"""Sizes that are computed from others: `h // 2`, `(64 - h) // 2`, `h * w`, told by what they were in each trace.

A program is traced at three sets of sizes, so a number is known as three values. A rule is taken only if it gives all
of them from sizes that the graph has, and if no other rule of its form does so that differs at a legal size. Legal
sizes of an axis are multiples of its smallest one, which is the greatest common divisor of those that are traced.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement
from math import gcd, prod

Values = tuple[int, ...]
_DIVISORS = (1, 2, 4, 8, 16)
_MOST = 64  # a rule with a larger factor or divisor would fit by chance


@dataclass(frozen=True)
class Rule:
    """(offset + factor * product of `of`) // divisor; each of `of` is a size that the graph has, by its values."""

    of: tuple[Values, ...]
    factor: int
    offset: int
    divisor: int


def rule_for(values: Values, known: Iterable[Values]) -> Rule | None:
    """The simplest rule that gives `values`: a share of one size or of a product of two, or else a sum and a share."""
    sizes = list(known)
    found = (*_shares(values, sizes), *_sums(values, sizes))
    return min(found, key=lambda rule: (len(rule.of), rule.offset != 0, rule.divisor, rule.factor), default=None)


def _shares(values: Values, sizes: list[Values]) -> Iterator[Rule]:
    pairs = combinations_with_replacement(sizes, 2)
    for of in (*((size,) for size in sizes), *pairs):
        product = _product(of)
        if not all(product):
            continue
        ratios = {Fraction(value, size) for value, size in zip(values, product, strict=True)}
        ratio = next(iter(ratios))
        if len(ratios) == 1 and 0 < ratio.numerator <= _MOST and ratio.denominator <= _MOST:
            yield Rule(of, ratio.numerator, 0, ratio.denominator)


def _sums(values: Values, sizes: list[Values]) -> Iterator[Rule]:
    for size in sizes:
        for divisor in _DIVISORS:
            for factor in (1, -1):
                offset = _offset(values, size, factor, divisor)
                if offset is not None:
                    yield Rule((size,), factor, offset, divisor)


def _offset(values: Values, size: Values, factor: int, divisor: int) -> int | None:
    """The offset with which (offset + factor * size) // divisor gives `values`; None if none does, or several do.

    Several are one if every legal size is a multiple of the divisor: then the quotient of the offset alone counts.
    """
    lows = [divisor * value - factor * length for value, length in zip(values, size, strict=True)]
    low, high = max(lows), min(lows) + divisor - 1
    return low if low == high or (low < high and gcd(*size) % divisor == 0) else None


def _product(of: tuple[Values, ...]) -> Values:
    return tuple(map(prod, zip(*of, strict=True)))
