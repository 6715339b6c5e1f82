"""What the scheduler knows of costs when the engine core starts: timed by the device itself, read
from this machine's profile, or measured now."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.profile import Progress, Subject, measure
from gpu_service.engine.profile_cache import StartProfile, cache_path, hardware, load, store
from gpu_service.offload.host_tier import HostTierStalled
from gpu_service.pipeline.launch import Runner
from gpu_service.pipeline.parts import EngineParts
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.rates import HostRates

if TYPE_CHECKING:
    from gpu_service.pipeline.cuda.runner import CudaSweeps

_LOG = logging.getLogger(__name__)


def start_costs(
    config: GpuServiceConfig,
    limits: SchedulerLimits,
    parts: EngineParts,
    runner: Runner,
    sweeps: CudaSweeps | None,
    progress: Progress,
) -> tuple[SweepCosts | None, HostRates | None]:
    """Both None where nothing is decided by them, and nothing is timed anyway."""
    costs: SweepCosts | None = None
    if sweeps is not None and parts.model.device.type == "cuda":
        costs = sweeps.costs()
    if not limits.auto:
        return costs, None
    subject = Subject(
        geometry=parts.geometry,
        dtype=parts.model.dtype,
        device=parts.model.device,
        host=parts.host,
        runner=runner,
        gpu_blocks=limits.gpu_blocks,
        streamed_blocks=limits.streamed_blocks,
        max_batch_tokens=limits.max_batch_tokens,
        max_running=limits.max_running,
        max_context_tokens=limits.max_context_tokens,
        times_sweeps=costs is None,
        deferred_ms=None if sweeps is None else sweeps.graphs.deferred_ms,
    )
    path = cache_path(config.profile_dir, _facts(config, limits, parts))
    profile = load(path)
    if profile is None or (costs is None and not profile.decode_ms):
        profile = _measured(subject, progress)
        store(path, profile)
    if costs is None:
        costs = SweepCosts(profile.decode_ms, profile.mixed_ms, profile.context_ms)
    _LOG.info("predictions start from %s", profile.rates)
    return costs, profile.rates


def _measured(subject: Subject, progress: Progress) -> StartProfile:
    try:
        return measure(subject, progress)
    except HostTierStalled as error:
        raise ValueError(
            f"cpu_services: the cpu_service did not answer while this machine was measured: {error}"
        ) from error


def _facts(config: GpuServiceConfig, limits: SchedulerLimits, parts: EngineParts) -> dict[str, str]:
    """All that the profile depends on."""
    spec, device = parts.model.spec, parts.model.device
    name = device.type
    if device.type == "cuda":
        import torch

        name = str(torch.cuda.get_device_name(device))
    sizes = (spec.layers, spec.hidden_size, spec.intermediate_size, spec.vocab_size)
    heads = (spec.query_heads, spec.kv_heads, spec.head_dim)
    return {
        **hardware(),
        "device": name,
        "model": f"{sizes} {heads} {parts.model.dtype} {config.quantization}",
        "host": f"{config.host_kv_dtype} {config.offload_transport} {config.block_tokens}",
        "threads": str(config.threads),
        "tokens": f"{limits.max_batch_tokens} {limits.max_running} {limits.max_context_tokens}",
        "streamed": str(limits.streamed_blocks),
    }
