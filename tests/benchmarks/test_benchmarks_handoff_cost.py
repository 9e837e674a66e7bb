"""The cost curve against the guide's table (1.8), which is arithmetic over published counts, not output of ours."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from diffship.benchmarks.handoff_cost import cost_curve, cost_table
from diffship.core.errors import ConfigError
from diffship.models.sources import open_source

# split, cloud TMAC, edge TMAC, saving of U-Net calls, saving with the KL decode (1.24 TMAC)
GUIDED = [
    ((25, 0), 16.93, 0.0, 0.0, 0.07),
    ((20, 5), 13.54, 1.51, 0.20, 0.25),
    ((10, 15), 6.77, 4.54, 0.60, 0.63),
    ((5, 20), 3.39, 6.05, 0.80, 0.81),
]
CONSISTENCY = [((4, 4), 1.35, 0.61, 0.50, 0.66)]


@pytest.mark.parametrize(
    ("cloud", "edge", "table"),
    [
        pytest.param("arch:sd15", "arch:hybrid-224m", GUIDED, marks=pytest.mark.slow),
        ("arch:sd15+lcm", "arch:hybrid-224m+lcm", CONSISTENCY),
    ],
    ids=["guided", "lcm"],
)
def test_published_pair(cloud: str, edge: str, table: list[tuple[tuple[int, int], float, float, float, float]]) -> None:
    curve = cost_curve(open_source(cloud), open_source(edge), [row[0] for row in table])
    for point, (split, large, small, saving, with_decode) in zip(curve, table, strict=True):
        assert point.split == split
        assert point.cloud / 1e12 == pytest.approx(large, abs=0.006)
        assert point.edge / 1e12 == pytest.approx(small, abs=0.006)
        assert point.saving == pytest.approx(saving, abs=0.005)
        assert point.saving_with_decode == pytest.approx(with_decode, abs=0.005)
    assert cost_table(curve).splitlines()[2].startswith(f"| {','.join(map(str, table[0][0]))} | {table[0][1]:.2f} |")


@pytest.mark.slow
def test_guidance_doubles_and_the_decoder_is_counted_once() -> None:
    tiny = open_source("arch:tiny-sd")
    with_guidance, without = (cost_curve(tiny, tiny, [(3, 1)], 64, guided)[0] for guided in (True, False))
    assert with_guidance.cloud == 2 * without.cloud == 3 * with_guidance.edge
    assert with_guidance.decode == without.decode
    assert with_guidance.saving == without.saving == 0.25
    assert with_guidance.saving_with_decode < without.saving_with_decode


@pytest.mark.parametrize("split", [(), (1,), (1, 2, 3), (-1, 2), (0, 0), (100, 100)])
def test_refuses_what_is_no_split(split: tuple[int, ...]) -> None:
    tiny = open_source("arch:tiny-sd")
    with pytest.raises(ConfigError, match="two numbers"):
        cost_curve(tiny, tiny, [split], 64)  # type: ignore[list-item]
