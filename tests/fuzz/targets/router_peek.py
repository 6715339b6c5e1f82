"""What the router reads of requests by hand: on all that protobuf can read the two must agree, on
the rest it must be quiet. Also which text made a message unreadable, and what admission counts."""

from __future__ import annotations

from typing import Any

from google.protobuf.message import DecodeError

from neo_common.grpc.malformed import bad_text_field
from protos.compat import kserve_pb2 as kserve
from protos.compat import vllm_engine_pb2 as vllm
from protos.neo.v1 import inference_pb2 as neo
from router.admission.cost import KINDS, asked, used
from router.admission.policy import SharedLimits
from router.peek import LAYOUTS, PROMPT_BYTES, Peeked, peek
from tests.fuzz.target import Finding, Target
from tests.fuzz.targets import kserve_requests, neo_requests, vllm_requests

PATHS = sorted(LAYOUTS)
_MESSAGES: dict[str, tuple[Any, str]] = {
    "Generate": (neo.GenerateRequest, "model"),
    "GenerateStream": (neo.GenerateRequest, "model"),
    "GetModel": (neo.GetModelRequest, "model"),
    "Tokenize": (neo.TokenizeRequest, "model"),
    "Detokenize": (neo.DetokenizeRequest, "model"),
    "ModelInfer": (kserve.ModelInferRequest, "model_name"),
    "ModelStreamInfer": (kserve.ModelInferRequest, "model_name"),
    "ModelReady": (kserve.ModelReadyRequest, "name"),
    "ModelMetadata": (kserve.ModelMetadataRequest, "name"),
    "ModelConfig": (kserve.ModelConfigRequest, "name"),
}


def _one(data: bytes) -> None:
    path = PATHS[(data[0] if data else 0) % len(PATHS)]
    request = data[1:]
    found = peek(path, request)
    if len(found.prompt) > PROMPT_BYTES or found.prompt_tokens < 0:
        raise Finding(f"{path}: {found}")
    message, field = _MESSAGES.get(path.rpartition("/")[2], (None, ""))
    if path.startswith("/vllm"):
        message, field = vllm.GenerateRequest, ""
    assert message is not None
    try:
        parsed = message.FromString(request)
    except DecodeError:
        bad_text_field(message.DESCRIPTOR, request)
    else:
        _agree(path, parsed, field, found)
    if path in KINDS:
        cost = asked(path, request, (("x-neo-priority", "5"),), SharedLimits())
        if not 1 <= cost.cost.total(SharedLimits()) < float("inf"):
            raise Finding(f"{path} costs {cost}")
        used(path, 1, request)


def _agree(path: str, parsed: Any, field: str, found: Peeked) -> None:
    # Groups and more fields than anybody sends are passed over, and then nothing is known.
    if found == Peeked():
        return
    if field and found.model != getattr(parsed, field):
        raise Finding(f"{path}: {found.model!r} is not {getattr(parsed, field)!r}")
    text = isinstance(parsed, neo.GenerateRequest) and parsed.WhichOneof("prompt") == "text"
    if text and found.prompt != parsed.text.encode()[:PROMPT_BYTES]:
        raise Finding(f"{path}: the prompt is not what was sent")


def seeds() -> list[bytes]:
    def under(path: str, data: bytes) -> bytes:
        return bytes([PATHS.index(path)]) + data

    service = "/neo.v1.InferenceService/"
    found = [under(f"{service}GenerateStream", each[1:]) for each in neo_requests.seeds()[:3]]
    found += [under(f"{service}Tokenize", each[1:]) for each in neo_requests.seeds()[3:5]]
    found += [under("/vllm.grpc.engine.VllmEngine/Generate", e) for e in vllm_requests.seeds()]
    infer = "/inference.GRPCInferenceService/ModelInfer"
    return found + [under(infer, each) for each in kserve_requests.seeds()]


TARGET = Target("router_peek", _one, seeds, "wire", smoke=400)
