"""From configuration to an open host tier."""

from __future__ import annotations

import torch

from gpu_service.config import GpuServiceConfig
from gpu_service.offload.grpc_tier import GrpcHostTier
from gpu_service.offload.host_tier import HostTier
from gpu_service.offload.null_tier import NullHostTier
from gpu_service.offload.session_tier import TORCH_DTYPES
from gpu_service.offload.shape import HostShape, HostTierOptions
from gpu_service.offload.shm_tier import ShmHostTier
from kernels.cpu import DType, ThreadPool
from neo_common.model_spec import ModelSpec

_GIB = 1 << 30
_START_SECONDS = 60.0
"""The service may still be starting."""
_TOUCHED_GIB_PER_SECOND = 1.0
"""The pool is touched before the session opens, on one slow core at least this fast."""
_KV_DTYPES = {
    "float32": DType.FLOAT32,
    "bfloat16": DType.BFLOAT16,
    "float16": DType.FLOAT16,
    "int8": DType.INT8,
}


def host_shape(config: GpuServiceConfig, spec: ModelSpec, dtype: torch.dtype) -> HostShape:
    """The session's shape for a model that runs in `dtype`. Raises ValueError naming the field."""
    activation = next((key for key, value in TORCH_DTYPES.items() if value == dtype), None)
    if activation is None:
        raise ValueError(f"dtype must be float32, bfloat16 or float16, not {dtype}")
    kv_dtype = activation
    if config.host_kv_dtype != "auto":
        if config.host_kv_dtype not in _KV_DTYPES:
            known = ", ".join(["auto", *_KV_DTYPES])
            raise ValueError(f"host_kv_dtype must be one of {known}, not {config.host_kv_dtype!r}")
        kv_dtype = _KV_DTYPES[config.host_kv_dtype]
    return HostShape.of_model(spec, config.block_tokens, activation, kv_dtype)


def open_host_tier(
    config: GpuServiceConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    max_rows: int,
    max_context_tokens: int,
    threads: ThreadPool | None = None,
) -> HostTier:
    """Open the session that `config` asks for; waits until the cpu_service is there and has its
    pool.

    `max_rows`: decode rows of one sweep over all lanes. `max_context_tokens`: the longest row.
    `threads`: for copies into and out of the mapped pool. Without cpu_services, or with `offload`
    "never", a NullHostTier. Raises ValueError naming the field, and HostTierUnavailable (keeper)
    when the session cannot be opened."""
    if config.offload == "never" or not config.cpu_services:
        return NullHostTier()
    if len(config.cpu_services) > 1:
        raise ValueError(
            "cpu_services must name exactly one cpu_service: "
            "one session per NUMA node is not supported yet"
        )
    shape = host_shape(config, spec, dtype)
    options = HostTierOptions(
        address=config.cpu_services[0],
        blocks=shape.blocks_in(int(config.host_kv_gib * _GIB)),
        max_rows=max_rows,
        max_blocks_per_row=-(-max_context_tokens // config.block_tokens),
        transport=config.offload_transport,
        lease_seconds=config.lease_seconds,
        deadline_seconds=config.sweep_deadline_ms / 1e3,
        open_seconds=_START_SECONDS + config.host_kv_gib / _TOUCHED_GIB_PER_SECOND,
        peer=config,
    )
    options.validate()
    if options.transport == "grpc":
        return GrpcHostTier(shape, options)
    return ShmHostTier(shape, options, threads)
