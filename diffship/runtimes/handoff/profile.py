"""What a picture costs on both sides and between them, measured now: short runs here, small handoffs there."""

from __future__ import annotations

import uuid

from diffship.core.errors import HandoffError
from diffship.core.stopwatch import timed
from diffship.runtimes.handoff.choose import SplitProfile
from diffship.runtimes.handoff.client import HybridClient
from diffship.runtimes.handoff.pair import check_pair
from diffship.runtimes.handoff.transport import Answer, CloudError, CloudModel
from diffship.sampling.generate import checked_denoiser, start
from diffship.sampling.loop import denoise
from diffship.sampling.request import Request
from diffship.sampling.wire import unpack

ROUNDS = 2


def measure_profile(client: HybridClient, request: Request, steps: int) -> SplitProfile:
    """A profile of the client's pair for pictures like that of `request`.

    Here: encoding, two calls after a warm-up, decoding. There: handoffs of no call and of one (their difference is a
    call; the server's histogram of call times mixes sizes and batches), of which the better of two rounds counts, and
    the smallest request there is, for the round trip. What the server does not say (`Server-Timing`) is taken from
    this side's clock.

    Raises:
        CloudError: the cloud gave no answer.
        ConfigError: the pair cannot share a trajectory, or the request does not fit.
    """
    settled = client.settled(request, steps)
    assert settled.size is not None and settled.guidance is not None
    model = client.facts()
    check_pair([model.facts, client.small], request.sampler, client.shared_latents)
    encode, call, end = _here(client, settled)
    most = client.deadline + 1
    round_trip = min(client.cloud.submit(client.cloud.live(client.deadline)).result(most) for _ in range(ROUNDS + 1))
    none, one = (_there(client, model, settled, calls, round_trip) for calls in (0, 1))
    moved = none.bytes_up + len(none.body)
    on_wire = none.seconds - _run_seconds(none, round_trip) - (none.queue_ms or 0.0) / 1000 - round_trip
    return SplitProfile(
        cloud=model.digest,
        edge=client.small.digest,
        size=settled.size,
        guided=settled.guidance > 1,
        edge_begin_ms=1000 * encode,
        edge_call_ms=1000 * call,
        edge_end_ms=1000 * end,
        cloud_begin_ms=1000 * _run_seconds(none, round_trip),
        cloud_call_ms=1000 * max(_run_seconds(one, round_trip) - _run_seconds(none, round_trip), 0.0),
        round_trip_ms=1000 * round_trip,
        bytes_per_second=min(max(moved / max(on_wire, 1e-6), 1.0), 1e15),
        handoff_bytes=moved,
    )


def _here(client: HybridClient, request: Request) -> tuple[float, float, float]:
    """Seconds of encoding, of a call, of decoding, all warm."""
    model = client.small
    start(model, request)
    (begun, *_), encode = timed(lambda: start(model, request))
    denoiser = checked_denoiser(model)
    calls = min(begun.calls, 2)
    denoise([begun], denoiser, until=1)
    _, drawn = timed(lambda: denoise([begun], denoiser, until=calls))
    decoder, feeds = model.use(model.family.kind.decoder), {"latent_sample": begun.latents[None]}
    decoder.run(feeds)
    _, end = timed(lambda: decoder.run(feeds))
    return encode, drawn / calls, end


def _there(client: HybridClient, model: CloudModel, request: Request, calls: int, round_trip: float) -> Answer:
    """The quickest of ROUNDS handoffs of `calls` calls, each drawn anew."""
    body = client.body(model, request, calls, client.deadline)
    made = [
        client.cloud.submit(client.cloud.handoff(body, uuid.uuid4().hex, client.deadline)).result(client.deadline + 1)
        for _ in range(ROUNDS)
    ]
    for answer in made:
        try:
            unpack(answer.body)
        except HandoffError as fault:
            raise CloudError(f"garbage: {fault}") from None
    return min(made, key=lambda answer: _run_seconds(answer, round_trip))


def _run_seconds(answer: Answer, round_trip: float) -> float:
    return max(answer.seconds - round_trip, 0.0) if answer.run_ms is None else answer.run_ms / 1000
