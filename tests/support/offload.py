"""A real cpu_service process and a host tier that talks to it, beside a pool in this process that
gets the same writes: whatever the tier answers must be what the kernel makes of that pool."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from gpu_service.offload.grpc_tier import GrpcHostTier
from gpu_service.offload.host_tier import HostRows, HostTierState
from gpu_service.offload.shape import HostShape, HostTierOptions
from gpu_service.offload.shm_tier import ShmHostTier
from kernels.cpu import DType, KvPool, ThreadPool, decode_attention
from tests.support.stack import Service, free_port

SHAPE = HostShape(
    layers=3,
    query_heads=6,
    kv_heads=2,
    head_dim=32,
    block_tokens=16,
    kv_dtype=DType.BFLOAT16,
    activation=DType.BFLOAT16,
    scale=0.2,
    sliding_window=(0, 40, 0),
)
BLOCKS = 48
SLOTS = BLOCKS * SHAPE.block_tokens
MAX_ROWS = 8
Tier = ShmHostTier | GrpcHostTier
TRANSPORTS = ("shm", "grpc")


@contextmanager
def cpu_service(directory: Path, **config: object) -> Iterator[Service]:
    """One serving cpu_service; at the end it must stop on SIGTERM."""
    runtime = directory / "run"
    runtime.mkdir(mode=0o700, parents=True, exist_ok=True)
    address = f"127.0.0.1:{free_port()}"
    settings = {
        "listen": address,
        "runtime_dir": str(runtime),
        "threads": 1,
        "drain_grace_seconds": 2.0,
        **config,
    }
    service = Service("cpu_service", address, directory=directory, config=settings)
    service.start()
    try:
        service.wait_serving()
        yield service
    finally:
        service.stop()


def options(address: str, transport: str = "shm", **changes: object) -> HostTierOptions:
    values: dict[str, object] = {
        "address": address,
        "blocks": BLOCKS,
        "max_rows": MAX_ROWS,
        "max_blocks_per_row": 6,
        "transport": transport,
        "deadline_seconds": 5.0,
        "open_seconds": 20.0,
        **changes,
    }
    return HostTierOptions(**values)  # type: ignore[arg-type]


@contextmanager
def open_tier(
    address: str, transport: str = "shm", shape: HostShape = SHAPE, **changes: object
) -> Iterator[Tier]:
    made = options(address, transport, **changes)
    tier: Tier = GrpcHostTier(shape, made) if transport == "grpc" else ShmHostTier(shape, made)
    try:
        yield tier
    finally:
        tier.close()


def poll_until(tier: Tier, state: HostTierState, seconds: float = 10.0) -> float:
    """Poll as an engine core that has nothing to do would; returns how long it took."""
    start = time.monotonic()
    while tier.state is not state:
        assert time.monotonic() - start < seconds, f"{tier.state} instead of {state}"
        time.sleep(0.002)
        tier.poll()
    return time.monotonic() - start


@dataclass
class Mirror:
    """Random contents and sweeps, the same for a tier and for a pool of this process."""

    shape: HostShape
    generator: torch.Generator
    threads: ThreadPool
    pool: KvPool

    @classmethod
    def make(cls, seed: int = 3, shape: HostShape = SHAPE) -> Mirror:
        memory = memoryview(mmap.mmap(-1, shape.layout.pool_bytes(BLOCKS)))
        pool = KvPool(shape.layout, BLOCKS, memory)
        return cls(shape, torch.Generator().manual_seed(seed), ThreadPool(1), pool)

    def normal(self, *shape: int) -> torch.Tensor:
        kinds = {DType.BFLOAT16: torch.bfloat16, DType.FLOAT32: torch.float32}
        return torch.randn(*shape, generator=self.generator).to(kinds[self.shape.activation])

    def fill(self, tier: Tier) -> None:
        """Every slot of every layer, in random order."""
        for layer in range(self.shape.layers):
            slots = torch.randperm(SLOTS, generator=self.generator)
            k, v = (self.normal(SLOTS, self.shape.kv_heads, self.shape.head_dim) for _ in range(2))
            tier.write_kv(layer, slots, k, v)
            self.pool.write(layer, slots, k, v)

    def check_contents(self, tier: Tier) -> None:
        slots = torch.arange(SLOTS)
        for layer in range(self.shape.layers):
            k, v = tier.read_kv(layer, slots)
            expected = torch.empty_like(k), torch.empty_like(v)
            self.pool.read(layer, slots, *expected)
            assert torch.equal(k, expected[0])
            assert torch.equal(v, expected[1])

    def rows(self, lengths: list[int]) -> HostRows:
        ids = torch.randperm(BLOCKS, generator=self.generator)[: len(lengths) * 6]
        tables = ids.to(torch.int32).numpy().reshape(len(lengths), 6)
        return HostRows(np.array(lengths, np.int32), tables)

    def sweep(
        self,
        tier: Tier,
        *lanes: HostRows,
        after_submit: Callable[[int], None] = lambda layer: None,
    ) -> None:
        """One sweep whose every output must equal the kernel's, bit by bit."""
        tier.begin_sweep(lanes)
        for layer in range(self.shape.layers):
            given = []
            for lane, rows in enumerate(lanes):
                count = len(rows.lengths)
                q = self.normal(count, self.shape.query_heads, self.shape.head_dim)
                k = self.normal(count, self.shape.kv_heads, self.shape.head_dim)
                v = self.normal(count, self.shape.kv_heads, self.shape.head_dim)
                tier.submit(lane, layer, q, k, v)
                given.append((rows, q, k, v))
            after_submit(layer)
            for lane, (rows, q, k, v) in enumerate(given):
                out = torch.full_like(q, float("nan"))
                tier.wait(lane, layer, out)
                assert torch.equal(out, self.attend(layer, rows, q, k, v))

    def attend(
        self, layer: int, rows: HostRows, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
    ) -> torch.Tensor:
        out = torch.empty_like(q)
        windows = self.shape.sliding_window
        decode_attention(
            self.threads,
            self.pool,
            layer,
            q,
            k,
            v,
            rows.block_tables,
            rows.lengths,
            out,
            scale=self.shape.scale,
            window=windows[layer] if windows else 0,
            softcap=self.shape.softcap,
        )
        return out


def cpu_seconds(pid: int) -> float:
    """User and system time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def open_descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def resident_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE
