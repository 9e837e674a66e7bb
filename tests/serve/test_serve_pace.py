"""What a worker learns of its own pace, what it must not learn, and who is let in by it. The clock moves when told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from serve_toy import POISON, Bench, HeldModel

from diffship.runtimes.serve.admission import Busy
from diffship.runtimes.serve.forms import HandoffForm, ResumeForm
from diffship.runtimes.serve.order import Order, handoff_order, resume_order
from diffship.runtimes.serve.pace import Pace
from diffship.sampling.generate import Request, start
from diffship.sampling.wire import pack

SECONDS = {"text_encoder": 0.125, "unet": 1.0, "vae_decoder": 0.5}  # of a call; the prompt and the negative are two


def timed(**options: Any) -> Bench:
    """A bench whose parts take SECONDS by its clock."""
    bench = Bench(HeldModel(), **options)
    for part, seconds in SECONDS.items():
        lasting(bench, part, lambda seconds=seconds: seconds)
    return bench


def lasting(bench: Bench, part: str, seconds: Callable[[], float]) -> None:
    runner = bench.model.runners[part]
    plain = runner.function

    def slow(feeds: Any) -> Any:
        bench.clock.now += seconds()
        return plain(feeds)

    runner.function = slow


def pace(bench: Bench) -> dict[str, float]:
    (found,) = bench.worker.paces()
    return {key: found[key] for key in ("begin_ms", "call_ms", "end_ms")}


def handoff(bench: Bench, split: int = 1, **words: Any) -> Order:
    return handoff_order(HandoffForm(prompt="cat", steps=4, split=split, **words), bench.model)


def resumed(bench: Bench, embeddings: bool = True, **words: Any) -> Order:
    data = pack(start(bench.model, Request("cat", steps=4))[0], embeddings=embeddings)
    return resume_order(data, ResumeForm(**words), bench.model)


def test_one_measurement_counts_for_twice_the_known_pace_at_most() -> None:
    known = Pace(call=1.0)
    known.learn("call", 1000.0)
    assert known.call == pytest.approx(1.2)
    known.learn("call", 1.2)
    assert known.call == pytest.approx(1.2)
    known.learn("end", 5.0)
    assert known.end == 5.0, "the first one is all that is known"


def test_a_call_that_stalled_once_does_not_close_the_door() -> None:
    bench = timed()
    bench.put(steps=4)
    bench.finish()
    stalls = iter([100.0])
    lasting(bench, "unet", lambda: next(stalls, 0.0))
    assert bench.put(steps=4, deadline=30).state == "waiting"
    bench.finish()
    assert pace(bench)["call_ms"] < 1500
    assert bench.put(steps=4).state == bench.put(steps=4, deadline=30).state == "waiting"


def test_a_call_that_failed_is_no_pace() -> None:
    bench = timed()
    bench.put(steps=4)
    bench.finish()
    known = pace(bench)["call_ms"]
    lasting(bench, "unet", lambda: 100.0)
    bench.put(POISON, steps=4, deadline=1000)
    bench.finish()
    assert pace(bench)["call_ms"] == known


def test_a_call_that_the_engine_died_of_is_no_pace() -> None:
    bench = timed()
    bench.put(steps=4)
    bench.finish()
    known, unet = pace(bench)["call_ms"], bench.model.runners["unet"]
    plain, living = unet.function, [True]

    def last(feeds: Any) -> Any:  # it answers, and is gone
        bench.clock.now += 600
        living.clear()
        return plain(feeds)

    bench.worker.served = replace(bench.worker.served, alive=lambda: bool(living))
    unet.function = last
    bench.put(steps=4, deadline=1000)
    bench.worker.turn()
    assert not living and pace(bench)["call_ms"] == known


def test_an_idle_server_lets_a_request_in_whatever_its_pace_says() -> None:
    bench = timed()
    lasting(bench, "unet", lambda: 99.0)
    bench.put(steps=1, deadline=1000)
    bench.finish()
    assert pace(bench)["call_ms"] == 100_000
    assert bench.put(steps=4, deadline=5).state == "waiting"
    with pytest.raises(Busy, match=r"this request 400\.8 s"):
        bench.put(steps=4, deadline=5)
    bench.clock.now += 6
    bench.worker.turn()  # the one that was let in is late, and holds nobody up any more
    assert bench.put(steps=4, deadline=5).state == "waiting"


def test_a_handoff_teaches_nothing_of_decoding_and_is_not_charged_for_it() -> None:
    bench = timed()
    bench.put(steps=4)
    bench.finish()
    assert pace(bench) == {"begin_ms": 250, "call_ms": 1000, "end_ms": 500}
    waiting = bench.submit(handoff(bench))
    assert bench.worker.backlog() == 1.25
    assert bench.worker.turn() and waiting.state == "done" and pace(bench)["end_ms"] == 500
    running = bench.submit(handoff(bench, split=3))
    bench.worker.turn()
    assert running.state == "running" and bench.worker.backlog() == 2.0


def test_a_resume_teaches_nothing_of_encoding_unless_it_encodes() -> None:
    bench = timed(batch=1)
    bench.submit(resumed(bench))
    bench.finish()
    assert pace(bench) == {"begin_ms": 0, "call_ms": 1000, "end_ms": 500}
    bench.submit(resumed(bench, embeddings=False))
    assert bench.worker.backlog() == 4.5
    bench.finish()
    assert pace(bench) == {"begin_ms": 250, "call_ms": 1000, "end_ms": 500}
    bench.submit(resumed(bench))
    bench.submit(resumed(bench, until=2))
    bench.submit(resumed(bench, embeddings=False, until=0))
    assert bench.worker.backlog() == 4.5 + 2.0 + 0.25
    bench.finish()
    assert pace(bench) == {"begin_ms": 250, "call_ms": 1000, "end_ms": 500}
