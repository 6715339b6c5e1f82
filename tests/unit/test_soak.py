"""What a soak takes for a failure, and what for flat: `benchmarks.soak` judged by made-up runs."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from benchmarks.soak.asks import Ask, Asker, Manner, questions
from benchmarks.soak.drive import Driver, Got, wrong_end
from benchmarks.soak.faults import Fault
from benchmarks.soak.verdict import STEADY, slope_per_hour, verdict
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

KNOWN = ((5, 6, 7),)


class Stub:
    """Streams what it is told to, and counts that as usage."""

    def __init__(self, tokens: tuple[int, ...], counted: int | None = None) -> None:
        self.tokens = tokens
        self.counted = len(tokens) if counted is None else counted

    async def GenerateStream(
        self,
        request: Any,
        timeout: float,  # noqa: ASYNC109 -- as stubs call it
    ) -> AsyncIterator[inference.GenerateStreamResponse]:
        for token in self.tokens:
            yield inference.GenerateStreamResponse(deltas=[inference.Choice(token_ids=[token])])
        yield inference.GenerateStreamResponse(usage=types.Usage(completion_tokens=self.counted))


async def failures(stub: Stub) -> dict[str, int]:
    question = questions(1, 1)[0]
    ask = Ask(Manner.STREAM, question.request(types.PLACEMENT_AUTO), question, 1.0)
    driver = Driver(stub, Asker([question], 1), {0: KNOWN}, lambda *_: False)
    await driver._ask(ask)
    return dict(driver.failed)


async def test_answers_are_compared() -> None:
    assert await failures(Stub((5, 6, 7))) == {}
    assert await failures(Stub((5, 6, 8))) == {"tokens": 1}
    assert await failures(Stub((5, 6))) == {"tokens": 1}
    assert await failures(Stub(())) == {"tokens": 1}
    assert await failures(Stub((5, 6, 7, 7))) == {"tokens": 1}
    assert await failures(Stub((5, 6, 7), counted=2)) == {"usage": 1}


@pytest.mark.parametrize(
    ("manner", "code", "reason", "right"),
    [
        (Manner.STREAM, grpc.StatusCode.OK, "", True),
        (Manner.STREAM, grpc.StatusCode.DEADLINE_EXCEEDED, "", False),
        (Manner.UNARY, grpc.StatusCode.INTERNAL, "INTERNAL_ERROR", False),
        (Manner.CANCEL, grpc.StatusCode.CANCELLED, "", True),
        (Manner.DEADLINE, grpc.StatusCode.DEADLINE_EXCEEDED, "", True),
        (Manner.DEADLINE, grpc.StatusCode.CANCELLED, "", False),
        (Manner.REFUSED, grpc.StatusCode.INVALID_ARGUMENT, "UNKNOWN_MODEL", True),
        (Manner.REFUSED, grpc.StatusCode.INVALID_ARGUMENT, "NEVER_FITS", False),
        (Manner.REFUSED, grpc.StatusCode.OK, "", False),
    ],
)
def test_ends(manner: Manner, code: grpc.StatusCode, reason: str, right: bool) -> None:
    ask = Ask(manner, inference.GenerateRequest(), None, 1.0, reason="UNKNOWN_MODEL")
    assert (wrong_end(ask, Got(code=code, reason=reason)) is None) == right
    busy = Got(code=grpc.StatusCode.RESOURCE_EXHAUSTED, reason="QUEUE_FULL")
    assert wrong_end(ask, busy) == "no retry delay"
    busy.retry_after = 0.5
    assert wrong_end(ask, busy) is None


def test_a_fault_excuses_what_met_it() -> None:
    fault = Fault("cpu-kill", begun=10.0, hold_seconds=1.0)
    assert not fault.on(1.0, 9.9)
    assert fault.on(1.0, 10.0)
    assert fault.on(99.0, 100.0), "it is not over"
    fault.healthy = 20.0
    assert fault.on(24.0, 30.0)
    assert not fault.on(26.0, 30.0)


def test_a_slope_is_not_moved_by_wild_samples() -> None:
    draw = random.Random(1)
    at = [10.0 * number for number in range(300)]
    values = [100 + 36 * second / 3600 + draw.gauss(0, 1) for second in at]
    for wild in range(0, 300, 7):
        values[wild] += 500
    assert slope_per_hour(at, values) == pytest.approx(36, abs=4)
    assert slope_per_hour([1.0], [1.0]) == 0.0


def a_run(**grown: float) -> dict[str, Any]:
    """Two hours, in which `heap`, `fds`, `latency` grow by so much in all."""
    held, windows = [], []
    for number in range(720):
        part = number / 720
        for name in STEADY:
            held.append(
                {
                    "at": 10.0 * number, "name": name, "pid": 7,
                    "heap": 100 + part * grown.get("heap", 0),
                    "fds": 20 + round(part * grown.get("fds", 0)), "memfds": 4, "threads": 10,
                }
            )  # fmt: skip
        p50 = 100 * (1 + part * grown.get("latency", 0))
        windows.append({"calm": True, "e2e_ms": {"p50": p50}, "probe_ms": 10.0})
    idle = [{"blocks": {"gpus.0/gpu": int(grown.get("blocks", 0))}}]
    return {"failed": {}, "checked": 1, "idle": idle, "held": held, "windows": windows}


def failed(result: dict[str, Any]) -> set[str]:
    return {check.name.split()[-1] for check in verdict(result) if not check.passed}


def test_verdicts() -> None:
    assert failed(a_run()) == set()
    assert failed(a_run(heap=15)) == set()
    assert failed(a_run(heap=30)) == {"heap"}
    assert failed(a_run(fds=9)) == {"fds"}
    assert failed(a_run(latency=2.5)) == {"latency"}
    assert failed(a_run(blocks=1)) == {"blocks"}
    assert failed(a_run() | {"failed": {"tokens": 1}}) == {"failures"}
    assert failed(a_run() | {"checked": 0}) == {"answers"}
    assert failed(a_run() | {"idle": []}) == {"blocks"}
    assert failed(a_run() | {"held": []}) == set(STEADY)
