"""One machine as the engine would use it: what its memory holds, and the limits that follow."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec

from gpu_service.model.spec import read_spec
from gpu_service.pipeline.cuda.shapes import CAPTURED_CHUNKS, CAPTURED_ROWS, shape_table
from gpu_service.pipeline.device_kv import without_staging
from gpu_service.scheduling.limits import SchedulerLimits
from neo_common.model_spec import ModelSpec
from neo_plan.catalog import model_folder
from neo_plan.simulator.machine import Machine
from neo_plan.simulator.profile import Figure, Profile

GIB = 1 << 30
_ELEMENT_BYTES = 2
HOST_ROWS = 16
"""Most host rows that start in a sweep, as in `gpu_service.pipeline.cuda.forward`, which imports
Triton."""
GRAPHS_GIB = 1.0
"""CUDA's context and graphs. With the buffers below the pool of the measured machine comes out 1%
from what it had (27,806 blocks, docs/perf-log.md)."""
HOST_RESERVE_GIB = 8.0
"""Of a machine's memory: the services, pinned buffers, the system."""
HOST_KV_SHARE = 0.8
"""Of the rest."""
SPARE_CORES = 2
"""That the cpu_service leaves to the engine and the front end."""


CAPTURED = ("auto", "deferred")
"""Modes whose host rows are in captured sweeps."""


@dataclass(frozen=True)
class Sizes:
    """How the services are configured; names and meanings are those of their settings."""

    max_batch_tokens: int = 8192
    max_running_requests: int = 256
    memory_utilization: float = 0.9
    host_kv_int8: bool = False
    offload_mode: str = "auto"
    streamed_kv_blocks: int = 0
    """Without effect in modes that are not `CAPTURED`."""
    block_tokens: int = 16


@dataclass(frozen=True)
class Node:
    """A machine with one GPU, for one model."""

    profile: Profile
    """Its CPU is that of `cores`."""
    measured: ModelSpec
    """The model that the profile's figures are for."""
    spec: ModelSpec
    sizes: Sizes
    gpu_blocks: int
    """Staging included. 0: the model does not fit."""
    host_blocks: int
    """0: without offloading."""
    offload: str = "auto"

    @property
    def longest(self) -> int:
        """Tokens of the longest request that it can hold, prompt and output."""
        most = max(self._gpu_blocks, self.host_blocks) * self.sizes.block_tokens
        return min(self.spec.max_context_tokens, most)

    @property
    def _captures(self) -> bool:
        return self.sizes.offload_mode in CAPTURED

    @property
    def _streams(self) -> int:
        return self.sizes.streamed_kv_blocks if self._captures else 0

    @property
    def _gpu_blocks(self) -> int:
        return without_staging(self.gpu_blocks, self._streams, self.spec.layers)

    def machine(self) -> Machine:
        sizes = self.sizes
        max_running = min(sizes.max_running_requests, sizes.max_batch_tokens)
        table = shape_table(max_running, sizes.max_batch_tokens)
        return Machine(
            self.profile, self.measured, self.spec, table, sizes.host_kv_int8, self._captures
        )

    def limits(self) -> SchedulerLimits:
        """As `gpu_service.engine.build` makes them on a CUDA device."""
        sizes, streams = self.sizes, self._streams
        return SchedulerLimits(
            gpu_blocks=self._gpu_blocks,
            host_blocks=self.host_blocks,
            block_tokens=sizes.block_tokens,
            max_context_tokens=self.longest,
            max_batch_tokens=sizes.max_batch_tokens,
            max_running=sizes.max_running_requests,
            max_waiting_requests=1 << 20,
            offload=self.offload,
            cohorts=self.spec.layers + 1 if self._captures else 0,
            cohort_rows=HOST_ROWS if self._captures else 0,
            streamed_blocks=streams,
            host_prefill=not self._captures or streams > 0,
            staged_prompts=streams > 0,
            captured_rows=CAPTURED_ROWS if self._captures else 0,
            captured_chunks=CAPTURED_CHUNKS if self._captures else 0,
            copies_beside=self._captures,
            asymmetric=sizes.offload_mode == "asymmetric",
            inline=False,
            auto=sizes.offload_mode == "auto",
        )


def read_model(name: str) -> ModelSpec:
    """A model of the catalog, or a path. Raises ValueError."""
    with model_folder(name) as folder:
        return read_spec(folder)


def make_node(
    profile: Profile, spec: ModelSpec, *, cores: int, host_gib: float, offload: bool, sizes: Sizes
) -> Node:
    return Node(
        profile=with_cores(profile, cores),
        measured=read_model(profile.model),
        spec=spec,
        sizes=sizes,
        gpu_blocks=gpu_blocks(profile.gpu.memory_gib.value, spec, sizes),
        host_blocks=host_blocks(host_gib, spec, sizes) if offload else 0,
    )


def weights_gib(spec: ModelSpec) -> float:
    attention = 2 * (spec.query_heads + spec.kv_heads) * spec.head_dim
    layers = spec.layers * spec.hidden_size * (attention + 3 * spec.intermediate_size)
    tables = spec.vocab_size * spec.hidden_size * (1 if spec.tied_embeddings else 2)
    return _ELEMENT_BYTES * (layers + tables) / GIB


def buffers_gib(spec: ModelSpec, sizes: Sizes) -> float:
    """Activations of the largest sweep and fp32 logits."""
    widest = 3 * spec.intermediate_size + 6 * spec.hidden_size
    activations = _ELEMENT_BYTES * sizes.max_batch_tokens * widest
    logits = 4 * sizes.max_running_requests * spec.vocab_size
    return (activations + logits) / GIB


def gpu_blocks(memory_gib: float, spec: ModelSpec, sizes: Sizes) -> int:
    """Of the GPU tier's pool; 0 where the weights leave no room."""
    room = sizes.memory_utilization * memory_gib
    room -= weights_gib(spec) + buffers_gib(spec, sizes) + GRAPHS_GIB
    return max(int(room * GIB / (spec.kv_bytes_per_token(_ELEMENT_BYTES) * sizes.block_tokens)), 0)


def host_blocks(host_gib: float, spec: ModelSpec, sizes: Sizes) -> int:
    room = HOST_KV_SHARE * (host_gib - HOST_RESERVE_GIB) * GIB
    # int8 with a scale of 4 bytes for each token and head of K and of V.
    int8 = spec.kv_bytes_per_token(1) + 8 * spec.layers * spec.kv_heads
    token = int8 if sizes.host_kv_int8 else spec.kv_bytes_per_token(_ELEMENT_BYTES)
    return max(int(room / (token * sizes.block_tokens)), 0)


def with_cores(profile: Profile, cores: int) -> Profile:
    """The profile with attention on all but `SPARE_CORES`: threads read an equal share each, up to
    those that were measured; more are not taken to read more."""
    cpu = profile.cpu
    threads = max(cores - SPARE_CORES, 1)
    share = min(threads / cpu.threads.value, 1.0)
    if share == 1.0:
        return profile
    read = Figure(
        share * cpu.read_gbps.value, f"{threads} threads' share of: {cpu.read_gbps.source}"
    )
    return msgspec.structs.replace(profile, cpu=msgspec.structs.replace(cpu, read_gbps=read))
