"""What a refusal says of several problems, and which error it is."""

from __future__ import annotations

import pytest

from diffship.core.errors import ConfigError, MissingExtra, RunnerError, SourceError, UnsupportedError
from diffship.core.problem import Problem, refuse


def test_no_problems_are_no_refusal() -> None:
    refuse([])


def test_a_wrong_option_or_file_stays_one_and_everything_else_is_unsupported() -> None:
    with pytest.raises(UnsupportedError, match=r"\Aunet: is too wide\Z"):
        refuse([Problem("unet", "is too wide")])
    for fault, kind in (
        (ConfigError("x"), ConfigError),
        (SourceError("x"), SourceError),
        (RunnerError("x"), UnsupportedError),
        (MissingExtra("matplotlib", "plots"), UnsupportedError),
    ):
        assert Problem.of("unet", fault).kind is kind
    assert (
        str(Problem.of("unet", ConfigError("65 is no size"), "significance: ")) == "unet: significance: 65 is no size"
    )


def test_the_first_problem_is_told_whole_and_others_as_far_as_whole_ones_fit() -> None:
    with pytest.raises(UnsupportedError) as told:
        refuse([Problem("a", "x" * 700 + "."), Problem("b", "short")])
    assert str(told.value).endswith("x. (and 1 more)")
    with pytest.raises(UnsupportedError, match=r"\Aa: first \(and 3 more: c: short; d: short\)\Z"):
        refuse([Problem("a", "first"), Problem("b", "x" * 700), Problem("c", "short"), Problem("d", "short")])
