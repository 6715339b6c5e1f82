"""Memory of a CUDA device, divided: weights are there, then activations, graphs, and the KV pool
gets the rest."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_service.kv.table import blocks_for
from gpu_service.model.model import CausalLM, Progress
from gpu_service.pipeline.cuda.forward import Activations, DeviceCache, Forward
from gpu_service.pipeline.cuda.graphs import SweepGraphs
from gpu_service.pipeline.cuda.host_rows import HOST_ROWS
from gpu_service.pipeline.cuda.inputs import InputLimits, SweepInputs, SweepShape
from gpu_service.pipeline.cuda.kv import TritonDeviceKv, layout_of
from gpu_service.pipeline.cuda.runner import CudaSweeps
from gpu_service.pipeline.cuda.sampling import DeviceDraws
from gpu_service.pipeline.cuda.shapes import ShapeTable, shape_table
from gpu_service.pipeline.device_kv import AttentionGeometry, without_staging
from kernels.cpu.dataplane import StepShape
from kernels.gpu.host_exchange import HostExchange, StepOffsets
from kernels.gpu.host_stream import HostStream

_GIB = 1 << 30
_GRAPH_LAYER_BYTES = 96 << 10
"""Driver memory of some 10 launches, which is one layer of a captured sweep."""


@dataclass(frozen=True)
class CudaLimits:
    """What the configuration says about one device."""

    max_running: int
    max_batch_tokens: int
    max_context_tokens: int
    memory_utilization: float
    """Part of the device's memory that this process may use."""
    kv_blocks: int = 0
    """Size of the KV pool, staging included; 0 means as many as fit."""
    table: ShapeTable | None = None
    """None takes the usual padded sizes."""
    host: ExchangeLimits | None = None
    """Set where sweeps may have host rows."""


@dataclass(frozen=True)
class ExchangeLimits:
    """What the exchange with the host needs to know before there is a session."""

    lanes: int
    """Sub-batches whose host rows are waited for; 0: they are deferred."""
    step: StepShape
    deadline_seconds: float
    """How long a sweep waits for the host in one layer."""
    host_dtype: torch.dtype
    """The host pool's."""
    streamed_blocks: int = 0
    """Most host blocks that one sweep reads into staging; 0: there is none."""


@dataclass(frozen=True)
class _Buffers:
    inputs: SweepInputs
    activations: Activations
    draws: DeviceDraws
    exchange: HostExchange | None


def open_cuda(
    model: CausalLM, geometry: AttentionGeometry, limits: CudaLimits, progress: Progress
) -> tuple[TritonDeviceKv, CudaSweeps]:
    """The KV pool and all that sweeps need; captures CUDA graphs where there is a CUDA device.

    Raises ValueError, with the arithmetic, if the pool does not fit.
    """
    table = limits.table or _table(limits)
    buffers = _buffers(model, geometry, limits, table)
    blocks = limits.kv_blocks
    if model.device.type == "cuda":
        _warm_up(model, geometry, limits, buffers)
        blocks = _pool_blocks(model, geometry, limits, table)
    staging = limits.host.streamed_blocks if limits.host else 0
    blocks = without_staging(blocks, staging, geometry.layers)
    kv = TritonDeviceKv(geometry, model.dtype, blocks, model.device, limits.max_running, staging)
    cache = DeviceCache(kv.layout, kv.memory)
    stream = None
    if limits.host is not None and staging:
        stream = HostStream(kv.layout, limits.host.host_dtype)
    forward = Forward(
        model,
        geometry,
        cache,
        buffers.inputs,
        buffers.activations,
        table.decode,
        buffers.exchange,
        stream,
    )
    graphs = SweepGraphs()
    if model.device.type == "cuda":
        graphs.capture(forward, table, progress)
    sweeps = CudaSweeps(
        model,
        table,
        cache,
        buffers.inputs,
        buffers.activations,
        buffers.draws,
        forward,
        graphs,
        buffers.exchange,
    )
    return kv, sweeps


def _table(limits: CudaLimits) -> ShapeTable:
    host = limits.host
    deferred, lanes = (0, 0) if host is None else (0 if host.lanes else HOST_ROWS, host.lanes)
    return shape_table(limits.max_running, limits.max_batch_tokens, deferred, lanes)


def _buffers(
    model: CausalLM, geometry: AttentionGeometry, limits: CudaLimits, table: ShapeTable
) -> _Buffers:
    host = table.host_rows(limits.max_running)
    rows = max(table.totals[-1], table.decode[-1] + limits.max_batch_tokens) + host
    sequences = table.decode[-1] + max(limits.max_running, table.chunks)
    width = blocks_for(limits.max_context_tokens, geometry.block_tokens)
    staging = limits.host.streamed_blocks if limits.host else 0
    inputs = SweepInputs(
        InputLimits(rows, sequences, sequences * width, geometry.layers, host, table.host, staging),
        geometry.block_tokens,
        model.device,
    )
    exchange = _exchange(model, geometry, limits, table.host)
    if exchange is not None:
        inputs.host_bases.fill_(exchange.nowhere)
    # Padding of a first sweep, before anything was sent.
    inputs.slots.fill_(-1)
    inputs.sources.fill_(-1)
    # Not zeros: the arithmetic's speed depends on what is multiplied.
    inputs.token_ids.random_(model.spec.vocab_size)
    samples = sequences + host
    activations = Activations(model, rows, samples, limits.max_running, (sequences, width))
    draws = DeviceDraws(activations.sampler, model.spec.eos_token_ids, model.device)
    return _Buffers(inputs, activations, draws, exchange)


def _exchange(
    model: CausalLM, geometry: AttentionGeometry, limits: CudaLimits, rows: int
) -> HostExchange | None:
    if limits.host is None:
        return None
    return HostExchange(
        StepOffsets(*limits.host.step.offsets()),
        geometry.layers,
        rows,
        geometry.query_heads,
        geometry.kv_heads,
        geometry.head_dim,
        model.spec.hidden_size,
        model.dtype,
        model.device,
        limits.host.deadline_seconds,
    )


def _warm_up(
    model: CausalLM, geometry: AttentionGeometry, limits: CudaLimits, buffers: _Buffers
) -> None:
    """The largest sweep, on padding, so that libraries have taken what memory they want."""
    layout = layout_of(geometry, 1)
    cache = DeviceCache(layout, layout.allocate(model.dtype, model.device))
    forward = Forward(model, geometry, cache, buffers.inputs, buffers.activations, (1,))
    forward.run(SweepShape(1, limits.max_batch_tokens, 1), limits.max_batch_tokens)
    logits = model.logits(buffers.activations.residual[: buffers.draws.prompt_rows])
    buffers.draws.warm_up(buffers.activations.logits, buffers.activations.drawn, logits)
    torch.cuda.synchronize(model.device)


def _pool_blocks(
    model: CausalLM, geometry: AttentionGeometry, limits: CudaLimits, table: ShapeTable
) -> int:
    # A second sub-batch goes through the layers, too.
    graphs = sum(2 if shape.second else 1 for shape in table.captured())
    per_token = 2 * geometry.layers * geometry.kv_heads * geometry.head_dim * model.dtype.itemsize
    block_bytes = per_token * geometry.block_tokens
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(model.device)
    allowed = limits.memory_utilization * total
    used, reserve = total - free, graphs * geometry.layers * _GRAPH_LAYER_BYTES
    blocks = int(allowed - used - reserve) // block_bytes
    wanted = limits.kv_blocks or 1
    if limits.kv_blocks:
        blocks = int(free - reserve) // block_bytes
    if blocks < wanted:
        room = "all" if limits.kv_blocks else f"gpu_memory_utilization {limits.memory_utilization}"
        raise ValueError(
            f"the KV pool does not fit: {room} of {total / _GIB:.1f} GiB, less "
            f"{used / _GIB:.1f} GiB in use (weights, activations, other processes) and "
            f"{reserve / _GIB:.1f} GiB for CUDA graphs, leaves {max(blocks, 0)} blocks of "
            f"{block_bytes / (1 << 20):.2f} MiB, and {wanted} are needed; raise "
            "gpu_memory_utilization, or lower gpu_kv_blocks, max_batch_tokens or "
            "max_running_requests"
        )
    return limits.kv_blocks or blocks
