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
from diffship.runtimes.serve.pace import Pace, Paces, Work, blended
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
    known = Pace()
    for seconds, expected in ((1.0, 1.0), (1000.0, 1.2), (1.2, 1.2)):
        known.learn_call(2, seconds)
        assert known.call(2) == pytest.approx(expected)
    assert blended(0.0, 5.0) == 5.0, "the first one is all that is known"
    assert blended(5.0, 1e9) == 5.0 + 0.2 * 5.0


def test_a_call_of_many_rows_is_judged_by_calls_of_as_many() -> None:
    known = Pace()
    assert known.call(4) == 0.0
    known.learn_call(2, 1.0)
    assert (known.call(1), known.call(2), known.call(4)) == (1.0, 1.0, 2.0), "in proportion until more is known"
    known.learn_call(8, 2.5)
    assert (known.call(5), known.call(8), known.call(16)) == (1.75, 2.5, 5.0)


def test_controls_that_were_never_drawn_take_what_pictures_without_them_take() -> None:
    plain, paces = handoff(timed()), Paces()
    controlled = replace(plain, controls=("edges",))
    assert paces.seconds([Work.of(controlled)], 4) == 0.0, "nothing is known"
    paces.of(plain).begin = 0.25
    paces.of(plain).learn_call(2, 1.0)
    assert paces.seconds([Work.of(controlled)], 4) == paces.seconds([Work.of(plain)], 4) == 1.25
    paces.of(controlled).learn_call(2, 3.0)
    assert paces.seconds([Work.of(controlled)], 4) == 3.25 and paces.seconds([Work.of(plain)], 4) == 1.25


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
    with pytest.raises(Busy, match=r"the queue needs 400\.8 s, this request 400\.8 s alone"):
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


def by_rows(bench: Bench, seconds: Callable[[int], float]) -> None:
    """A U-Net whose calls take `seconds` of their rows."""
    runner = bench.model.runners["unet"]
    plain = runner.function

    def slow(feeds: Any) -> Any:
        bench.clock.now += seconds(len(feeds["sample"]))
        return plain(feeds)

    runner.function = slow


def test_guidance_is_two_rows_a_call() -> None:
    """An engine that is full: each row takes a second."""
    bench = Bench(batch=1)
    by_rows(bench, float)
    bench.put(steps=4, guidance=1.0)
    bench.finish()
    running = bench.put(steps=1, guidance=1.0)
    with pytest.raises(Busy, match=r"this request 40\.0 s alone and 41\.0 s behind it"):
        bench.put(steps=20, guidance=7.5, deadline=30)
    fits = bench.put(steps=20, guidance=1.0, deadline=30)
    bench.finish()
    assert (running.state, fits.state) == ("done", "done")
    bench.put(steps=4, guidance=7.5)
    bench.finish()
    (found,) = bench.worker.paces()
    assert (found["call_ms"], found["guided_call_ms"]) == (1000, 2000)


def test_a_batch_that_costs_one_call_is_not_charged_for_eight() -> None:
    """An engine with room: a call takes a second whatever its rows."""
    bench = Bench(batch=8)
    by_rows(bench, lambda rows: 1.0)
    for _ in range(8):
        bench.put(steps=10)
    bench.finish()
    for _ in range(7):
        bench.put(steps=10)
    assert bench.worker.backlog() == pytest.approx(10.0)
    began = bench.clock.now
    last = bench.put(steps=10, deadline=11)
    bench.finish()
    assert last.state == "done" and bench.clock.now - began == pytest.approx(10.0)
    assert bench.worker.backlog() == 0.0


def test_a_short_request_joins_a_long_one_and_need_not_see_its_end() -> None:
    bench = Bench(batch=8)
    by_rows(bench, lambda rows: 1.0)
    bench.put(steps=10, images=4)
    bench.finish()
    bench.put(steps=100, deadline=500)
    assert bench.worker.backlog() == pytest.approx(100.0), "one image makes all its calls, however many a call holds"
    short = bench.put(steps=4, deadline=5)
    with pytest.raises(Busy, match=r"this request 40\.0 s alone and 40\.0 s behind it; its deadline is in 30\.0 s"):
        bench.put(steps=40, deadline=30)
    bench.finish()
    assert short.state == "done"


def test_what_is_being_encoded_counts_whole() -> None:
    bench = timed(batch=1)
    bench.put(steps=4)
    bench.finish()
    seen: list[float] = []
    lasting(bench, "text_encoder", lambda: seen.append(bench.worker.backlog()) or 0.0)
    bench.put(steps=4)
    bench.finish()
    assert seen == [4.75, 4.75]
