"""From configuration to an engine core that is ready to run: model, pools, host tier, scheduler."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Ready
from gpu_service.engine.start import start_costs
from gpu_service.kv.table import blocks_for
from gpu_service.model.model import CausalLM, Progress, load_model
from gpu_service.model.sampling import Sampler
from gpu_service.model.spec import read_spec
from gpu_service.model.structured import Guides
from gpu_service.model.tokenizer import load_tokenizer
from gpu_service.offload.factory import host_shape, open_host_tier
from gpu_service.offload.host_tier import HostTier
from gpu_service.offload.session_tier import TORCH_DTYPES
from gpu_service.pipeline.cpu_kv import CpuDeviceKv, layout_of
from gpu_service.pipeline.device_kv import AttentionGeometry, DeviceKv, without_staging
from gpu_service.pipeline.launch import Runner
from gpu_service.pipeline.migration import Migrator
from gpu_service.pipeline.parts import EngineParts
from gpu_service.pipeline.runner import PlanRunner
from gpu_service.pipeline.streamed import Staging
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.scheduler import Scheduler
from kernels.cpu import DType, ThreadPool
from neo_common.model_spec import ModelSpec

if TYPE_CHECKING:
    from gpu_service.pipeline.cuda.build import ExchangeLimits
    from gpu_service.pipeline.cuda.runner import CudaSweeps

_GIB = 1 << 30
DEFAULT_BATCH_TOKENS = {"cuda": 8192, "cpu": 512}


@dataclass(frozen=True)
class BuiltCore:
    core: EngineCore
    ready: Ready


def build_core(config: GpuServiceConfig, progress: Progress | None = None) -> BuiltCore:
    """Load the model and open the host tier.

    Raises ValueError, or an error of the offload package, with one sentence that says what to do.
    """
    config.validate()
    device = resolve_device(config.device)
    if streamed_blocks(config) and device.type != "cpu" and config.offload_transport != "shm":
        raise ValueError(f"streamed_kv_blocks needs offload_transport shm on {device.type}")
    if streamed_blocks(config) and device.type == "cuda":
        from gpu_service.pipeline.cuda.copy_engine import check_cuda

        check_cuda()
    batch_tokens = config.max_batch_tokens or DEFAULT_BATCH_TOKENS[device.type]
    config = replace(config, max_batch_tokens=batch_tokens)
    spec = read_spec(config.model)
    threads = config.threads or len(os.sched_getaffinity(0))
    if device.type == "cpu":
        torch.set_num_threads(threads)
    model = load_model(
        config.model,
        dtype=config.dtype,
        device=device,
        load_format=config.load_format,
        quantization=config.quantization,
        progress=progress,
    )
    geometry = geometry_of(spec, config.block_tokens)
    pool = ThreadPool(threads) if device.type == "cpu" else None
    sweeps: CudaSweeps | None = None
    gpu: DeviceKv
    if pool is None:
        # Imports Triton, which `--device cpu` does without.
        from gpu_service.pipeline.cuda.build import CudaLimits, open_cuda

        limits = CudaLimits(
            max_running=min(config.max_running_requests, config.max_batch_tokens),
            max_batch_tokens=config.max_batch_tokens,
            max_context_tokens=max_context(config, spec),
            memory_utilization=config.gpu_memory_utilization,
            kv_blocks=config.gpu_kv_blocks,
            host=exchange_limits(config, spec, model.dtype),
        )
        gpu, sweeps = open_cuda(model, geometry, limits, progress or (lambda *_: None))
    else:
        gpu = open_cpu_kv(config, geometry, model.dtype, pool)
    host = open_host_tier(
        config,
        spec,
        model.dtype,
        max_rows=config.max_running_requests,
        max_context_tokens=max_context(config, spec),
        threads=pool,
    )
    return assemble(config, model, geometry, gpu, host, pool, sweeps, progress)


def assemble(
    config: GpuServiceConfig,
    model: CausalLM,
    geometry: AttentionGeometry,
    gpu: DeviceKv,
    host: HostTier,
    threads: ThreadPool | None,
    sweeps: CudaSweeps | None = None,
    progress: Progress | None = None,
) -> BuiltCore:
    """A core from its parts; tests pass a host tier of their own. `threads`: on a CPU; `sweeps`: on
    a CUDA device."""
    spec = model.spec
    staging = None
    if threads is not None and streamed_blocks(config):
        staging = Staging(geometry, model.dtype, config.streamed_kv_blocks, threads)
    parts = EngineParts(model, geometry, gpu, host, staging)
    sampler = Sampler(spec.eos_token_ids)
    inline = PlanRunner(parts, sampler, Migrator(parts, threads))
    runner: Runner = inline
    if sweeps is not None:
        runner = sweeps.runner(sampler, inline, host)
    limits = scheduler_limits(config, model, gpu, host, sweeps)
    costs, rates = start_costs(config, limits, parts, runner, sweeps, progress or (lambda *_: None))
    scheduler = Scheduler(limits, costs, rates)
    ready = Ready(
        max_context_tokens=limits.max_context_tokens,
        gpu_blocks=gpu.blocks,
        host_blocks=host.blocks,
        block_tokens=config.block_tokens,
        device=model.device.type,
        device_name=device_name(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        offload_transport=config.offload_transport if host.blocks else "",
        gpu_block_bytes=layout_of(geometry, model.dtype).pool_bytes(1),
        host_block_bytes=(
            host_shape(config, spec, model.dtype).layout.pool_bytes(1) if host.blocks else 0
        ),
    )
    guides = Guides(lambda: load_tokenizer(config.model), spec.vocab_size)
    core = EngineCore(scheduler, runner, host, spec.vocab_size, guides=guides)
    return BuiltCore(core, ready)


def scheduler_limits(
    config: GpuServiceConfig,
    model: CausalLM,
    gpu: DeviceKv,
    host: HostTier,
    sweeps: CudaSweeps | None,
) -> SchedulerLimits:
    spec = model.spec
    # Longer requests would fit on neither tier.
    capacity = max(gpu.blocks, host.blocks) * config.block_tokens
    decides = config.offload_mode == "auto" and host.blocks > 0
    staged = streamed_blocks(config) if sweeps is None else sweeps.cache.layout.staging
    device_deals = sweeps is not None and sweeps.exchange is not None
    return SchedulerLimits(
        gpu_blocks=gpu.blocks,
        host_blocks=host.blocks,
        block_tokens=config.block_tokens,
        max_context_tokens=min(max_context(config, spec), capacity),
        max_batch_tokens=config.max_batch_tokens,
        max_running=config.max_running_requests,
        max_waiting_requests=config.max_waiting_requests,
        offload=config.offload,
        eos_token_ids=frozenset(spec.eos_token_ids),
        lease_seconds=config.lease_seconds,
        cohorts=spec.layers + 1 if may_defer(config) and host.defers else 0,
        asymmetric=config.offload_mode == "asymmetric" or (decides and sweeps is None),
        inline=not device_deals,
        auto=decides,
        cohort_rows=sweeps.table.host if sweeps is not None else 0,
        streamed_blocks=staged,
        host_prefill=not device_deals or staged > 0,
        staged_prompts=sweeps is not None and staged > 0,
        captured_rows=sweeps.table.totals[-1] if sweeps is not None and sweeps.table.host else 0,
        captured_chunks=sweeps.table.chunks if sweeps is not None and sweeps.table.host else 0,
        copies_beside=device_deals,
        prefix_caching=config.prefix_caching,
        host_lossy=config.host_kv_dtype not in ("auto", str(model.dtype).removeprefix("torch.")),
        force_migration_every=config.force_migration_every,
    )


def streamed_blocks(config: GpuServiceConfig) -> int:
    """`streamed_kv_blocks` where there can be a host tier."""
    return config.streamed_kv_blocks if config.offload != "never" and config.cpu_services else 0


def may_defer(config: GpuServiceConfig) -> bool:
    """Host rows may be deferred, as far as the configuration goes."""
    mode = config.offload_mode
    return mode == "deferred" or (mode == "auto" and config.offload_transport == "shm")


def exchange_limits(
    config: GpuServiceConfig, spec: ModelSpec, dtype: torch.dtype
) -> ExchangeLimits | None:
    """What CUDA sweeps need to know to deal with the host tier themselves; None where they do
    not."""
    if config.offload == "never" or not config.cpu_services or config.offload_transport != "shm":
        return None
    from gpu_service.pipeline.cuda.build import ExchangeLimits

    shape = host_shape(config, spec, dtype)
    step = shape.step(
        config.max_running_requests, blocks_for(max_context(config, spec), config.block_tokens)
    )
    kind = shape.layout.dtype
    return ExchangeLimits(
        lanes={"inline": 1, "asymmetric": 2}.get(config.offload_mode, 0),
        step=step,
        deadline_seconds=config.sweep_deadline_ms / 1e3,
        host_dtype=torch.int8 if kind is DType.INT8 else TORCH_DTYPES[kind],
        streamed_blocks=config.streamed_kv_blocks,
    )


def resolve_device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu, cuda or cuda:N, not {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device is {name!r}, but torch sees no CUDA device on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {name!r}, but torch sees {torch.cuda.device_count()} CUDA devices, "
            "counted from 0"
        )
    return device


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU ({torch.get_num_threads()} threads)"


def max_context(config: GpuServiceConfig, spec: ModelSpec) -> int:
    if config.max_context_tokens > spec.max_context_tokens:
        raise ValueError(
            f"max_context_tokens is {config.max_context_tokens}, but the model was made for "
            f"{spec.max_context_tokens}"
        )
    return config.max_context_tokens or spec.max_context_tokens


def geometry_of(spec: ModelSpec, block_tokens: int) -> AttentionGeometry:
    return AttentionGeometry(
        layers=spec.layers,
        query_heads=spec.query_heads,
        kv_heads=spec.kv_heads,
        head_dim=spec.head_dim,
        block_tokens=block_tokens,
        scale=spec.attention_scale,
        windows=tuple(spec.sliding_window) or (0,) * spec.layers,
    )


def open_cpu_kv(
    config: GpuServiceConfig, geometry: AttentionGeometry, dtype: torch.dtype, threads: ThreadPool
) -> CpuDeviceKv:
    """The "GPU" pool of `--device cpu`, as large as configured."""
    block_bytes = layout_of(geometry, dtype).pool_bytes(1)
    blocks = config.gpu_kv_blocks or int(config.gpu_kv_gib * _GIB) // block_bytes
    if blocks < 1:
        raise ValueError(f"gpu_kv_gib is smaller than one KV block of {block_bytes} bytes")
    blocks = without_staging(blocks, streamed_blocks(config), geometry.layers)
    try:
        return CpuDeviceKv(geometry, dtype, blocks, threads)
    except OSError as error:
        raise ValueError(
            f"gpu_kv_blocks: {blocks} blocks take {blocks * block_bytes / _GIB:.1f} GiB, "
            "which this machine does not have"
        ) from error
