"""Messages that leave together: never out of order, late or lost; and that they may be joined."""

from __future__ import annotations

import asyncio

import pytest
from google.protobuf.descriptor import FieldDescriptor
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types
from router.joining import MAX_BYTES, Joined, Pace, busy_clock

HOLD = 0.02


class Client:
    """Takes what is written, while `open` is set."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.open = asyncio.Event()
        self.open.set()
        self.fails: Exception | None = None
        self.wrote = asyncio.Event()

    async def write(self, message: bytes) -> None:
        self.written.append(message)
        self.wrote.set()
        await self.open.wait()
        if self.fails is not None:
            raise self.fails


def held(seconds: float = HOLD) -> Pace:
    pace = Pace(1.0)
    pace.hold = seconds
    return pace


async def test_while_there_is_time_each_leaves_at_once() -> None:
    client = Client()
    async with Joined(client.write, held(0.0)) as joined:
        for part in (b"a", b"b"):
            await joined.put(part)
            assert client.written[-1] == part


async def test_the_first_leaves_at_once_and_others_together() -> None:
    client = Client()
    async with Joined(client.write, held()) as joined:
        await joined.put(b"a")
        assert client.written == [b"a"]
        client.wrote.clear()
        await joined.put(b"b")
        await joined.put(b"c")
        assert client.written == [b"a"]
        await asyncio.wait_for(client.wrote.wait(), 10)  # though nothing more came
        assert client.written == [b"a", b"bc"]
        client.wrote.clear()
        await joined.put(b"d")
        await asyncio.wait_for(client.wrote.wait(), 10)
    assert client.written == [b"a", b"bc", b"d"]


async def test_the_end_does_not_wait() -> None:
    client = Client()
    async with Joined(client.write, held(60.0)) as joined:
        for part in (b"a", b"b", b"c"):
            await joined.put(part)
    assert client.written == [b"a", b"bc"]


async def test_an_error_of_the_call_comes_behind_its_messages() -> None:
    client = Client()

    async def fails() -> None:
        async with Joined(client.write, held(60.0)) as joined:
            await joined.put(b"a")
            await joined.put(b"b")
            raise LookupError

    with pytest.raises(LookupError):
        await fails()
    assert client.written == [b"a", b"b"]


async def test_a_cancelled_stream_writes_nothing_more() -> None:
    client = Client()

    async def stream() -> None:
        async with Joined(client.write, held()) as joined:
            await joined.put(b"a")
            client.open.clear()
            client.wrote.clear()
            await joined.put(b"b")
            await asyncio.sleep(60)

    task = asyncio.create_task(stream())
    await asyncio.wait_for(client.wrote.wait(), 10)
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    client.open.set()
    await asyncio.sleep(2 * HOLD)
    assert client.written in ([b"a"], [b"a", b"b"])
    assert len(asyncio.all_tasks()) == 1, "no task is left behind"


async def test_a_slow_client_holds_the_engine_up() -> None:
    """No more than MAX_BYTES and a message wait; then `put` does."""
    client = Client()
    client.open.clear()
    taken = 0

    async def feed() -> None:
        nonlocal taken
        async with Joined(client.write, held(0.001)) as joined:
            for _ in range(100):
                await joined.put(b"x" * 1024)
                taken += 1

    task = asyncio.create_task(feed())
    await asyncio.sleep(0.2)
    assert taken <= MAX_BYTES // 1024 + 2
    assert not task.done()
    client.open.set()
    await asyncio.wait_for(task, 10)
    assert sum(map(len, client.written)) == 100 * 1024


async def test_a_failed_write_is_told() -> None:
    client = Client()

    async def stream() -> None:
        async with Joined(client.write, held()) as joined:
            await joined.put(b"a")
            client.fails = ConnectionError()
            client.wrote.clear()
            await joined.put(b"b")
            await asyncio.wait_for(client.wrote.wait(), 10)
            await joined.put(b"c")

    with pytest.raises(ConnectionError):
        await stream()
    assert client.written[:2] == [b"a", b"b"]


@given(
    st.lists(
        st.tuples(st.binary(max_size=9000), st.sampled_from([0.0, 0.0005, 0.004])), max_size=30
    ),
    st.sampled_from([0.0, 0.001, 0.003]),
    st.sampled_from([0.0, 0.002]),
)
@settings(max_examples=40, deadline=None)
def test_nothing_is_lost_or_out_of_order(
    parts: list[tuple[bytes, float]], hold: float, slowness: float
) -> None:
    written: list[bytes] = []
    writing = 0

    async def write(message: bytes) -> None:
        nonlocal writing
        writing += 1
        assert writing == 1, "gRPC takes one message at a time"
        await asyncio.sleep(slowness)
        written.append(message)
        writing -= 1

    async def go() -> None:
        pace = held(hold)
        async with Joined(write, pace) as joined:
            for number, (part, pause) in enumerate(parts):
                pace.hold = hold if number % 7 else 0.0
                await joined.put(part)
                await asyncio.sleep(pause)

    asyncio.run(asyncio.wait_for(go(), 60))
    assert b"".join(written) == b"".join(part for part, _ in parts)
    assert len(written) <= len(parts)


# The pace ---------------------------------------------------------------------------------------


def paced(parts: list[float]) -> list[float]:
    """Holds after intervals in which the thread was busy for these parts of the time."""
    now = busy = 0.0
    pace = Pace(0.04, busy=lambda: busy, clock=lambda: now)
    pace._busy = lambda: busy
    holds = []
    for part in parts:
        now += 0.05
        busy += 0.05 * part
        pace.look()
        holds.append(pace.hold)
    return holds


def test_the_hold_follows_how_busy_the_thread_is() -> None:
    holds = paced([0.5, 0.8, 1.0, 1.0])
    assert holds[:2] == [0.0, 0.0]
    assert 0 < holds[2] < holds[3]
    assert paced([1.0] * 30)[-1] == 0.04, "at most"
    assert paced([1.0] * 30 + [0.7] * 30)[-1] == 0.04, "neither idle nor too busy: as it is"
    assert paced([1.0] * 30 + [0.5] * 30)[-1] == 0.0


def test_the_busy_clock_runs_with_work() -> None:
    busy = busy_clock()
    before = busy()
    sum(number * number for number in range(300_000))
    assert busy() > before


async def test_without_a_limit_nothing_is_ever_held() -> None:
    pace = Pace(0.0)
    pace.start()
    assert pace.hold == 0.0
    pace.stop()


# Whether messages may be joined -----------------------------------------------------------------

SAME_EACH_TIME = {"request_id"}
"""Singular fields of which the last one wins."""
IN_ONE_MESSAGE_ONLY = {"usage"}
"""Singular messages, which would be merged field by field."""

CHOICES = st.builds(
    inference.Choice,
    index=st.integers(0, 3),
    text=st.text(max_size=5),
    token_ids=st.lists(st.integers(0, 2**32 - 1), max_size=3),
    logprobs=st.lists(
        st.builds(types.TokenLogprobs, token_id=st.integers(0, 9), rank=st.integers(0, 9)),
        max_size=2,
    ),
    finish_reason=st.sampled_from([0, 1, 2, 3]),
    stop_string=st.text(max_size=3),
)
MESSAGES = st.builds(
    inference.GenerateStreamResponse,
    request_id=st.just("r1"),
    deltas=st.lists(CHOICES, max_size=3),
    prompt_logprobs=st.lists(
        st.builds(types.TokenLogprobs, token_id=st.integers(0, 9)), max_size=2
    ),
)


def test_every_field_was_thought_about() -> None:
    """A field that is added to the message must be of one of these kinds, or the router must stop
    joining messages."""
    for field in inference.GenerateStreamResponse.DESCRIPTOR.fields:
        repeated = field.is_repeated
        assert repeated or field.name in SAME_EACH_TIME | IN_ONE_MESSAGE_ONLY, field.name
        if field.name in IN_ONE_MESSAGE_ONLY:
            assert field.type == FieldDescriptor.TYPE_MESSAGE


@given(st.lists(MESSAGES, min_size=1, max_size=6), st.booleans())
def test_bytes_in_a_row_are_the_message_that_holds_all(
    messages: list[inference.GenerateStreamResponse], ends: bool
) -> None:
    usage = types.Usage(prompt_tokens=5, completion_tokens=7, queue_seconds=0.5)
    if ends:
        messages[-1].usage.CopyFrom(usage)
    data = b"".join(message.SerializeToString() for message in messages)
    joined = inference.GenerateStreamResponse.FromString(data)
    assert list(joined.deltas) == [delta for message in messages for delta in message.deltas]
    assert list(joined.prompt_logprobs) == [
        logprob for message in messages for logprob in message.prompt_logprobs
    ]
    assert joined.request_id == "r1"
    assert joined.HasField("usage") == ends
    assert not ends or joined.usage == usage
    fields = {field.name for field in inference.GenerateStreamResponse.DESCRIPTOR.fields}
    assert fields == {"request_id", "deltas", "usage", "prompt_logprobs"}, "and test new ones here"


async def test_a_look_that_finds_no_descriptor_is_made_up_for() -> None:
    """The next one spans both times; the timer goes on, and the loop's handler hears of nothing."""
    failing = True
    looks = asyncio.Event()

    def busy() -> float:
        looks.set()
        if failing:
            raise OSError("too many open files")
        return 0.0

    heard: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: heard.append(context))
    pace = Pace(0.04, busy=lambda: 0.0)
    pace.start()
    pace._busy = busy
    for failing in (True, False):  # noqa: B007 -- `busy` sees it
        looks.clear()
        await asyncio.wait_for(looks.wait(), 30)
    pace.stop()
    assert not heard
