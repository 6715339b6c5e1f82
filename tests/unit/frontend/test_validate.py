"""Every field of a request: its limits, its default, and the name in the error."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_service.frontend.validate import ParsedRequest, ServedModel, parse_request
from neo_common.errors import Reason, ServiceError
from neo_common.grpc import principal
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types

MODEL = ServedModel("tiny", vocab_size=100, max_context_tokens=64)
LONGEST_TEXT = 64 * 10 * 4
"""Characters, of `WordTokenizer`."""


class WordTokenizer:
    """One token a word; chats with a role "bad" are refused."""

    longest_token = 10

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [2 + len(word) for word in text.split()]

    def render_chat(self, messages: list[dict[str, str]]) -> list[int]:
        if any(m["role"] == "bad" for m in messages):
            raise ValueError("role bad is not known")
        return self.encode(" ".join(m["content"] for m in messages))


def parse(request: pb.GenerateRequest, seconds_left: float | None = None) -> ParsedRequest:
    tokenizer: Any = WordTokenizer()
    return asyncio.run(
        parse_request(request, MODEL, tokenizer, now=10.0, seconds_left=seconds_left)
    )


def request(**sampling: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(text="one two", sampling=types.SamplingParams(**sampling))


def changed(change: Callable[[pb.GenerateRequest], None]) -> pb.GenerateRequest:
    message = request()
    change(message)
    return message


def test_defaults() -> None:
    parsed = parse(request())
    spec = parsed.submit.sampling
    assert parsed.submit.prompt_token_ids == [1, 5, 5]
    assert (spec.temperature, spec.top_p, spec.top_k, spec.min_p) == (1.0, 1.0, 0, 0.0)
    assert spec.repetition_penalty == 1.0
    assert (spec.presence_penalty, spec.frequency_penalty) == (0.0, 0.0)
    assert spec.max_tokens == 64 - 3
    assert (spec.min_tokens, spec.n, spec.ignore_eos) == (0, 1, False)
    assert (spec.logprobs, spec.prompt_logprobs) == (None, None)
    assert parsed.submit.placement == "auto"
    assert (parsed.submit.arrival, parsed.submit.deadline) == (10.0, None)
    assert (parsed.detokenize, parsed.skip_special_tokens, parsed.stop) == (True, True, ())


def test_unseeded_requests_get_different_seeds_and_ids() -> None:
    first, second = parse(request()), parse(request())
    assert first.submit.sampling.seed != second.submit.sampling.seed
    assert first.submit.request_id != second.submit.request_id


def test_presence_is_not_value() -> None:
    """A present 0 is a 0, not the default."""
    spec = parse(request(temperature=0, seed=0, logprobs=0)).submit.sampling
    assert (spec.temperature, spec.seed, spec.logprobs) == (0.0, 0, 0)


def test_max_tokens_is_cut_to_the_context() -> None:
    assert parse(request(max_tokens=1000)).submit.sampling.max_tokens == 61
    assert parse(request(max_tokens=5)).submit.sampling.max_tokens == 5


def test_deadline_and_scheduling() -> None:
    message = request()
    message.scheduling.placement = types.PLACEMENT_CPU_PREFERRED
    message.scheduling.priority = -3
    message.scheduling.tpot_ms = 50
    submit = parse(message, seconds_left=2.5).submit
    assert (submit.deadline, submit.placement, submit.priority) == (12.5, "cpu_preferred", -3)
    assert (submit.tpot_ms, submit.ttft_ms) == (50.0, None)


@given(st.text(max_size=20), st.text(max_size=20))
def test_nobody_can_say_a_salt_of_another_tenant(one: str, other: str) -> None:
    def salt(tenant: str, said: str) -> str:
        message = request()
        message.scheduling.cache_salt = said
        context = contextvars.copy_context()
        context.run(principal.enter, principal.ANONYMOUS.for_tenant(tenant))
        return context.run(lambda: parse(message)).submit.cache_salt

    names = {salt(tenant, said) for tenant in ("", "a", "ab") for said in {one, other}}
    assert len(names) == 3 * len({one, other})


NAN, INF = float("nan"), float("inf")
BAD_SAMPLING = [
    *[("temperature", v) for v in (-0.1, NAN, INF)],
    *[("top_p", v) for v in (0, -1, 1.01, NAN)],
    *[("min_p", v) for v in (-0.1, 1.1, NAN)],
    *[("repetition_penalty", v) for v in (0, -1, 1e-30, 1e-4, 1001, 1e38, INF, NAN)],
    *[("presence_penalty", v) for v in (-2.1, 2.1, NAN)],
    *[("frequency_penalty", v) for v in (-2.1, 2.1, NAN)],
    *[("logit_bias", v) for v in ({100: 1.0}, {1: 101.0}, {1: NAN})],
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ("max_tokens", 0),
    ("min_tokens", 62),
    *[("stop", v) for v in ([""], ["x" * 257], ["x"] * 17)],
    *[("stop_token_ids", v) for v in ([100], [1] * 65)],
    *[("n", v) for v in (0, 17)],
    ("logprobs", 21),
    ("prompt_logprobs", 21),
]


@pytest.mark.parametrize(("field", "value"), BAD_SAMPLING)
def test_bad_sampling_names_its_field(field: str, value: Any) -> None:
    with pytest.raises(ServiceError) as caught:
        parse(request(**{field: value}))
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.field == f"sampling.{field}"
    assert field in str(caught.value)


GOOD_SAMPLING = [
    *[("temperature", v) for v in (0, 100)],
    ("top_p", 1),
    *[("min_p", v) for v in (0, 1)],
    *[("presence_penalty", v) for v in (-2, 2)],
    ("logit_bias", {99: -100.0}),
    ("max_tokens", 1),
    ("stop", ["x" * 256] * 16),
    ("stop_token_ids", [99] * 64),
    *[("n", v) for v in (1, 16)],
    *[("logprobs", v) for v in (0, 20)],
    ("seed", 2**64 - 1),
]


@pytest.mark.parametrize(("field", "value"), GOOD_SAMPLING)
def test_limits_themselves_are_allowed(field: str, value: Any) -> None:
    parse(request(**{field: value}))


def set_ids(ids: list[int]) -> Callable[[pb.GenerateRequest], None]:
    return lambda r: r.token_ids.CopyFrom(types.TokenIds(ids=ids))


def set_chat(*messages: tuple[str, str]) -> Callable[[pb.GenerateRequest], None]:
    built = [types.ChatMessage(role=role, content=content) for role, content in messages]
    return lambda r: r.chat.CopyFrom(types.Chat(messages=built))


def set_attribute(path: str, value: Any) -> Callable[[pb.GenerateRequest], None]:
    *parents, name = path.split(".")

    def change(message: Any) -> None:
        for parent in parents:
            message = getattr(message, parent)
        setattr(message, name, value)

    return change


BAD_REQUESTS: list[tuple[str, Callable[[pb.GenerateRequest], None]]] = [
    ("prompt", lambda r: r.ClearField("text")),
    ("text", set_attribute("text", "")),
    ("text", set_attribute("text", "word " * 63)),
    ("text", set_attribute("text", "x" * (LONGEST_TEXT + 1))),
    ("chat.messages.content", set_chat(("user", "x" * LONGEST_TEXT), ("user", "x"))),
    ("chat.messages", set_chat(*[("user", "")] * 65)),
    ("token_ids", set_ids([])),
    ("token_ids", set_ids([1] * 65)),
    ("token_ids", set_ids([100])),
    ("token_ids", set_ids([1] * 64)),
    ("chat.messages", set_chat()),
    ("chat.messages.role", set_chat(("", "hello"))),
    ("chat", set_chat(("bad", "hello"))),
    ("request_id", set_attribute("request_id", "x" * 129)),
    ("scheduling.placement", set_attribute("scheduling.placement", 99)),
    ("scheduling.priority", set_attribute("scheduling.priority", 101)),
    ("scheduling.tpot_ms", set_attribute("scheduling.tpot_ms", 0)),
    ("scheduling.ttft_ms", set_attribute("scheduling.ttft_ms", NAN)),
    ("scheduling.cache_salt", set_attribute("scheduling.cache_salt", "x" * 129)),
]


@pytest.mark.parametrize(("field", "change"), BAD_REQUESTS)
def test_bad_requests_name_their_field(
    field: str, change: Callable[[pb.GenerateRequest], None]
) -> None:
    with pytest.raises(ServiceError) as caught:
        parse(changed(change))
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.field == field


def test_stop_strings_need_text() -> None:
    message = request(stop=["x"])
    message.token_ids_only = True
    with pytest.raises(ServiceError, match="token_ids_only"):
        parse(message)


def test_unknown_model() -> None:
    with pytest.raises(ServiceError) as caught:
        parse(changed(set_attribute("model", "other")))
    assert caught.value.reason is Reason.UNKNOWN_MODEL
    parse(changed(set_attribute("model", "tiny")))


def test_a_long_text_of_few_tokens_is_no_mistake() -> None:
    parse(changed(set_attribute("text", "x" * LONGEST_TEXT)))
    parse(changed(set_chat(("user", "x" * LONGEST_TEXT))))


def test_what_is_far_too_long_is_never_tokenised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(WordTokenizer, "encode")
    for change in (
        set_attribute("text", "x" * (LONGEST_TEXT + 1)),
        set_chat(("user", "x" * (LONGEST_TEXT + 1))),
    ):
        with pytest.raises(ServiceError, match=r"characters, more than the 64 tokens"):
            parse(changed(change))


def test_the_longest_prompt_leaves_one_token() -> None:
    assert parse(changed(set_ids([1] * 63))).submit.sampling.max_tokens == 1
