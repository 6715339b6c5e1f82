"""A profile of this machine with this model, in seconds: what the decision about modes starts from.

Everything goes through what serves requests later: the host tier, and plans that the runner runs.
Pools are empty at that time, so that nothing can be spoiled."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from gpu_service.engine.messages import SamplingSpec
from gpu_service.engine.profile_cache import StartProfile
from gpu_service.kv.table import blocks_for
from gpu_service.model.adjust import SamplingRow
from gpu_service.offload.host_tier import HostRows, HostTier
from gpu_service.pipeline.device_kv import AttentionGeometry
from gpu_service.pipeline.launch import Runner
from gpu_service.scheduling.plan import (
    DecodeRow,
    IterationPlan,
    Migration,
    Mode,
    PrefillRow,
    SubBatch,
    Tier,
)
from gpu_service.scheduling.rates import HostRates

Progress = Callable[[str, int, int], None]

_STAGE = "profile of this machine"
_REPEATS = 3
_HOST_ROWS = 16
_ROW_TOKENS = 1024
_MOVED_BLOCKS = 64
_DECODE_ROWS = (1, 4, 16, 64)
_CHUNK_ROWS = (16, 64, 256)
_SAMPLING = SamplingRow(SamplingSpec(temperature=0.0, max_tokens=1), (0,), [])


@dataclass(frozen=True)
class Subject:
    """What is measured. `deferred_ms`: where the device has timed it; None: it is learned."""

    geometry: AttentionGeometry
    dtype: torch.dtype
    device: torch.device
    host: HostTier
    runner: Runner
    gpu_blocks: int
    streamed_blocks: int
    max_batch_tokens: int
    max_running: int
    max_context_tokens: int
    times_sweeps: bool
    """The device has not timed its own sweeps."""
    deferred_ms: float | None = None


def measure(subject: Subject, progress: Progress) -> StartProfile:
    """Raises HostTierStalled if the host does not answer."""
    steps = 4 if subject.times_sweeps else 3
    progress(_STAGE, 0, steps)
    few, many = (_host_sweep_ms(subject, rows) for rows in ([1], _rows(subject)))
    tokens = sum(_rows(subject))
    token_ms = max(many - few, 0.1 * many) / max(tokens - 1, 1)
    progress(_STAGE, 1, steps)
    small, large = (_move_ms(subject, blocks) for blocks in (1, _moved(subject)))
    moved = max(1, (_moved(subject) - 1) * subject.geometry.block_tokens)
    progress(_STAGE, 2, steps)
    link_token_ms = max(large - small, 0.0) / moved
    rates = HostRates(
        cpu_token_ms=token_ms,
        cpu_sweep_ms=0.0,
        link_token_ms=link_token_ms,
        streamed_token_ms=min(link_token_ms, _streamed_token_ms(subject)),
        move_ms=small,
        deferred_ms=subject.deferred_ms or 0.0,
        inline_ms=few,
    )
    profile = StartProfile(rates=rates)
    if subject.times_sweeps:
        profile = _with_sweeps(subject, rates)
        progress(_STAGE, 3, steps)
    progress(_STAGE, steps, steps)
    return profile


# -- the host ------------------------------------------------------------------------------------


def _rows(subject: Subject) -> list[int]:
    """Lengths of rows in blocks of their own, within the pool and what a session's sweep holds."""
    size = subject.geometry.block_tokens
    each = min(_ROW_TOKENS, subject.host.blocks * size, subject.max_context_tokens)
    count = min(_HOST_ROWS, subject.host.blocks // blocks_for(each, size), subject.max_running)
    return [each] * max(1, count)


def _host_sweep_ms(subject: Subject, lengths: Sequence[int]) -> float:
    """A sweep of rows with these lengths, all layers, nothing beside it."""
    geometry = subject.geometry
    width = blocks_for(max(lengths), geometry.block_tokens)
    tables = np.arange(len(lengths) * width, dtype=np.int32).reshape(len(lengths), width)
    rows = HostRows(np.array(lengths, np.int32), tables)

    def tensor(heads: int) -> torch.Tensor:
        shape = (len(lengths), heads, geometry.head_dim)
        return torch.ones(shape, dtype=subject.dtype, device=subject.device)

    q, k = tensor(geometry.query_heads), tensor(geometry.kv_heads)
    out = torch.empty_like(q)

    def sweep() -> None:
        subject.host.begin_sweep([rows])
        for layer in range(geometry.layers):
            subject.host.submit(0, layer, q, k, k)
            subject.host.wait(0, layer, out)

    return _median_ms(sweep)


# -- the link ------------------------------------------------------------------------------------


def _moved(subject: Subject) -> int:
    return max(1, min(_MOVED_BLOCKS, subject.gpu_blocks, subject.host.blocks))


def _move_ms(subject: Subject, blocks: int) -> float:
    ids = np.arange(blocks, dtype=np.int32)
    tokens = blocks * subject.geometry.block_tokens
    return _run_ms(subject, (), (Migration(0, Tier.HOST, tokens, ids, ids),))


def _streamed_token_ms(subject: Subject) -> float:
    """At most: what bounds a sweep with all that staging holds may be the device itself."""
    size, blocks = subject.geometry.block_tokens, min(subject.streamed_blocks, subject.host.blocks)
    each = min(blocks, subject.max_context_tokens // size)
    if not each:
        return math.inf
    ids = np.arange(blocks, dtype=np.int32)
    rows = tuple(
        DecodeRow(first, 0, each * size, ids[first : first + each])
        for first in range(0, blocks - each + 1, each)
    )[: subject.max_running]
    plan = IterationPlan(0, Mode.INLINE, (), (SubBatch(streamed=rows),))

    def seconds() -> float:
        begin = time.perf_counter()
        result = subject.runner.launch(plan, _Sampling()).result()
        return result.device_seconds or time.perf_counter() - begin

    seconds()
    tokens = sum(row.length for row in rows)
    return 1e3 * statistics.median(seconds() for _ in range(_REPEATS)) / tokens


# -- the device ----------------------------------------------------------------------------------


def _with_sweeps(subject: Subject, rates: HostRates) -> StartProfile:
    decode, mixed = {}, {}
    most = max(1, min(subject.gpu_blocks, subject.max_running, subject.max_batch_tokens))
    for rows in sorted({min(rows, most) for rows in (*_DECODE_ROWS, most)}):
        decode[rows] = _run_ms(subject, (_decode(subject, rows),))
    room = min(subject.gpu_blocks * subject.geometry.block_tokens, subject.max_context_tokens)
    most = min(subject.max_batch_tokens, room)
    for rows in sorted({min(rows, most) for rows in (*_CHUNK_ROWS, most)}):
        blocks = np.arange(blocks_for(rows, subject.geometry.block_tokens), dtype=np.int32)
        chunk = PrefillRow(0, Tier.GPU, 0, (0,) * rows, blocks, True)
        mixed[rows] = _run_ms(subject, (SubBatch(prefill=(chunk,)),))
    longest = min(_ROW_TOKENS, room)
    longer = _run_ms(subject, (_decode(subject, 1, longest),))
    context_ms = max(0.0, longer - decode[1]) / max(1, longest - 1)
    return StartProfile(rates=rates, decode_ms=decode, mixed_ms=mixed, context_ms=context_ms)


def _decode(subject: Subject, rows: int, length: int = 1) -> SubBatch:
    """`rows` of them, in blocks that they share: nobody looks at what they store."""
    blocks = np.arange(blocks_for(length, subject.geometry.block_tokens), dtype=np.int32)
    return SubBatch(gpu_decode=tuple(DecodeRow(key, 0, length, blocks) for key in range(rows)))


class _Sampling(Mapping[int, SamplingRow]):
    """Greedy, for whoever asks."""

    def __getitem__(self, key: int) -> SamplingRow:
        return _SAMPLING

    def __contains__(self, key: object) -> bool:
        return True

    def __iter__(self) -> Iterator[int]:
        return iter(())

    def __len__(self) -> int:
        return 0


def _run_ms(
    subject: Subject, batches: tuple[SubBatch, ...], migrations: tuple[Migration, ...] = ()
) -> float:
    plan = IterationPlan(0, Mode.INLINE, migrations, batches)

    def run() -> None:
        subject.runner.launch(plan, _Sampling()).result()
        if subject.device.type == "cuda":
            torch.cuda.synchronize(subject.device)

    return _median_ms(run)


def _median_ms(work: Callable[[], None]) -> float:
    """Of a few runs after a first one, which takes pages and compiles."""
    times = []
    for _ in range(1 + _REPEATS):
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[1:])
