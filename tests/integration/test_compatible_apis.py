"""Other projects' own clients against a running system, at a gpu_service and through the router.

The clients run in processes of their own (tests/support/clients) and report what they found.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos.compat import kserve_pb2, kserve_pb2_grpc, vllm_engine_pb2
from protos.neo.v1 import inference_pb2, inference_pb2_grpc, types_pb2
from tests.support.clients import run_client
from tests.support.stack import Stack, running_stack, stack_model

PROMPT = "the quick brown fox"
IDS = [3, 4, 5, 6, 7, 8]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    directory = tmp_path_factory.mktemp("stack")
    model = stack_model(tmp_path_factory.mktemp("model"))
    with running_stack(directory, model, served_model_name="tiny") as started:
        yield started


@pytest.fixture(scope="module", params=["gpu_service", "router"])
def address(request: pytest.FixtureRequest, stack: Stack) -> str:
    return stack.gpu.address if request.param == "gpu_service" else stack.router.address


@pytest.fixture(scope="module")
def triton(address: str) -> dict[str, Any]:
    return run_client("triton", address)


@pytest.fixture(scope="module")
def vllm(address: str) -> dict[str, Any]:
    return run_client("vllm", address)


@pytest.fixture(scope="module")
def native(stack: Stack) -> inference_pb2_grpc.InferenceServiceStub:
    return inference_pb2_grpc.InferenceServiceStub(grpc.insecure_channel(stack.gpu.address))


def greedy(tokens: int = 6) -> types_pb2.SamplingParams:
    return types_pb2.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)


@pytest.fixture(scope="module")
def expected_text(native: Any) -> str:
    request = inference_pb2.GenerateRequest(text=PROMPT, sampling=greedy())
    return native.Generate(request, timeout=60).choices[0].text


@pytest.fixture(scope="module")
def expected_ids(native: Any) -> list[int]:
    request = inference_pb2.GenerateRequest(
        token_ids=types_pb2.TokenIds(ids=IDS), sampling=greedy()
    )
    return list(native.Generate(request, timeout=60).choices[0].token_ids)


# tritonclient ------------------------------------------------------------------------------------


def test_triton_describes_the_model(triton: dict[str, Any]) -> None:
    found = triton["described"]
    assert all(found[name] for name in ("live", "ready", "model_ready", "decoupled"))
    assert found["server"] == "neo-serving"
    assert found["index"] == [["tiny", "READY"]]
    assert {"text_input", "input_ids", "sampling_parameters", "stream"} <= set(found["inputs"])
    assert "text_output" in found["outputs"]


def test_triton_infers(triton: dict[str, Any], expected_text: str) -> None:
    found = triton["infer"]
    assert found["id"] == "seven"
    assert found["texts"] == [expected_text] * 2  # n = 2, greedy
    assert found["reasons"] == ["length"] * 2
    assert found["tokens"] == [6, 6]
    assert found["prompt_tokens"] == [len(PROMPT)]  # the test model's tokens are bytes
    assert [len(tokens) for tokens in found["logprobs"]] == [6, 6]
    assert all(entry["rank"] == 1 for token in found["logprobs"][0] for entry in token.values())


def test_triton_takes_tensors(triton: dict[str, Any], expected_text: str) -> None:
    assert triton["tensors"]["tokens"] == [3]
    (whole,) = triton["tensors"]["whole"]
    assert whole.startswith(PROMPT)
    assert expected_text.startswith(whole.removeprefix(PROMPT))


def test_triton_streams(triton: dict[str, Any], expected_text: str) -> None:
    found = triton["stream"]
    assert "".join(found["a"]) == expected_text
    assert len(found["a"]) > 1
    assert found["b"] == [expected_text]
    assert "no_such_parameter" in found["error"]
    # "b" asked for an empty last answer, "a" did not.
    assert sorted(found["finals"]) == [["a", 1], ["b", 0]]


def test_triton_is_refused(triton: dict[str, Any]) -> None:
    found = dict(triton["refused"])
    assert found.pop("loading").startswith("StatusCode.UNIMPLEMENTED")
    named = {
        "model": "'another'", "version": "'2'", "parameter": "temperature", "type": "max_tokens",
        "prompt": "text_input", "streamed": "stream", "output": "'no_such'",
    }  # fmt: skip
    assert found.keys() == named.keys()
    for name, what in named.items():
        assert found[name].startswith("StatusCode.INVALID_ARGUMENT"), name
        assert what in found[name]


# smg-grpc-proto ----------------------------------------------------------------------------------


def test_vllm_describes_the_engine(vllm: dict[str, Any]) -> None:
    found = vllm["described"]
    assert found["HealthCheck"] == {"healthy": True, "message": "serving"}
    assert found["GetModelInfo"]["served_model_name"] == "tiny"
    assert found["GetModelInfo"]["max_context_length"] == 4096
    assert found["GetModelInfo"]["is_generation"]
    assert found["GetServerInfo"]["server_type"] == "neo-serving"
    assert found["GetServerInfo"]["block_size"] == 16
    assert found["GetLoads"]["dp_rank_count"] == 1
    assert found["GetLoads"]["loads"][0]["max_total_num_tokens"] > 0
    assert "tokenizer.json" in found["tokenizer"]["files"]
    assert found["tokenizer"]["hash_fits"]
    assert not found["tokenizer"]["earlier_hashes"]


def test_vllm_generates(vllm: dict[str, Any], expected_ids: list[int]) -> None:
    found = vllm["generate"]
    (whole,) = found["whole"]
    assert whole["complete"] == {
        "output_ids": expected_ids, "finish_reason": "length", "prompt_tokens": 6,
        "completion_tokens": 6,
    }  # fmt: skip
    assert [answer["complete"].get("index", 0) for answer in found["two"]] == [0, 1]
    (truncated,) = found["truncated"]
    assert truncated["complete"]["prompt_tokens"] == 2
    (text,) = found["text"]
    assert text["complete"]["prompt_tokens"] == len(PROMPT)
    # 0 in scalars that are not optional is the default: with top_p = 0 nothing could be drawn.
    (defaults,) = found["defaults"]
    assert defaults["complete"]["completion_tokens"] == 2


def test_vllm_constrains(vllm: dict[str, Any], native: Any) -> None:
    for name, allowed in (("regex", "0123456789"), ("choice", "ab")):
        (answer,) = vllm["generate"][name]
        assert answer["complete"]["finish_reason"] == "stop"
        *ids, _ = answer["complete"]["output_ids"]  # then the end of sequence
        text = native.Detokenize(inference_pb2.DetokenizeRequest(token_ids=ids)).text
        assert len(text) == 2
        assert set(text) <= set(allowed)


def test_vllm_streams(vllm: dict[str, Any], expected_ids: list[int]) -> None:
    *chunks, complete = vllm["generate"]["streamed"]
    assert [token for answer in chunks for token in answer["chunk"]["token_ids"]] == expected_ids
    assert sum(answer["chunk"]["completion_tokens"] for answer in chunks) == 6
    assert complete["complete"] == {
        "finish_reason": "length", "prompt_tokens": 6, "completion_tokens": 6,
    }  # fmt: skip


def test_vllm_gives_logprobs(vllm: dict[str, Any], expected_ids: list[int]) -> None:
    (answer,) = vllm["generate"]["logprobs"]
    output, prompt = answer["complete"]["output_logprobs"], answer["complete"]["input_logprobs"]
    assert output["token_ids"] == expected_ids
    assert [top["token_ids"][0] for top in output["top_logprobs"]] == expected_ids
    assert [top["values"][0] for top in output["top_logprobs"]] == output["token_logprobs"]
    assert prompt["token_ids"] == IDS
    assert prompt["token_logprobs"][0] == {}  # nothing comes before the first
    assert all(entry["value"] < 0 for entry in prompt["token_logprobs"][1:])
    streamed = [a["chunk"] for a in vllm["generate"]["streamed_logprobs"] if "chunk" in a]
    # A busy machine gives several tokens at once.
    assert ["input_logprobs" in chunk for chunk in streamed] == [True] + [False] * (
        len(streamed) - 1
    )
    values = [value for chunk in streamed for value in chunk["output_logprobs"]["token_logprobs"]]
    assert values == pytest.approx(output["token_logprobs"], abs=1e-4)


def test_vllm_aborts(vllm: dict[str, Any]) -> None:
    (last,) = vllm["aborted"]
    assert last["complete"]["finish_reason"] == "abort"
    assert last["complete"]["completion_tokens"] < 2000


def test_vllm_is_refused(vllm: dict[str, Any], address: str, stack: Stack) -> None:
    found = dict(vllm["refused"])
    for name in ("embed", "flush"):
        assert found.pop(name).startswith("UNIMPLEMENTED")
    # The router gives what ranks there are.
    rank = found.pop("rank_of_loads")
    assert ("dp_rank is 3" in rank) == (address == stack.gpu.address)
    named = {
        "no_input": "input", "ids": "token_ids", "multimodal": "mm_inputs",
        "kv_transfer": "kv_transfer_params_json", "rank": "data_parallel_rank",
    }  # fmt: skip
    for name, said in found.items():
        assert said.startswith("INVALID_ARGUMENT"), name
        assert named.get(name, name) in said


# What the clients do not show --------------------------------------------------------------------


def every_method() -> list[str]:
    return [
        f"/{service.full_name}/{method.name}"
        for file in (kserve_pb2, vllm_engine_pb2)
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    ]


@pytest.mark.parametrize("method", every_method())
async def test_malformed_bytes(stack: Stack, method: str) -> None:
    async with grpc.aio.insecure_channel(stack.gpu.address) as channel:
        # On the wire a unary answer is a stream of one.
        call = channel.unary_stream(method)(b"\xff", timeout=30)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await call.read()
    assert failed.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_a_stream_outlives_a_message_that_is_none(stack: Stack) -> None:
    """Through the router, which cannot know whose request that was."""
    good = kserve_pb2.ModelInferRequest(id="good")
    good.inputs.add(name="input_ids", datatype="INT32", shape=[1]).contents.int_contents.append(3)
    good.parameters["max_tokens"].int64_param = 1
    async with grpc.aio.insecure_channel(stack.router.address) as channel:
        call = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(timeout=60)
        await call.write(b"\xff")
        error = kserve_pb2.ModelStreamInferResponse.FromString(await call.read())
        assert "cannot be decoded" in error.error_message
        await call.write(good.SerializeToString())
        answer = kserve_pb2.ModelStreamInferResponse.FromString(await call.read())
        assert answer.infer_response.id == "good"
        assert not answer.error_message
        await call.done_writing()


async def test_an_idle_stream_does_not_hold_up_a_drain(tmp_path: Path) -> None:
    """And what is under way on it is finished."""
    with running_stack(tmp_path, stack_model(tmp_path), served_model_name="tiny") as stack:
        request = kserve_pb2.ModelInferRequest(id="long")
        tensor = request.inputs.add(name="input_ids", datatype="INT32", shape=[1])
        tensor.contents.int_contents.append(3)
        request.parameters["max_tokens"].int64_param = 60
        request.parameters["ignore_eos"].bool_param = True
        request.parameters["stream"].bool_param = True
        async with grpc.aio.insecure_channel(stack.gpu.address) as channel:
            stub: Any = kserve_pb2_grpc.GRPCInferenceServiceStub(channel)
            call = stub.ModelStreamInfer(timeout=60)
            await call.write(request)
            await call.read()
            stack.gpu.signal(15)  # SIGTERM; the client never closes its side
            last = await call.read()
            while not last.infer_response.parameters["triton_final_response"].bool_param:
                last = await call.read()
            assert not last.error_message
        assert stack.gpu.wait_exit(20) == 0
