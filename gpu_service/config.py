"""Everything that can be configured about a gpu_service. Loaded by `neo_common.config` (file < NEO_* < flags)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GpuServiceConfig:
    """One gpu_service: a front end and an engine core."""

    model: str = ""
    """Path of a Hugging Face directory or of a GGUF file; `smollm2` means the packaged demonstration model."""
    served_model_name: str = ""
    """Name that clients use; empty means the last part of `model`."""
    listen: str = "127.0.0.1:7001"
    """Address of the gRPC server; port 0 takes a free one."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`; `auto` is cuda where there is one."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, `float16`; `auto` is the checkpoint's own."""
    load_format: str = "auto"
    """`auto` reads the weights; `dummy` makes random ones from the model's config alone."""
    threads: int = 0
    """Threads of the dense layers on `--device cpu`; 0 means all allowed cores."""
    max_context_tokens: int = 0
    """Longest prompt plus output; 0 means the model's own limit."""

    block_tokens: int = 16
    """Tokens per KV block: 16, 32 or 64."""
    gpu_kv_blocks: int = 0
    """Size of the GPU pool in blocks; 0 means from `gpu_memory_utilization` (cuda) or `gpu_kv_gib` (cpu)."""
    gpu_memory_utilization: float = 0.9
    """Part of the GPU's memory that this process may use."""
    gpu_kv_gib: float = 1.0
    """Size of the "GPU" pool on `--device cpu`."""

    offload: str = "auto"
    """`never`, `auto` (the scheduler decides) or `always` (every request on the host tier)."""
    cpu_services: tuple[str, ...] = ()
    """gRPC addresses of the cpu_services, one per NUMA node; empty means no host tier."""
    offload_transport: str = "shm"
    """`shm` for a colocated cpu_service, `grpc` for a remote one."""
    host_kv_gib: float = 2.0
    """Host pool to ask each cpu_service for."""
    host_kv_dtype: str = "auto"
    """`auto` is the model's dtype (exact); `int8` halves bytes at a stated error."""
    lease_seconds: float = 30.0
    """How long host-tier requests wait for a cpu_service that has gone."""
    sweep_deadline_ms: float = 2000.0
    """How long one iteration waits for the cpu_service before its host rows are dropped and repeated."""

    max_batch_tokens: int = 512
    """Tokens in one iteration, decode rows and prefill chunks together."""
    max_running_requests: int = 256
    """Choices that decode or prefill at the same time."""
    max_waiting_requests: int = 1024
    """Queue length at which new requests are refused with RESOURCE_EXHAUSTED."""
    force_migration_every: int = 0
    """Testing aid: demote or promote some request every that many iterations; 0 means never."""

    drain_grace_seconds: float = 30.0
    """How long SIGTERM lets live requests finish."""
    metrics_port: int = 0
    """Prometheus endpoint on this port; 0 means none."""
    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_format: str = "text"
    """`text` or `json`."""
