"""Every RPC that a proto declares has a test in which it succeeds and one in which it fails."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from protos.compat import kserve_pb2, vllm_engine_pb2
from protos.neo.v1 import (
    cpu_attention_pb2,
    engine_pb2,
    inference_pb2,
    machine_pb2,
    router_pb2,
)

REPO = Path(__file__).resolve().parents[2]
GPU = "tests/integration/test_gpu_service.py"
CPU = "tests/integration/test_offload_protocol.py"
ROUTER = "tests/integration/test_router.py"
COMPATIBLE = "tests/integration/test_compatible_apis.py"

TESTS: dict[str, tuple[str, str]] = {
    "InferenceService.Generate": (
        f"{GPU}::test_generate", f"{GPU}::test_refused_requests_hurt_nobody",
    ),
    "InferenceService.GenerateStream": (
        f"{GPU}::test_stream_equals_unary", f"{GPU}::test_engine_core_death",
    ),
    "InferenceService.Abort": (
        f"{GPU}::test_abort_ends_the_stream", f"{GPU}::test_every_other_rpc_refuses_bad_input",
    ),
    "InferenceService.ListModels": (
        f"{GPU}::test_models_and_tokens", f"{GPU}::test_malformed_bytes",
    ),
    "InferenceService.GetModel": (
        f"{GPU}::test_models_and_tokens", f"{GPU}::test_every_other_rpc_refuses_bad_input",
    ),
    "InferenceService.Tokenize": (
        f"{GPU}::test_models_and_tokens", f"{GPU}::test_every_other_rpc_refuses_bad_input",
    ),
    "InferenceService.Detokenize": (
        f"{GPU}::test_models_and_tokens", f"{GPU}::test_every_other_rpc_refuses_bad_input",
    ),
    "EngineService.GetLoad": (f"{GPU}::test_load_and_info", f"{GPU}::test_malformed_bytes"),
    "EngineService.WatchLoad": (
        f"{GPU}::test_load_and_info", f"{GPU}::test_every_other_rpc_refuses_bad_input",
    ),
    "EngineService.Drain": (f"{GPU}::test_drain_rpc_then_sigterm", f"{GPU}::test_malformed_bytes"),
    "EngineService.GetInfo": (f"{GPU}::test_load_and_info", f"{GPU}::test_malformed_bytes"),
    "EngineService.ResetPrefixCache": (
        f"{GPU}::test_what_was_computed_is_found_again_by_the_same_tenant",
        f"{GPU}::test_malformed_bytes",
    ),
    "CpuAttentionService.Attend": (
        "tests/integration/test_offload.py", f"{CPU}::test_the_first_message_must_open",
    ),
    "CpuAttentionService.GetCapabilities": (
        f"{CPU}::test_capabilities", f"{CPU}::test_bytes_that_are_no_message_are_refused",
    ),
    "MachineService.GetMachine": (f"{GPU}::test_machine", f"{GPU}::test_malformed_bytes"),
    "RouterService.ListBackends": (
        f"{ROUTER}::test_list_and_watch_backends", f"{ROUTER}::test_malformed_requests",
    ),
    "RouterService.WatchBackends": (
        f"{ROUTER}::test_list_and_watch_backends", f"{ROUTER}::test_list_and_watch_backends",
    ),
    "RouterService.DrainBackend": (
        f"{ROUTER}::test_draining_a_backend_lets_its_streams_finish",
        f"{ROUTER}::test_draining_what_is_not_there",
    ),
    "RouterService.ResetBackendPrefixCache": (
        f"{ROUTER}::test_prefix_caches_are_reset_one_by_one_or_all",
        f"{ROUTER}::test_prefix_caches_are_reset_one_by_one_or_all",
    ),
    "GRPCInferenceService.ServerLive": (
        f"{COMPATIBLE}::test_triton_describes_the_model", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "GRPCInferenceService.ServerReady": (
        f"{COMPATIBLE}::test_triton_describes_the_model", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "GRPCInferenceService.ModelReady": (
        f"{COMPATIBLE}::test_triton_describes_the_model", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "GRPCInferenceService.ServerMetadata": (
        f"{COMPATIBLE}::test_triton_describes_the_model", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "GRPCInferenceService.ModelMetadata": (
        f"{COMPATIBLE}::test_triton_describes_the_model", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "GRPCInferenceService.RepositoryIndex": (
        f"{COMPATIBLE}::test_triton_describes_the_model", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "GRPCInferenceService.ModelConfig": (
        f"{COMPATIBLE}::test_triton_describes_the_model", f"{COMPATIBLE}::test_triton_is_refused",
    ),
    "GRPCInferenceService.ModelInfer": (
        f"{COMPATIBLE}::test_triton_infers", f"{COMPATIBLE}::test_triton_is_refused",
    ),
    "GRPCInferenceService.ModelStreamInfer": (
        f"{COMPATIBLE}::test_triton_streams", f"{COMPATIBLE}::test_triton_streams",
    ),
    "VllmEngine.Generate": (
        f"{COMPATIBLE}::test_vllm_generates", f"{COMPATIBLE}::test_vllm_is_refused",
    ),
    "VllmEngine.GetLoads": (
        f"{COMPATIBLE}::test_vllm_describes_the_engine", f"{COMPATIBLE}::test_vllm_is_refused",
    ),
    "VllmEngine.Abort": (
        f"{COMPATIBLE}::test_vllm_aborts", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "VllmEngine.HealthCheck": (
        f"{COMPATIBLE}::test_vllm_describes_the_engine", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "VllmEngine.GetModelInfo": (
        f"{COMPATIBLE}::test_vllm_describes_the_engine", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "VllmEngine.GetServerInfo": (
        f"{COMPATIBLE}::test_vllm_describes_the_engine", f"{COMPATIBLE}::test_malformed_bytes",
    ),
    "VllmEngine.GetTokenizer": (
        f"{COMPATIBLE}::test_vllm_describes_the_engine", f"{COMPATIBLE}::test_malformed_bytes",
    ),
}  # fmt: skip
"""RPC -> (where it succeeds, where it fails)."""

FILES = (
    inference_pb2,
    engine_pb2,
    cpu_attention_pb2,
    machine_pb2,
    router_pb2,
    kserve_pb2,
    vllm_engine_pb2,
)
RPCS = sorted(
    f"{service.name}.{method.name}"
    for file in FILES
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
)


def test_the_table_is_complete() -> None:
    assert sorted(TESTS) == RPCS


@pytest.mark.parametrize("rpc", RPCS)
def test_its_tests_exist(rpc: str) -> None:
    for where in TESTS[rpc]:
        name, _, function = where.partition("::")
        tree = ast.parse((REPO / name).read_text())
        functions = {
            node.name
            for node in tree.body
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        }
        assert not function or function in functions, f"{where} is gone"
