"""The stubs of smg-grpc-proto against VllmEngine; prints what each scenario found as JSON."""

from __future__ import annotations

import hashlib
import io
import json
import sys
import threading
import zipfile
from typing import Any

import grpc
from google.protobuf.json_format import MessageToDict
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2, vllm_engine_pb2_grpc

pb = vllm_engine_pb2
IDS = [3, 4, 5, 6, 7, 8]


def ask(ids: list[int] | None = None, **fields: Any) -> Any:
    params = {"temperature": 0.0, "max_tokens": 6, "ignore_eos": True}
    params |= fields.pop("sampling", {})
    tokenized = pb.TokenizedInput(input_ids=IDS if ids is None else ids)
    if "text" not in fields:
        fields["tokenized"] = tokenized
    return pb.GenerateRequest(sampling_params=pb.SamplingParams(**params), **fields)


def generated(stub: Any, request: Any) -> list[dict[str, Any]]:
    return [
        MessageToDict(answer, preserving_proto_field_name=True)
        for answer in stub.Generate(request, timeout=60)
    ]


def described(stub: Any) -> dict[str, Any]:
    chunks = list(stub.GetTokenizer(common_pb2.GetTokenizerRequest(), timeout=60))
    data = b"".join(chunk.data for chunk in chunks)
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = archive.namelist()
    found = {
        name: MessageToDict(
            getattr(stub, name)(getattr(pb, f"{name}Request")(), timeout=10),
            preserving_proto_field_name=True,
        )
        for name in ("HealthCheck", "GetModelInfo", "GetServerInfo", "GetLoads")
    }
    found["tokenizer"] = {
        "files": names,
        "hash_fits": hashlib.sha256(data).hexdigest() == chunks[-1].sha256,
        "earlier_hashes": [chunk.sha256 for chunk in chunks[:-1] if chunk.sha256],
    }
    return found


def generate(stub: Any) -> dict[str, Any]:
    logprobs = {"logprobs": 2, "prompt_logprobs": 1}
    return {
        "whole": generated(stub, ask()),
        "streamed": generated(stub, ask(stream=True)),
        "two": generated(stub, ask(sampling={"n": 2})),
        "logprobs": generated(stub, ask(sampling=logprobs)),
        "streamed_logprobs": generated(stub, ask(stream=True, sampling=logprobs)),
        "text": generated(stub, ask(text="the quick brown fox")),
        "regex": generated(stub, ask(sampling={"regex": "[0-9]{2}", "ignore_eos": False})),
        "choice": generated(stub, ask(sampling={
            "choice": pb.ChoiceConstraint(choices=["ab"]), "ignore_eos": False,
        })),
        "truncated": generated(stub, ask(sampling={"truncate_prompt_tokens": 2})),
        "defaults": generated(stub, pb.GenerateRequest(
            tokenized=pb.TokenizedInput(input_ids=IDS),
            sampling_params=pb.SamplingParams(max_tokens=2, seed=5),
        )),
    }  # fmt: skip


def aborted(stub: Any) -> list[dict[str, Any]]:
    """Abort while the answer comes, by id."""
    call = stub.Generate(
        ask(request_id="mine", stream=True, sampling={"max_tokens": 2000}), timeout=60
    )
    first = threading.Event()
    found: list[dict[str, Any]] = []

    def read() -> None:
        for answer in call:
            found.append(MessageToDict(answer, preserving_proto_field_name=True))
            first.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert first.wait(60)
    stub.Abort(pb.AbortRequest(request_ids=["mine", "nobody"]), timeout=10)
    reader.join(60)
    return found[-1:]


def refused(stub: Any) -> dict[str, str]:
    def error(method: str, request: Any) -> str:
        try:
            call = getattr(stub, method)(request, timeout=30)
            list(call) if hasattr(call, "__iter__") else call
        except grpc.RpcError as refusal:
            return f"{refusal.code().name}: {refusal.details()}"
        return "no error"

    bad_sampling = {
        "logprobs": -1, "temperature": -1.0, "structural_tag": "x", "truncate_prompt_tokens": 0,
    }  # fmt: skip
    found = {
        name: error("Generate", ask(sampling={name: value})) for name, value in bad_sampling.items()
    }
    found |= {
        "no_input": error("Generate", pb.GenerateRequest()),
        "ids": error("Generate", ask([10**6])),
        "multimodal": error("Generate", ask(mm_inputs=pb.MultimodalInputs(im_token_id=1))),
        "kv_transfer": error("Generate", ask(kv_transfer_params_json='{"a": 1}')),
        "rank": error("Generate", ask(data_parallel_rank=1)),
        "rank_of_loads": error("GetLoads", pb.GetLoadsRequest(dp_rank=3)),
        "regex": error("Generate", ask(sampling={"regex": "(", "ignore_eos": False})),
        "embed": error("Embed", pb.EmbedRequest()),
        "flush": error("FlushCache", common_pb2.FlushCacheRequest()),
    }
    return found


if __name__ == "__main__":
    with grpc.insecure_channel(sys.argv[1]) as channel:
        connected = vllm_engine_pb2_grpc.VllmEngineStub(channel)
        scenarios = (described, generate, aborted, refused)
        print(json.dumps({scenario.__name__: scenario(connected) for scenario in scenarios}))
