"""An engine core in this process: its parts, an in-process host tier that can be made to fail, and
a driver."""

from __future__ import annotations

import mmap
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.build import assemble, build_core, geometry_of, open_cpu_kv
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import (
    PromptLogprobs,
    Refusal,
    RequestUsage,
    SamplingSpec,
    Submit,
    TokenLogprob,
)
from gpu_service.model.model import CausalLM
from gpu_service.offload.host_tier import (
    HostRows,
    HostTier,
    HostTierStalled,
    HostTierState,
    HostWork,
)
from gpu_service.offload.null_tier import NullHostTier
from gpu_service.pipeline.cpu_kv import layout_of
from gpu_service.pipeline.device_kv import AttentionGeometry
from gpu_service.scheduling.plan import Tier
from kernels.cpu import DType, KvLayout, KvPool, ThreadPool, decode_attention


@dataclass(frozen=True)
class _Job:
    """One layer's attention that was submitted."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    tables: npt.NDArray[np.int32]
    lengths: npt.NDArray[np.int32]


class LocalHostTier:
    """A host tier without a cpu_service: its pool and its attention are in this process.

    `mapped`: let migration copy blocks; otherwise it goes layer by layer. `stall_at`: how many more
    submits succeed before one stalls; the tier is then DEGRADED until `resume`.
    """

    def __init__(
        self,
        geometry: AttentionGeometry,
        dtype: torch.dtype,
        blocks: int,
        threads: ThreadPool,
        *,
        mapped: bool = True,
        kv_dtype: DType | None = None,
    ) -> None:
        layout = layout_of(geometry, dtype)
        if kv_dtype is not None:
            layout = KvLayout(
                layout.layers, layout.kv_heads, layout.head_dim, layout.block_tokens, kv_dtype
            )
        self._geometry = geometry
        self._dtype = dtype
        self._threads = threads
        self._mapped = mapped
        self._pool = KvPool(layout, blocks, mmap.mmap(-1, layout.pool_bytes(blocks)))
        self._lanes: Sequence[HostRows] = ()
        self._jobs: dict[tuple[int, int, int], _Job] = {}
        self._sweep = 0
        self.blocks = blocks
        self.epoch = 1
        self.state = HostTierState.UP
        self.stall_at: int | None = None
        self.submits = 0
        self.closed = False

    defers = True
    work = HostWork()

    @property
    def mapped_pool(self) -> KvPool | None:
        return self._pool if self._mapped and self.state is HostTierState.UP else None

    def poll(self) -> None:
        """Tests change `state` themselves."""

    def resume(self) -> None:
        self.state = HostTierState.UP
        self.stall_at = None
        self.epoch += 1

    def lose(self) -> None:
        """KV is gone: whatever is read afterwards must not be used."""
        self.state = HostTierState.LOST
        slots = torch.arange(self.blocks * self._geometry.block_tokens)
        shape = (len(slots), self._geometry.kv_heads, self._geometry.head_dim)
        poison = torch.full(shape, 1e4, dtype=self._dtype)
        for layer in range(self._geometry.layers):
            self._pool.write(layer, slots, poison, poison)

    def write_kv(self, layer: int, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        self._require_up()
        self._pool.write(layer, slots, k, v)

    def read_kv(self, layer: int, slots: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self._require_up()
        shape = (len(slots), self._geometry.kv_heads, self._geometry.head_dim)
        k, v = torch.empty(shape, dtype=self._dtype), torch.empty(shape, dtype=self._dtype)
        self._pool.read(layer, slots, k, v)
        return k, v

    def begin_sweep(self, lanes: Sequence[HostRows]) -> int:
        self._require_up()
        self._lanes = lanes
        self._sweep += 1
        return self._sweep

    def submit(
        self, lane: int, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> None:
        self._require_up()
        if self.stall_at is not None:
            self.stall_at -= 1
            if self.stall_at < 0:
                self.state = HostTierState.DEGRADED
                raise HostTierStalled("the test says so")
        rows = self._lanes[lane]
        begin, end = (0, len(rows.lengths)) if rows.ranges is None else rows.ranges[layer]
        assert len(q) == end - begin
        self.submits += 1
        self._jobs[self._sweep, lane, layer] = _Job(
            q.clone(),
            k.clone(),
            v.clone(),
            rows.block_tables[begin:end].copy(),
            rows.lengths[begin:end].copy(),
        )

    def wait(self, lane: int, layer: int, out: torch.Tensor, back: int = 0) -> None:
        """Computes now, K and V are appended now: as late as a real one may be."""
        self._require_up()
        job = self._jobs.pop((self._sweep - back, lane, layer))
        decode_attention(
            self._threads,
            self._pool,
            layer,
            job.q,
            job.k,
            job.v,
            job.tables,
            job.lengths,
            out,
            scale=self._geometry.scale,
            window=self._geometry.windows[layer],
        )

    def cancel_sweep(self) -> None:
        self._lanes = ()
        self._jobs.clear()

    def close(self) -> None:
        self.closed = True

    def _require_up(self) -> None:
        if self.state is not HostTierState.UP:
            raise HostTierStalled("the test says so")


def config(model: str | Path, **changes: Any) -> GpuServiceConfig:
    values: dict[str, Any] = {
        "model": str(model),
        "device": "cpu",
        "dtype": "float32",
        "offload": "never",
        "offload_mode": "inline",
        "gpu_kv_blocks": 96,
        "threads": 1,
        "max_running_requests": 64,
        "max_batch_tokens": 512,
        # Prompts of one test often begin alike, and what is computed should not depend on that.
        "prefix_caching": False,
    }
    return GpuServiceConfig(**{**values, **changes})


def local_core(
    made: GpuServiceConfig, model: CausalLM, *, host_blocks: int = 0, **host: Any
) -> EngineCore:
    """A core around a loaded model, with a `LocalHostTier` of that size."""
    # As `build_core` does. One thread: two that spin for each other starve on a busy machine.
    torch.set_num_threads(made.threads)
    geometry = geometry_of(model.spec, made.block_tokens)
    threads = ThreadPool(made.threads)
    gpu = open_cpu_kv(made, geometry, model.dtype, threads)
    tier: HostTier = NullHostTier()
    if host_blocks:
        tier = LocalHostTier(geometry, model.dtype, host_blocks, threads, **host)
    return assemble(made, model, geometry, gpu, tier, threads).core


def triton_core(
    made: GpuServiceConfig, model: CausalLM, *, host_blocks: int = 0, **host: Any
) -> EngineCore:
    """As `local_core`, with what runs on a CUDA device, here in Triton's interpreter and with
    padded sizes that suit it. Without `host_blocks` the device deals with the cpu_service that the
    configuration names."""
    from gpu_service.engine.build import exchange_limits, max_context
    from gpu_service.offload.factory import open_host_tier
    from gpu_service.pipeline.cuda.build import HOST_ROWS, CudaLimits, open_cuda
    from gpu_service.pipeline.cuda.shapes import ShapeTable

    torch.set_num_threads(made.threads)
    geometry = geometry_of(model.spec, made.block_tokens)
    exchange = None if host_blocks else exchange_limits(made, model.spec, model.dtype)
    lanes = exchange.lanes if exchange else 0
    pairs = ((1, 0), (3, 0), (1, 1), (3, 3))[: 2 * lanes]
    limits = CudaLimits(
        max_running=8,
        max_batch_tokens=made.max_batch_tokens,
        max_context_tokens=model.spec.max_context_tokens,
        memory_utilization=1.0,
        kv_blocks=made.gpu_kv_blocks,
        table=ShapeTable(
            (1, 2, 4, 8),
            (6, 12, 28),
            2,
            host=HOST_ROWS if exchange and not lanes else 0,
            lanes=pairs,
        ),
        host=exchange,
    )
    gpu, sweeps = open_cuda(model, geometry, limits, lambda *_: None)
    tier: HostTier = NullHostTier()
    if exchange:
        context = max_context(made, model.spec)
        tier = open_host_tier(
            made, model.spec, model.dtype,
            max_rows=made.max_running_requests, max_context_tokens=context,
        )  # fmt: skip
    elif host_blocks:
        threads = ThreadPool(made.threads)
        tier = LocalHostTier(geometry, model.dtype, host_blocks, threads, **host)
    return assemble(made, model, geometry, gpu, tier, None, sweeps).core


def host_of(core: EngineCore) -> LocalHostTier:
    """The host tier of a `local_core` that has one."""
    assert isinstance(core.host, LocalHostTier)
    return core.host


def prompt(tokens: int, seed: int = 0) -> list[int]:
    """Tokens that all tiny models know."""
    return [3 + (11 * i + 29 * seed) % 250 for i in range(tokens)]


def alone(model: CausalLM, request: Submit) -> list[int]:
    """What the request says with an engine to itself, on the GPU tier."""
    core = local_core(config("tiny", offload="never"), model)
    return run(core, [request]).tokens[request.request_id, 0]


@contextmanager
def real_core(made: GpuServiceConfig) -> Iterator[EngineCore]:
    """A core as the process builds it, host tier and all."""
    core = build_core(made).core
    try:
        yield core
    finally:
        core.close()


@dataclass
class Answers:
    """All that a core has said."""

    tokens: dict[tuple[str, int], list[int]] = field(default_factory=dict)
    logprobs: dict[tuple[str, int], list[TokenLogprob]] = field(default_factory=dict)
    finishes: dict[tuple[str, int], str] = field(default_factory=dict)
    prompts: dict[str, PromptLogprobs] = field(default_factory=dict)
    usages: dict[str, RequestUsage] = field(default_factory=dict)
    refusals: dict[str, Refusal] = field(default_factory=dict)


def greedy(
    request_id: str,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    placement: str = "auto",
    **sampling: Any,
) -> Submit:
    values: dict[str, Any] = {"temperature": 0.0, "max_tokens": max_tokens, "ignore_eos": True}
    return Submit(
        request_id=request_id,
        prompt_token_ids=list(prompt),
        sampling=SamplingSpec(**{**values, **sampling}),
        arrival=time.monotonic(),
        placement=placement,
    )


def step(core: EngineCore, answers: Answers) -> None:
    output = core.step()
    if output is None:
        return
    for delta in output.deltas:
        key = (delta.request_id, delta.index)
        assert key not in answers.finishes, "output after the end"
        answers.tokens.setdefault(key, []).extend(delta.token_ids)
        answers.logprobs.setdefault(key, []).extend(delta.logprobs or [])
        if delta.finish is not None:
            answers.finishes[key] = delta.finish
    answers.prompts.update((p.request_id, p) for p in output.prompt_logprobs)
    answers.usages.update((u.request_id, u) for u in output.usages)
    answers.refusals.update((r.request_id, r) for r in output.refusals)


def run(core: EngineCore, requests: Sequence[Submit], *, steps: int = 5000) -> Answers:
    """Submit all, run until nothing is live, and check that nothing is held."""
    answers = Answers()
    for request in requests:
        core.handle(request)
    for _ in range(steps):
        if not core.scheduler.live_requests:
            break
        step(core, answers)
    assert not core.scheduler.live_requests, "requests starve"
    check_empty(core)
    return answers


def check_empty(core: EngineCore) -> None:
    core.scheduler.state.check_integrity()
    assert all(core.scheduler.state.pools[tier].used_count == 0 for tier in Tier), "blocks leaked"
