"""What a traced request's marks say of iterations of every kind."""

from __future__ import annotations

import numpy as np

from gpu_service.engine.messages import SamplingSpec, Submit
from gpu_service.engine.traces import MOST_MARKS, RequestTraces
from gpu_service.scheduling.plan import (
    DecodeRow,
    Flight,
    IterationPlan,
    Migration,
    Mode,
    PrefillRow,
    SampledToken,
    SubBatch,
    SweepResult,
    Tier,
)
from gpu_service.scheduling.request import Request

BLOCKS = np.arange(3, dtype=np.int32)
KEY = 7


def request() -> Request:
    submit = Submit(
        request_id="a", prompt_token_ids=[1], sampling=SamplingSpec(max_tokens=9), arrival=0.0
    )
    return Request(submit, (Tier.GPU,), 100, KEY)


def traces() -> RequestTraces:
    made = RequestTraces()
    made.begin(request())
    return made


def run(it: RequestTraces, at: float, mode: Mode, batch: SubBatch, **result: object) -> None:
    migrations = result.pop("migrations", ())
    plan = IterationPlan(int(at), mode, migrations, (batch,))  # type: ignore[arg-type]
    tokens = {KEY: SampledToken(5)}
    it.count(plan, SweepResult(**({"tokens": tokens} | result)), at, at + 1)  # type: ignore[arg-type]


def row(key: int = KEY) -> DecodeRow:
    return DecodeRow(key, 5, 20, BLOCKS)


def told(it: RequestTraces) -> list[tuple[str, float, float, object]]:
    marks = [mark for mark in it.end("a") if mark.name != "sweep"]
    return [(m.name, m.start, m.end, m.attributes.get("by", m.attributes.get("to"))) for m in marks]


def test_stretches_end_where_the_attending_side_changes() -> None:
    it = traces()
    run(it, 1, Mode.INLINE, SubBatch(prefill=(PrefillRow(KEY, Tier.GPU, 0, (1,), BLOCKS, True),)))
    run(it, 2, Mode.INLINE, SubBatch(gpu_decode=(row(1), row())))
    run(it, 3, Mode.INLINE, SubBatch(gpu_decode=(row(),)))
    move = Migration(KEY, Tier.HOST, 3, BLOCKS, BLOCKS)
    run(it, 4, Mode.INLINE, SubBatch(host_decode=(row(),)), migrations=(move,))
    run(it, 5, Mode.INLINE, SubBatch(streamed=(row(),)))
    assert told(it) == [
        ("prefill", 1, 2, None),
        ("decode", 2, 4, "gpu"),
        ("move", 4, 4, "demote"),
        ("decode", 4, 5, "host"),
        ("decode", 5, 6, "streamed"),
    ]


def test_deferred_rows_count_when_they_land() -> None:
    it = traces()
    run(it, 1, Mode.DEFERRED, SubBatch(host_decode=(row(),)), tokens={})
    landed = (Flight(KEY, 1),)
    run(it, 2, Mode.DEFERRED, SubBatch(gpu_decode=(row(1),)), landed=landed)
    assert told(it) == [("decode", 2, 3, "host")]


def test_void_rows_and_others_requests_leave_no_mark() -> None:
    it = traces()
    run(it, 1, Mode.INLINE, SubBatch(host_decode=(row(),)), tokens={}, void=frozenset({KEY}))
    run(it, 2, Mode.INLINE, SubBatch(gpu_decode=(row(1),)), tokens={1: SampledToken(5)})
    assert told(it) == []


def test_marks_are_bounded_and_sweeps_sampled() -> None:
    it = traces()
    for at in range(1, 1001):
        run(it, at, Mode.INLINE, SubBatch(gpu_decode=(row(),)))
    marks = it.end("a")
    assert [m.attributes["number"] for m in marks if m.name == "sweep"] == [
        2**power for power in range(10)
    ]
    it = traces()
    move = Migration(KEY, Tier.HOST, 3, BLOCKS, BLOCKS)
    for at in range(1, 1001):
        run(it, at, Mode.INLINE, SubBatch(gpu_decode=(row(),)), migrations=(move,))
    assert len(it.end("a")) == MOST_MARKS


def test_a_request_that_is_not_traced_has_none() -> None:
    assert RequestTraces().end("a") == []
    assert RequestTraces().attach([]) == []
