"""Everything that can be configured about a gpu_service.

Loaded by `neo_common.config`: file < environment NEO_* < flags.
"""

from __future__ import annotations

from dataclasses import dataclass

from neo_common.grpc.settings import ListenSettings, PeerSettings
from neo_common.tracing import TracingSettings
from neo_http.settings import HttpSettings


@dataclass(frozen=True)
class GpuServiceConfig(HttpSettings, ListenSettings, PeerSettings, TracingSettings):
    """One gpu_service: a front end and an engine core."""

    model: str = ""
    """Path of a Hugging Face directory or of a GGUF file; `smollm2` means the packaged
    demonstration model."""
    served_model_name: str = ""
    """Name that clients use; empty means the last part of `model`."""
    listen: str = "127.0.0.1:7001"
    """Address of the gRPC server; port 0 takes a free one."""
    admin_listen: str = "auto"
    """Address of the calls for operators (EngineService); `auto` is `listen` itself where only this
    machine can connect to that, and else 127.0.0.1 at its port + 10. Routers use `listen`."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`; `auto` is cuda where there is one."""
    dtype: str = "auto"
    """`float32`, `bfloat16`, `float16`; `auto` is the checkpoint's own."""
    load_format: str = "auto"
    """`auto` reads the weights; `dummy` makes random ones from the model's config alone."""
    quantization: str = "auto"
    """`fp8`: the layers' weights are e4m3 with a scale per output channel, made of whatever the
    checkpoint holds; `auto` leaves them as the checkpoint has them."""
    threads: int = 0
    """Threads of the dense layers on `--device cpu`; 0 means all allowed cores."""
    max_context_tokens: int = 0
    """Longest prompt plus output; 0 means the model's own limit."""

    block_tokens: int = 16
    """Tokens per KV block: 16, 32 or 64."""
    gpu_kv_blocks: int = 0
    """Size of the GPU pool in blocks; 0 means from `gpu_memory_utilization` (cuda) or `gpu_kv_gib`
    (cpu)."""
    gpu_memory_utilization: float = 0.9
    """Part of the GPU's memory that this process may use."""
    gpu_kv_gib: float = 1.0
    """Size of the "GPU" pool on `--device cpu`."""

    offload: str = "auto"
    """`never`, `auto` (the scheduler decides) or `always` (every request on the host tier)."""
    offload_mode: str = "auto"
    """`auto`: what the scheduler predicts to bring most, of the GPU alone and what follows (on cuda
    with `shm`: `deferred`), decided anew as the load changes. `inline`: the host tier's attention
    is waited for in each layer. `deferred`: it has until the next iteration, so that a token takes
    as many as there are layers; needs `offload_transport` `shm`. `asymmetric`: two sub-batches take
    turns with the device, each waited for while the other computes."""
    cpu_services: tuple[str, ...] = ()
    """gRPC addresses of the cpu_services, one per NUMA node; empty means no host tier."""
    offload_transport: str = "shm"
    """`shm` for a colocated cpu_service, `grpc` for a remote one."""
    host_kv_gib: float = 2.0
    """Host pool to ask each cpu_service for."""
    host_kv_dtype: str = "auto"
    """`auto` is the model's dtype (exact); `int8` halves bytes at a stated error."""
    streamed_kv_blocks: int = 0
    """Most host blocks that one iteration reads over the link, for requests on the host tier that
    attend on the device. Staging for them, four times as many blocks of one layer (two layers as
    they come from the host, two as the GPU reads them), is taken from the GPU pool. 0: none do. On
    cuda needs `offload_transport` `shm` and a torch for CUDA 13."""
    profile_dir: str = ""
    """Folder for profiles of this machine, which `offload_mode` `auto` measures at its first start
    with a model (seconds); empty means the user's cache folder, `none` measures at each start."""
    lease_seconds: float = 30.0
    """How long host-tier requests wait for a cpu_service that has gone."""
    sweep_deadline_ms: float = 2000.0
    """How long one iteration waits for the cpu_service before its host rows are dropped and
    repeated."""

    max_batch_tokens: int = 0
    """Most tokens in one iteration, decode rows and prefill chunks together; 0 means 8192 on cuda,
    where the scheduler takes fewer as measured costs say, and 512 on cpu."""
    max_running_requests: int = 256
    """Choices that decode or prefill at the same time."""
    max_waiting_requests: int = 1024
    """Queue length at which new requests are refused with RESOURCE_EXHAUSTED."""
    prefix_caching: bool = True
    """Keep the KV of complete blocks, on both tiers, for later requests of the same tenant that
    begin with the same tokens, as long as nobody needs the room."""
    force_migration_every: int = 0
    """Testing aid: demote or promote some request every that many iterations; 0 means never."""

    drain_grace_seconds: float = 30.0
    """How long SIGTERM lets live requests finish."""
    engine_stall_seconds: float = 120.0
    """Health calls this process dead (`liveness`) when its engine has requests and finishes no
    iteration for that long beyond `lease_seconds`; 0 means never."""
    machine_report: str = ""
    """File that `neo doctor --write` made of this machine, to publish (GetMachine, metrics); empty:
    what this process sees, of which nothing is measured."""
    metrics_port: int = 0
    """Prometheus endpoint on this port; 0 means none."""
    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_format: str = "text"
    """`text` or `json`."""

    def validate(self) -> None:
        """Raises ValueError naming the setting. What depends on the model or the machine is
        checked where it is known."""
        self.validate_listener()
        self.validate_peers()
        self.validate_http()
        self.validate_tracing()
        if not self.model:
            raise ValueError(
                "model must be given: a Hugging Face directory, a GGUF file or smollm2"
            )
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(map(str, allowed))}, "
                    f"not {getattr(self, name)!r}"
                )
        for name in _POSITIVE:
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0")
        for name in _NOT_NEGATIVE:
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ValueError("gpu_memory_utilization must be more than 0 and at most 1")
        if self.offload == "always" and not self.cpu_services:
            raise ValueError("offload always needs an address in cpu_services")
        if self.offload_mode == "deferred" and self.offload_transport != "shm":
            raise ValueError("offload_mode deferred needs offload_transport shm")


_CHOICES: dict[str, tuple[str | int, ...]] = {
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "load_format": ("auto", "dummy"),
    "quantization": ("auto", "fp8"),
    "block_tokens": (16, 32, 64),
    "offload": ("never", "auto", "always"),
    "offload_mode": ("auto", "inline", "deferred", "asymmetric"),
    "offload_transport": ("shm", "grpc"),
    "host_kv_dtype": ("auto", "float32", "bfloat16", "float16", "int8"),
}
_POSITIVE = (
    "gpu_kv_gib",
    "host_kv_gib",
    "lease_seconds",
    "sweep_deadline_ms",
    "max_running_requests",
    "max_waiting_requests",
)
_NOT_NEGATIVE = (
    "streamed_kv_blocks",
    "max_batch_tokens",
    "threads",
    "max_context_tokens",
    "gpu_kv_blocks",
    "force_migration_every",
    "drain_grace_seconds",
    "engine_stall_seconds",
    "metrics_port",
)
