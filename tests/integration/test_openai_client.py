"""The `openai` client at a running system, its router and its gpu_service: it gets the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, Literal

import grpc
import openai
import pytest
from pydantic import BaseModel

from neo_client import Client, Sampling
from protos.neo.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from tests.support.load import assert_idle_and_whole
from tests.support.stack import Stack, free_port, running_stack, stack_model

GREEDY: dict[str, Any] = {"model": "m", "temperature": 0, "max_tokens": 12}
MESSAGES: Any = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello!"}]
PROMPT_IDS = [39, 68, 75, 75, 78]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = stack_model(tmp_path_factory.mktemp("parent") / "m")
    own = f"127.0.0.1:{free_port()}"
    with running_stack(tmp_path_factory.mktemp("stack"), model, http_listen=own) as started:
        yield started


@pytest.fixture(scope="module", params=["router", "gpu"])
def url(request: pytest.FixtureRequest, stack: Stack) -> str:
    """Both serve it alike."""
    return f"http://{getattr(stack, request.param).config['http_listen']}/v1"


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def grpc_client(stack: Stack) -> Iterator[Client]:
    with Client(stack.router.address) as made:
        yield made


def greedy(client: Client, prompt: Any, **sampling: Any) -> Any:
    wanted = Sampling(temperature=0.0, max_tokens=12, **sampling)
    return client.generate(prompt, sampling=wanted)


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert model.id == "m"
    assert (model.model_extra or {})["max_model_len"] == 4096
    assert client.models.retrieve("m").id == "m"
    with pytest.raises(openai.NotFoundError) as error:
        client.models.retrieve("other")
    assert error.value.code == "UNKNOWN_MODEL"


def test_a_completion(client: openai.OpenAI, grpc_client: Client) -> None:
    expected = greedy(grpc_client, "Hello")
    answer = client.completions.create(prompt="Hello", **GREEDY)
    (choice,) = answer.choices
    assert choice.text == expected.choices[0].text
    assert choice.finish_reason == "length"
    assert answer.model == "m"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 5
    assert answer.usage.completion_tokens == 12
    assert answer.usage.total_tokens == 17
    assert answer._request_id == answer.id


def test_a_batch_of_token_ids(client: openai.OpenAI, grpc_client: Client) -> None:
    expected = greedy(grpc_client, "Hello").choices[0].text
    batch = [PROMPT_IDS, [1, 2, 3], PROMPT_IDS]
    answer = client.completions.create(prompt=batch, n=2, **GREEDY)
    assert [choice.index for choice in answer.choices] == list(range(6))
    texts = [choice.text for choice in answer.choices]
    assert texts[:2] == texts[4:] == [expected] * 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 13
    assert answer.usage.completion_tokens == 72


@pytest.mark.parametrize("n", [1, 3])
def test_streams_say_the_same(client: openai.OpenAI, n: int) -> None:
    asked: dict[str, Any] = {**GREEDY, "temperature": 1, "seed": 7, "n": n, "messages": MESSAGES}
    whole = client.chat.completions.create(**asked)
    pieces = [""] * n
    ends: dict[int, str] = {}
    usage = None
    for chunk in client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ):
        assert usage is None, "it comes last"
        usage = chunk.usage
        for choice in chunk.choices:
            assert choice.index not in ends
            if not pieces[choice.index] and choice.delta.role:
                assert choice.delta.role == "assistant"
            pieces[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert pieces == [choice.message.content for choice in whole.choices]
    assert ends == {choice.index: choice.finish_reason for choice in whole.choices}
    assert usage is not None
    assert whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert usage.prompt_tokens == whole.usage.prompt_tokens


def test_stop(client: openai.OpenAI) -> None:
    text = client.completions.create(prompt="Hello", **GREEDY).choices[0].text
    (choice,) = client.completions.create(prompt="Hello", stop=[text[2:4]], **GREEDY).choices
    assert choice.text == text[: text.index(text[2:4])]
    assert choice.finish_reason == "stop"
    assert (choice.model_extra or {})["stop_reason"] == text[2:4]


def test_logit_bias_and_penalties(client: openai.OpenAI) -> None:
    (choice,) = client.completions.create(
        prompt="Hello", logit_bias={"65": 100}, frequency_penalty=-2, **GREEDY
    ).choices
    assert choice.text == "b" * 12


def test_chat_logprobs(client: openai.OpenAI, stack: Stack) -> None:
    answer = client.chat.completions.create(
        messages=MESSAGES, logprobs=True, top_logprobs=3, **GREEDY
    )
    with grpc.insecure_channel(stack.router.address) as channel:
        request = inference_pb2.GenerateRequest(
            chat=types_pb2.Chat(messages=[types_pb2.ChatMessage(**m) for m in MESSAGES]),
            sampling=types_pb2.SamplingParams(temperature=0, max_tokens=12, logprobs=3),
        )
        expected = inference_pb2_grpc.InferenceServiceStub(channel).Generate(request, timeout=60)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    entries = expected.choices[0].logprobs
    assert [each.logprob for each in logprobs.content] == pytest.approx(
        [each.logprob for each in entries]
    )
    said = b"".join(bytes(each.bytes or ()) for each in logprobs.content)
    assert said.decode(errors="replace") == answer.choices[0].message.content
    for each, entry in zip(logprobs.content, entries, strict=True):
        assert each.token == bytes(each.bytes or ()).decode(errors="replace")
        assert [top.logprob for top in each.top_logprobs] == pytest.approx(
            [top.logprob for top in entry.top]
        )
        assert each.top_logprobs[0].bytes == each.bytes, "greedy"


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: openai.OpenAI, stream: bool) -> None:
    """As evaluation harnesses ask: the prompt's own log probabilities."""
    asked: dict[str, Any] = {**GREEDY, "prompt": PROMPT_IDS, "echo": True, "logprobs": 2}
    choices = (
        [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
        if stream
        else client.completions.create(**asked).choices
    )
    text = "".join(choice.text for choice in choices)
    assert text.startswith("Hello")
    tokens, values, offsets, tops = [], [], [], []
    for choice in choices:
        assert choice.logprobs is not None
        tokens += choice.logprobs.tokens or []
        values += choice.logprobs.token_logprobs or []
        offsets += choice.logprobs.text_offset or []
        tops += choice.logprobs.top_logprobs or []
    assert tokens[:5] == list("Hello")
    assert len(tokens) == len(values) == len(offsets) == len(tops) == 17
    assert values[0] is None
    assert tops[0] is None
    assert all(value < 0 for value in values[1:])
    assert offsets == [sum(len(token) for token in tokens[:i]) for i in range(17)]
    assert all(tops[i][tokens[i]] >= values[i] - 1e-6 for i in range(1, 17))


def test_scoring_alone(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {**GREEDY, "max_tokens": 0, "echo": True, "logprobs": 0}
    answer = client.completions.create(prompt="Hello", **asked)
    (choice,) = answer.choices
    assert choice.text == "Hello"
    assert choice.logprobs is not None
    assert choice.logprobs.tokens == list("Hello")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0


def test_vllms_extensions(client: openai.OpenAI) -> None:
    extra = {
        "return_token_ids": True, "prompt_logprobs": 1, "top_k": 1, "ignore_eos": True,
        "min_tokens": 12, "repetition_penalty": 1.1, "min_p": 0.1, "priority": 1,
        "cache_salt": "mine", "stop_token_ids": [300],
    }  # fmt: skip
    answer = client.completions.create(prompt="Hello", extra_body=extra, **GREEDY)
    said = answer.choices[0].model_extra or {}
    assert said["prompt_token_ids"] == PROMPT_IDS
    assert len(said["token_ids"]) == 12
    assert said["prompt_logprobs"][0] is None
    assert [
        at[str(token)]["decoded_token"]
        for token, at in zip(PROMPT_IDS[1:], said["prompt_logprobs"][1:], strict=True)
    ] == list("ello")
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES,
            stream=True,
            stream_options={"continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
            **GREEDY,
        )
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage]
    assert counts == sorted(counts)
    assert counts[-1] == 12
    assert len({chunk.usage.prompt_tokens for chunk in chunks if chunk.usage}) == 1


def test_placement_and_what_came_of_it(client: openai.OpenAI) -> None:
    for placement, host in (("cpu-preferred", 12), ("gpu_only", 0)):
        answer = client.chat.completions.create(
            messages=MESSAGES, extra_body={"placement": placement}, **GREEDY
        )
        assert answer.usage is not None
        neo = (answer.usage.model_extra or {})["neo"]
        assert neo["host_tokens"] == host
        assert neo["gpu_tokens"] == 12 - host
        assert neo["ttft_seconds"] > 0


def test_cached_tokens(client: openai.OpenAI, url: str) -> None:
    asked: dict[str, Any] = {**GREEDY, "prompt": url[::-1] * 10}  # nobody's beginning
    first, second = (client.completions.create(**asked) for _ in range(2))
    assert first.usage is not None
    assert first.usage.prompt_tokens_details is not None
    assert first.usage.prompt_tokens_details.cached_tokens == 0
    assert second.usage is not None
    assert second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None
    assert second.usage.prompt_tokens - 32 <= cached < second.usage.prompt_tokens
    assert second.choices[0].text == first.choices[0].text


class Pet(BaseModel):
    animal: Literal["cat", "dog"]
    legs: Literal[3, 4]


def test_structured_output(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="m", messages=MESSAGES, response_format=Pet, max_completion_tokens=600
    )
    assert isinstance(answer.choices[0].message.parsed, Pet)
    answer = client.chat.completions.create(
        model="m", messages=MESSAGES, max_tokens=50, extra_body={"guided_choice": ["yes", "no"]}
    )
    assert answer.choices[0].message.content in ("yes", "no")
    whole = client.chat.completions.create(
        model="m", messages=MESSAGES, max_tokens=400, seed=1,
        response_format={"type": "json_object"},
    )  # fmt: skip
    if whole.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(whole.choices[0].message.content or ""), dict)


REFUSED: list[tuple[dict[str, Any], type[openai.APIStatusError], str, str | None]] = [
    ({"model": "other"}, openai.NotFoundError, "UNKNOWN_MODEL", "model"),
    ({"n": 17}, openai.BadRequestError, "INVALID_ARGUMENT", "n"),
    ({"temperature": -1}, openai.BadRequestError, "INVALID_ARGUMENT", "temperature"),
    ({"top_p": 0}, openai.BadRequestError, "INVALID_ARGUMENT", "top_p"),
    ({"stop": ["x"] * 17}, openai.BadRequestError, "INVALID_ARGUMENT", "stop"),
    ({"logit_bias": {"999999": 1}}, openai.BadRequestError, "INVALID_ARGUMENT", "logit_bias"),
    ({"logprobs": True, "top_logprobs": 21}, openai.BadRequestError, "INVALID_ARGUMENT",
     "logprobs"),
    ({"messages": [{"role": "user", "content": "x" * 10_000}]}, openai.BadRequestError,
     "INVALID_ARGUMENT", "messages"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema":
     {"type": "nothing"}}}}, openai.BadRequestError, "INVALID_ARGUMENT", "structured.json_schema"),
    ({"max_tokens": 1 << 33}, openai.BadRequestError, "INVALID_ARGUMENT", "max_tokens"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, openai.BadRequestError,
     "INVALID_ARGUMENT", "tools"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("given", "kind", "code", "param"), REFUSED, ids=[str(r[0])[:40] for r in REFUSED]
)
def test_refusals(
    client: openai.OpenAI, given: dict[str, Any], kind: type[openai.APIStatusError], code: str,
    param: str | None,
) -> None:  # fmt: skip
    asked: dict[str, Any] = {**GREEDY, "messages": MESSAGES, **given}
    with pytest.raises(kind) as error:
        client.chat.completions.create(**asked)
    assert error.value.code == code
    assert error.value.param == param


async def test_a_stream_that_is_left_frees_its_request(stack: Stack, url: str) -> None:
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        stream = await client.completions.create(
            model="m", prompt="Hello", max_tokens=4000, stream=True,
            extra_body={"ignore_eos": True},
        )  # fmt: skip
        async for _ in stream:
            break
        await stream.close()
    load = await assert_idle_and_whole(stack.gpu.address)
    assert load.host.tokens_total + load.gpu.tokens_total < 4000
