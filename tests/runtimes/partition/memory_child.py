"""One rank of a run over torch's stages of a tiny U-Net; it prints the bytes of all parameters in its process."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "sampling")]

import torch  # noqa: E402
from test_partition_unet import drawn, opened  # noqa: E402

from diffship.core.distributed import end  # noqa: E402
from diffship.core.registry import kind  # noqa: E402
from diffship.models.walks.cuts import find_cuts, partition  # noqa: E402
from diffship.runtimes.partition.denoiser import seats  # noqa: E402
from diffship.runtimes.partition.distributed import Distributed, Team, work  # noqa: E402
from diffship.runtimes.partition.placement import place  # noqa: E402
from diffship.runtimes.partition.ranks import Ranks, place_of  # noqa: E402
from diffship.runtimes.partition.timetable import Scheme  # noqa: E402
from diffship.sampling.loop import denoise  # noqa: E402


def main() -> None:
    here = place_of()
    assert here is not None
    component, _ = opened("tiny-sd")
    cuts, scheme = find_cuts(component, 2), Scheme()
    stages = partition(component, cuts)
    placement = place(stages, cuts.homes)
    mine = {piece: stages[piece].load() for device, piece in seats(placement, scheme) if device == here.rank}
    boundaries = {spec.name: spec for stage in stages for spec in stage.outputs}
    with Ranks(here, {}, 60.0) as ranks:
        team = Team(ranks, placement, scheme, component.inputs, boundaries, mine, kind("sd"))
        if here.rank:
            work(team)
        else:
            denoiser = Distributed(team)
            denoise([drawn("tiny-sd", 3, 0)], denoiser)
            denoiser.end()
    gc.collect()
    found = (each for each in gc.get_objects() if isinstance(each, torch.nn.Parameter) and not each.is_meta)
    print(sum({one.data_ptr(): one.nbytes() for one in (each.untyped_storage() for each in found)}.values()))


if __name__ == "__main__":
    main()
    end(0)
