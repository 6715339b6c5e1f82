"""Tokens in, deltas out: text, stop strings, logprobs and finish reasons in step."""

from __future__ import annotations

from typing import Any

from gpu_service.engine.messages import ChoiceDelta, TokenLogprob
from gpu_service.frontend.choice import ChoiceStream
from protos.neo.v1 import types_pb2 as types


class Letters:
    """Token i is the letter chr(97 + i)."""

    def step(self, token_id: int) -> str:
        return chr(97 + token_id)

    def flush(self) -> str:
        return ""


def choice(*stop: str, text: bool = True) -> ChoiceStream:
    detokenizer: Any = Letters() if text else None
    return ChoiceStream(0, detokenizer, stop)


def delta(ids: list[int], **more: Any) -> ChoiceDelta:
    return ChoiceDelta("r", 0, ids, **more)


def test_deltas_are_coalesced_and_taken_once() -> None:
    stream = choice()
    assert not stream.take_in(delta([0]))
    assert not stream.take_in(delta([1]))
    out = stream.take_out()
    assert out is not None
    assert (out.text, list(out.token_ids), out.finish_reason) == ("ab", [0, 1], 0)
    assert stream.take_out() is None


def test_the_stopping_token_has_no_text() -> None:
    stream = choice()
    assert not stream.take_in(delta([0, 1], finish="stop", stop_token_id=1))
    out = stream.take_out()
    assert out is not None
    assert (out.text, list(out.token_ids)) == ("a", [0, 1])
    assert out.finish_reason == types.FINISH_REASON_STOP
    assert out.stop_token_id == 1


def test_end_of_sequence_names_no_stop() -> None:
    stream = choice()
    stream.take_in(delta([0], finish="stop"))
    out = stream.take_out()
    assert out is not None
    assert out.WhichOneof("stopped_by") is None


def test_stop_string_across_deltas_tells_the_engine_once() -> None:
    stream = choice("bc")
    assert not stream.take_in(delta([0, 1]))
    first = stream.take_out()
    assert first is not None
    assert (first.text, list(first.token_ids)) == ("a", [0, 1])
    assert stream.take_in(delta([2, 3]))
    second = stream.take_out()
    assert second is not None
    assert (second.text, list(second.token_ids)) == ("", [2])
    assert second.stop_string == "bc"
    assert second.finish_reason == types.FINISH_REASON_STOP
    assert stream.tokens == 3
    assert not stream.take_in(delta([4, 5])), "the engine knows already"
    assert stream.take_out() is None


def test_held_back_text_comes_out_at_the_end() -> None:
    stream = choice("bcd")
    stream.take_in(delta([0, 1, 2], finish="length"))
    out = stream.take_out()
    assert out is not None
    assert out.text == "abc"
    assert out.finish_reason == types.FINISH_REASON_LENGTH


def test_logprobs_follow_the_tokens() -> None:
    stream = choice("b")
    logprobs = [TokenLogprob(i, -float(i), 1, [(i, -float(i))]) for i in range(3)]
    stream.take_in(delta([0, 1, 2], logprobs=logprobs))
    out = stream.take_out()
    assert out is not None
    assert list(out.token_ids) == [0, 1]
    assert [item.token_id for item in out.logprobs] == [0, 1]
    assert out.logprobs[1].top[0].token_id == 1


def test_token_ids_only() -> None:
    stream = choice(text=False)
    stream.take_in(delta([0, 1], finish="length"))
    out = stream.take_out()
    assert out is not None
    assert (out.text, list(out.token_ids)) == ("", [0, 1])
