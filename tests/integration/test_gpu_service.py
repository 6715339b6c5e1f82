"""A real gpu_service (no host tier) and what its API promises, RPC by RPC."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neo_common.errors import ErrorDetails
from protos.neo.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    inference_pb2_grpc,
    machine_pb2,
    machine_pb2_grpc,
    types_pb2,
)
from protos.neo.v1 import inference_pb2 as pb
from tests.support.load import assert_idle_and_whole, watch_load
from tests.support.stack import Service, free_port, stack_model

PROMPT = types_pb2.TokenIds(ids=list(range(3, 30)))


def new_service(directory: Path, path: Path, /, **config: object) -> Service:
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "listen": address, "model": str(path), "device": "cpu", "dtype": "float32",
        "threads": 1, "gpu_kv_blocks": 64, "served_model_name": "tiny", "offload": "never",
        **config,
    }  # fmt: skip
    return Service("gpu_service", address, settings, directory)


@contextlib.contextmanager
def running(service: Service) -> Iterator[Service]:
    service.start()
    try:
        service.wait_serving()
        yield service
    finally:
        service.stop()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stack_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Service]:
    with running(new_service(tmp_path_factory.mktemp("gpu"), model)) as started:
        yield started


@pytest.fixture
async def channel(service: Service) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(service.address) as opened:
        yield opened


@pytest.fixture
def inference(channel: grpc.aio.Channel) -> Any:
    return inference_pb2_grpc.InferenceServiceStub(channel)


@pytest.fixture
def engine(channel: grpc.aio.Channel) -> Any:
    return engine_pb2_grpc.EngineServiceStub(channel)


def request(**sampling: Any) -> pb.GenerateRequest:
    settings = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True, **sampling}
    return pb.GenerateRequest(token_ids=PROMPT, sampling=types_pb2.SamplingParams(**settings))


async def fails(call: Any) -> tuple[grpc.StatusCode, ErrorDetails]:
    async def exhaust() -> None:
        if hasattr(call, "__await__"):
            await call
        else:
            async for _ in call:
                pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await exhaust()
    return caught.value.code(), ErrorDetails(caught.value)


async def test_generate(inference: Any) -> None:
    response = await inference.Generate(request())
    (choice,) = response.choices
    assert len(choice.token_ids) == 12
    assert choice.finish_reason == types_pb2.FINISH_REASON_LENGTH
    assert choice.text
    assert response.usage.prompt_tokens == len(PROMPT.ids)
    assert response.usage.completion_tokens == response.usage.gpu_tokens == 12
    assert response.usage.ttft_seconds > 0
    assert response.model == "tiny"


async def test_stream_equals_unary(inference: Any) -> None:
    whole = await inference.Generate(request())
    tokens, text, usages = [], "", 0
    async for message in inference.GenerateStream(request()):
        for delta in message.deltas:
            tokens += delta.token_ids
            text += delta.text
        usages += message.HasField("usage")
    assert (tokens, text) == (list(whole.choices[0].token_ids), whole.choices[0].text)
    assert usages == 1


async def test_text_and_chat_prompts(inference: Any) -> None:
    sampling = types_pb2.SamplingParams(max_tokens=3)
    chat = types_pb2.Chat(messages=[types_pb2.ChatMessage(role="user", content="hello")])
    for prompt in (pb.GenerateRequest(text="hello"), pb.GenerateRequest(chat=chat)):
        prompt.sampling.CopyFrom(sampling)
        response = await inference.Generate(prompt)
        assert 1 <= response.usage.completion_tokens <= 3
    tokens = await inference.Tokenize(pb.TokenizeRequest(chat=chat))
    assert response.usage.prompt_tokens == len(tokens.token_ids)


async def test_stop_string_and_stop_token(inference: Any) -> None:
    whole = (await inference.Generate(request())).choices[0]
    stop = whole.text[4:6]
    stopped = (await inference.Generate(request(stop=[stop]))).choices[0]
    assert stopped.text == whole.text[: whole.text.find(stop)]
    assert stopped.finish_reason == types_pb2.FINISH_REASON_STOP
    assert stopped.stop_string == stop
    assert list(stopped.token_ids) == list(whole.token_ids)[: len(stopped.token_ids)]
    token = whole.token_ids[5]
    first = list(whole.token_ids).index(token)
    by_token = (await inference.Generate(request(stop_token_ids=[token]))).choices[0]
    assert list(by_token.token_ids) == list(whole.token_ids)[: first + 1]
    assert by_token.stop_token_id == token


async def test_choices_logprobs_and_seeds(inference: Any) -> None:
    settings = {"temperature": 1.0, "seed": 7, "n": 3, "logprobs": 2, "prompt_logprobs": 1}
    first = await inference.Generate(request(**settings))
    again = await inference.Generate(request(**settings))
    assert [list(c.token_ids) for c in first.choices] == [list(c.token_ids) for c in again.choices]
    assert len({tuple(c.token_ids) for c in first.choices}) == 3
    alone = await inference.Generate(request(temperature=1.0, seed=8))
    assert list(alone.choices[0].token_ids) == list(first.choices[1].token_ids)
    for choice in first.choices:
        assert [item.token_id for item in choice.logprobs] == list(choice.token_ids)
        assert all(len(item.top) == 2 and item.logprob <= 0 for item in choice.logprobs)
    assert len(first.prompt_logprobs) == len(PROMPT.ids) - 1
    assert [item.token_id for item in first.prompt_logprobs] == list(PROMPT.ids)[1:]
    assert all(math.isfinite(item.logprob) for item in first.prompt_logprobs)
    assert first.usage.completion_tokens == 36
    assert first.usage.cached_prompt_tokens > 0


async def test_what_was_computed_is_found_again_by_the_same_tenant(
    inference: Any, engine: Any
) -> None:
    prompt = types_pb2.TokenIds(ids=list(range(40, 90)))

    def prompt_of(ids: types_pb2.TokenIds, max_tokens: int) -> Any:
        asked = request(max_tokens=max_tokens)
        asked.token_ids.CopyFrom(ids)
        return asked

    async def ask(tenant: str, salt: str = "") -> int:
        asked = prompt_of(prompt, 2)
        asked.scheduling.cache_salt = salt
        usage = (await inference.Generate(asked, metadata=[("x-neo-tenant", tenant)])).usage
        assert usage.cached_prompt_tokens == usage.prefix_hit_tokens
        return int(usage.prefix_hit_tokens)

    before = (await engine.GetLoad(engine_pb2.GetLoadRequest())).load
    assert [await ask("a"), await ask("a")] == [0, 48]
    assert [await ask("b"), await ask("a", "s"), await ask("b", "s")] == [0, 0, 0]
    assert [await ask("b"), await ask("a", "s")] == [48, 48]
    after = (await engine.GetLoad(engine_pb2.GetLoadRequest())).load
    assert after.prefix_query_tokens_total - before.prefix_query_tokens_total == 7 * 50
    assert after.prefix_hit_tokens_total - before.prefix_hit_tokens_total == 3 * 48
    await engine.ResetPrefixCache(engine_pb2.ResetPrefixCacheRequest())
    assert [await ask("a"), await ask("a"), await ask("a", "s")] == [0, 48, 0]
    running = inference.GenerateStream(prompt_of(prompt, 900))
    await running.read()
    await engine.ResetPrefixCache(engine_pb2.ResetPrefixCacheRequest())
    # What it has computed and goes on to compute is for nobody that comes later.
    assert await ask("") == 0
    running.cancel()


async def test_abort_ends_the_stream(inference: Any, service: Service) -> None:
    endless = request(max_tokens=900)
    endless.request_id = "to-abort"
    stream = inference.GenerateStream(endless)
    first = await stream.read()
    assert first.request_id == "to-abort"
    code, details = await fails(inference.GenerateStream(endless))
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert details.reason == "DUPLICATE_REQUEST_ID"
    await inference.Abort(pb.AbortRequest(request_id="to-abort"))
    last = first
    while (message := await stream.read()) is not grpc.aio.EOF:
        last = message
    assert last.HasField("usage")
    assert last.usage.completion_tokens < 900
    await assert_idle_and_whole(service.address)


async def test_a_slow_reader_holds_up_nobody(inference: Any, service: Service) -> None:
    """Its request runs to its end, and what it has not taken comes in fewer, larger messages:
    nothing lost, nothing twice."""
    settings = {"n": 8, "temperature": 1.0, "seed": 5, "logprobs": 20, "max_tokens": 100}
    whole = await inference.Generate(request(**settings))
    # A window of 64 KiB, where gRPC would let it grow to megabytes.
    options = (("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 65536))
    async with grpc.aio.insecure_channel(service.address, options=options) as narrow:
        slow: Any = inference_pb2_grpc.InferenceServiceStub(narrow)
        stream = slow.GenerateStream(request(**settings))
        messages = [await stream.read()]
        assert len((await inference.Generate(request())).choices[0].token_ids) == 12
        await assert_idle_and_whole(service.address)
        while (message := await stream.read()) is not grpc.aio.EOF:
            messages.append(message)
    for choice in whole.choices:
        deltas = [d for m in messages for d in m.deltas if d.index == choice.index]
        assert [t for d in deltas for t in d.token_ids] == list(choice.token_ids)
        assert [p for d in deltas for p in d.logprobs] == list(choice.logprobs)
        assert "".join(d.text for d in deltas) == choice.text
    assert max(len(d.token_ids) for m in messages for d in m.deltas) > 1, "nothing was merged"


async def test_refused_requests_hurt_nobody(inference: Any) -> None:
    """Each names its field; the engine goes on."""
    bad = {
        "sampling.n": request(n=0),
        "sampling.top_p": request(top_p=2.0),
        "token_ids": pb.GenerateRequest(token_ids=types_pb2.TokenIds(ids=[10**6])),
        "text": pb.GenerateRequest(text=""),
        "model": pb.GenerateRequest(text="x", model="other"),
    }
    for field, message in bad.items():
        for call in (inference.Generate(message), inference.GenerateStream(message)):
            code, details = await fails(call)
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert details.fields == [field]
    too_long = pb.GenerateRequest(token_ids=types_pb2.TokenIds(ids=[3] * 5000))
    code, details = await fails(inference.Generate(too_long))
    assert (code, details.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["token_ids"])
    assert len((await inference.Generate(request())).choices[0].token_ids) == 12


async def test_an_absurd_number_of_choices_costs_nothing(inference: Any) -> None:
    """Refused before anything is made for each of them."""
    for call in (inference.Generate, inference.GenerateStream):
        code, details = await fails(call(request(n=5_000_000), timeout=1.0))
        assert (code, details.fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["sampling.n"])


async def test_models_and_tokens(inference: Any) -> None:
    (listed,) = (await inference.ListModels(pb.ListModelsRequest())).models
    assert (listed.name, listed.family, listed.dtype) == ("tiny", "llama", "float32")
    assert (await inference.GetModel(pb.GetModelRequest(model="tiny"))).model == listed
    ids = (await inference.Tokenize(pb.TokenizeRequest(text="hello"))).token_ids
    assert (await inference.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == "hello"
    both = await inference.Detokenize(pb.DetokenizeRequest(token_ids=ids, token_bytes=True))
    assert len(both.token_bytes) == len(ids)
    assert (both.text, b"".join(both.token_bytes)) == ("hello", b"hello")


async def test_every_other_rpc_refuses_bad_input(inference: Any, engine: Any) -> None:
    """ListModels, GetLoad, GetInfo and Drain take empty messages: malformed bytes are theirs."""
    bad = [
        inference.GetModel(pb.GetModelRequest(model="other")),
        inference.Tokenize(pb.TokenizeRequest()),
        inference.Detokenize(pb.DetokenizeRequest(token_ids=[10**6])),
        inference.Abort(pb.AbortRequest()),
        engine.WatchLoad(engine_pb2.WatchLoadRequest(interval_ms=5)),
    ]
    for call in bad:
        assert (await fails(call))[0] == grpc.StatusCode.INVALID_ARGUMENT
    unknown = inference.Abort(pb.AbortRequest(request_id="nobody"))
    assert (await fails(unknown))[0] == grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    "method",
    [
        f"/{service.full_name}/{method.name}"
        for file in (pb.DESCRIPTOR, engine_pb2.DESCRIPTOR, machine_pb2.DESCRIPTOR)
        for service in file.services_by_name.values()
        for method in service.methods
    ],
)
async def test_malformed_bytes(channel: grpc.aio.Channel, method: str) -> None:
    streaming = method.endswith(("GenerateStream", "WatchLoad"))
    call = channel.unary_stream(method) if streaming else channel.unary_unary(method)
    assert (await fails(call(b"\xff")))[0] == grpc.StatusCode.INVALID_ARGUMENT


async def test_load_and_info(engine: Any) -> None:
    load = (await engine.GetLoad(engine_pb2.GetLoadRequest())).load
    assert load.state == engine_pb2.ENGINE_STATE_SERVING
    assert load.host_tier_state == engine_pb2.HOST_TIER_STATE_OFF
    assert load.gpu.total_blocks == 64
    stream = engine.WatchLoad(engine_pb2.WatchLoadRequest(interval_ms=10))
    first, second = await stream.read(), await stream.read()
    stream.cancel()
    assert second.load.sequence > first.load.sequence
    info = await engine.GetInfo(engine_pb2.GetInfoRequest())
    assert (info.model, info.device, info.dtype, info.offload) == (
        "tiny",
        "cpu",
        "float32",
        "never",
    )
    assert "gpu_kv_blocks: 64" in info.config
    assert info.instance_id == first.load.instance_id


async def test_machine(channel: grpc.aio.Channel) -> None:
    stub: Any = machine_pb2_grpc.MachineServiceStub(channel)
    machine = (await stub.GetMachine(machine_pb2.GetMachineRequest())).machine
    assert machine.available_bytes > 0
    assert list(machine.allowed_cpus)


async def test_the_front_end_has_no_torch(service: Service) -> None:
    assert service.process is not None
    front_end = psutil.Process(service.process.pid)
    (core,) = front_end.children()
    assert not any("libtorch" in mapped.path for mapped in front_end.memory_maps())
    assert any("libtorch" in mapped.path for mapped in core.memory_maps())


async def test_drain_rpc_then_sigterm(tmp_path: Path, model: Path) -> None:
    """Live streams finish, new ones are refused, health says NOT_SERVING, exit code 0."""
    with running(new_service(tmp_path, model)) as service:
        async with grpc.aio.insecure_channel(service.address) as channel:
            inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            engine: Any = engine_pb2_grpc.EngineServiceStub(channel)
            stream = inference.GenerateStream(request(max_tokens=900))
            await stream.read()
            load = await load_of(channel)
            assert list(load.models) == ["tiny"]
            assert load.prompt_tokens_per_second > 0
            assert load.gpu.token_seconds > 0
            assert (await engine.Drain(engine_pb2.DrainRequest())).live_requests == 1
            code, details = await fails(inference.Generate(request()))
            assert (code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "DRAINING")
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
            service.signal(signal.SIGTERM)
            tokens = 0
            while (message := await stream.read()) is not grpc.aio.EOF:
                tokens += sum(len(delta.token_ids) for delta in message.deltas)
                usage = message.usage
            assert usage.completion_tokens == 900
        assert await asyncio.to_thread(service.wait_exit) == 0


async def test_a_drain_while_the_model_loads_lasts(tmp_path: Path, model: Path) -> None:
    """The service must not come up SERVING for a router that it refuses everything."""
    service = new_service(tmp_path, model)
    service.start()
    try:
        async with grpc.aio.insecure_channel(service.address) as channel:
            engine: Any = engine_pb2_grpc.EngineServiceStub(channel)
            drained = engine.Drain(engine_pb2.DrainRequest(), wait_for_ready=True, timeout=60)
            assert (await drained).live_requests == 0
            assert (await load_of(channel)).state == engine_pb2.ENGINE_STATE_DRAINING
            assert "serving tiny" not in service.log
            async for load in watch_load(service.address, 20):
                if load.gpu.total_blocks:  # the engine core reports: it has been loaded
                    break
            assert load.state == engine_pb2.ENGINE_STATE_DRAINING
            health: Any = health_pb2_grpc.HealthStub(channel)
            answer = await health.Check(health_pb2.HealthCheckRequest())
            assert answer.status == health_pb2.HealthCheckResponse.NOT_SERVING
    finally:
        service.stop()


async def test_engine_core_death(tmp_path: Path, model: Path) -> None:
    """Streams end with UNAVAILABLE; the service ends non-zero, for its supervisor to restart."""
    with running(new_service(tmp_path, model)) as service:
        assert service.process is not None
        (core,) = psutil.Process(service.process.pid).children()
        async with grpc.aio.insecure_channel(service.address) as channel:
            inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            stream = inference.GenerateStream(request(max_tokens=900))
            waiting = asyncio.create_task(fails(stream))
            while not service_has_started(await load_of(channel)):
                pass
            core.kill()
            code, details = await asyncio.wait_for(waiting, 10)
            assert (code, details.reason) == (grpc.StatusCode.UNAVAILABLE, "ENGINE_LOST")
        assert await asyncio.to_thread(service.wait_exit) == 1
        assert "the engine core ended unexpectedly (signal 9)" in service.log
        assert "Traceback" not in service.log


async def load_of(channel: grpc.aio.Channel) -> engine_pb2.LoadSnapshot:
    stub: Any = engine_pb2_grpc.EngineServiceStub(channel)
    load: engine_pb2.LoadSnapshot = (await stub.GetLoad(engine_pb2.GetLoadRequest())).load
    return load


def service_has_started(load: engine_pb2.LoadSnapshot) -> bool:
    return load.gpu.running_requests > 0


async def test_the_core_dies_with_its_front_end(tmp_path: Path, model: Path) -> None:
    with running(new_service(tmp_path, model)) as service:
        assert service.process is not None
        (core,) = psutil.Process(service.process.pid).children()
        service.signal(signal.SIGKILL)
        assert await asyncio.to_thread(service.wait_exit) == -signal.SIGKILL
        await asyncio.to_thread(core.wait, 10)


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        ({"model": "no/such/model"}, "does not exist"),
        ({"model": ""}, "model must be given"),
        ({"offload": "sometimes"}, "offload must be one of"),
        ({"listen": "nonsense"}, "HOST:PORT"),
        ({"max_context_tokens": 10**6}, "max_context_tokens"),
        ({"block_tokens": 17}, "block_tokens must be one of"),
        ({"gpu_kv_blcoks": 1}, "did you mean gpu_kv_blocks"),
    ],
)
def test_refuses_to_start_with_one_sentence(
    tmp_path: Path, model: Path, config: dict[str, object], sentence: str
) -> None:
    service = new_service(tmp_path, model, **config)
    service.start()
    assert service.wait_exit(60) == 2
    assert sentence in service.log
    assert "Traceback" not in service.log


def test_a_port_in_use(tmp_path: Path, model: Path, service: Service) -> None:
    second = new_service(tmp_path, model, listen=service.address)
    second.start()
    assert second.wait_exit(60) == 2
    # gRPC's core has its own say before.
    sentence = f"gpu_service: listen: {service.address} cannot be bound"
    assert second.log.splitlines()[-1].startswith(sentence)
    assert "Traceback" not in second.log


def test_truncated_weights(tmp_path: Path, model: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in model.iterdir():
        data = file.read_bytes()
        (broken / file.name).write_bytes(data[:-1000] if file.suffix == ".safetensors" else data)
    service = new_service(tmp_path, broken)
    service.start()
    assert service.wait_exit(60) == 2
    assert "Traceback" not in service.log
    assert "safetensors" in service.log
