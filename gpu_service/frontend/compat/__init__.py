"""Other engines' gRPC APIs over the same path as InferenceService."""

from __future__ import annotations

from gpu_service.config import GpuServiceConfig
from gpu_service.frontend.compat.kserve import KserveServicer
from gpu_service.frontend.compat.vllm import VllmEngineServicer
from gpu_service.frontend.inference import InferenceServicer
from gpu_service.frontend.operator import EngineServicer
from gpu_service.model.tokenizer import Tokenizer
from neo_common.grpc.server import ServiceServer
from neo_common.model_spec import ModelSpec
from protos.compat import kserve_pb2, kserve_pb2_grpc, vllm_engine_pb2, vllm_engine_pb2_grpc
from protos.neo.v1 import engine_pb2

SERVICES = (
    vllm_engine_pb2.DESCRIPTOR.services_by_name["VllmEngine"],
    kserve_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"],
)
GENERATING = tuple(
    f"/{service.full_name}/{method}"
    for service, method in zip(SERVICES, ("Generate", "ModelInfer"), strict=True)
)
"""Methods whose calls are requests. ModelStreamInfer counts its requests itself."""


def add_compatible_services(
    server: ServiceServer,
    inference: InferenceServicer,
    operator: EngineServicer,
    config: GpuServiceConfig,
    tokenizer: Tokenizer,
    spec: ModelSpec,
    info: engine_pb2.GetInfoResponse,
) -> None:
    """info: its dtype is filled in when the model is loaded."""
    vllm = VllmEngineServicer(
        inference,
        tokenizer,
        spec,
        config.model,
        info,
        operator.snapshot,
        config.max_running_requests,
    )
    vllm_engine_pb2_grpc.add_VllmEngineServicer_to_server(vllm, server.grpc)

    def ready() -> bool:
        return operator.state == engine_pb2.ENGINE_STATE_SERVING

    kserve = KserveServicer(inference, ready, server.guard.admitted)
    kserve_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(kserve, server.grpc)
