"""What one layer's exchange between engine and cpu_service costs: `python -m benchmarks.dataplane`.

One row of 16 tokens, SmolLM2's heads, so that the attention itself is next to nothing. `gap`: how
long the engine does something else (spinning) between two layers. The in-process kernel runs in
the same loop; what an exchange costs is the difference.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import yaml

from gpu_service.offload.grpc_tier import GrpcHostTier
from gpu_service.offload.host_tier import HostRows
from gpu_service.offload.shape import HostShape, HostTierOptions
from gpu_service.offload.shm_tier import ShmHostTier
from kernels.cpu import DType, KvPool, ThreadPool, decode_attention

SHAPE = HostShape(30, 9, 3, 64, 16, DType.BFLOAT16, DType.BFLOAT16, scale=0.125)
BLOCKS = 64
ROWS = HostRows(np.array([16], np.int32), np.zeros((1, 1), np.int32))


@contextmanager
def cpu_service(spin_us: int) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "config.yaml"
        settings = {"listen": address, "runtime_dir": folder, "threads": 1, "spin_us": spin_us}
        config.write_text(yaml.safe_dump(settings))
        command = [sys.executable, "-m", "cpu_service", "--config", str(config)]
        process = subprocess.Popen([*command, "--log-level", "warning"])
        try:
            yield address
        finally:
            process.terminate()
            process.wait(timeout=60)


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.randn(1, SHAPE.query_heads, SHAPE.head_dim).bfloat16()
    k = torch.randn(1, SHAPE.kv_heads, SHAPE.head_dim).bfloat16()
    return q, k, torch.empty_like(q)


def times_us(
    layer: Callable[[int], None], sweep: Callable[[], object], gap_us: float, sweeps: int
) -> np.ndarray:
    """Each layer's call, in us, without the gaps."""
    taken = []
    for _ in range(sweeps):
        sweep()
        for index in range(SHAPE.layers):
            start = time.perf_counter()
            layer(index)
            end = time.perf_counter()
            taken.append((end - start) * 1e6)
            while gap_us and (time.perf_counter() - end) * 1e6 < gap_us:
                pass
    return np.array(taken)


def in_process(gap_us: float, sweeps: int) -> np.ndarray:
    memory = memoryview(mmap.mmap(-1, SHAPE.layout.pool_bytes(BLOCKS)))
    pool = KvPool(SHAPE.layout, BLOCKS, memory)
    q, k, out = tensors()
    with ThreadPool(1) as threads:

        def layer(index: int) -> None:
            tables, lengths = ROWS.block_tables, ROWS.lengths
            decode_attention(threads, pool, index, q, k, k, tables, lengths, out, scale=SHAPE.scale)

        return times_us(layer, lambda: None, gap_us, sweeps)


def through(tier: ShmHostTier | GrpcHostTier, gap_us: float, sweeps: int) -> np.ndarray:
    q, k, out = tensors()

    def layer(index: int) -> None:
        tier.submit(0, index, q, k, k)
        tier.wait(0, index, out)

    return times_us(layer, lambda: tier.begin_sweep([ROWS]), gap_us, sweeps)


def measure(spins: list[int], gaps: list[float], sweeps: int) -> list[dict[str, object]]:
    results: list[dict[str, object]] = []

    def add(path: str, spin_us: int | None, gap_us: float, taken: np.ndarray) -> None:
        p50, p90, p99 = (round(float(np.percentile(taken, q)), 1) for q in (50, 90, 99))
        results.append(
            {"path": path, "spin_us": spin_us, "gap_us": gap_us, "p50": p50, "p90": p90, "p99": p99}
        )
        spin = "-" if spin_us is None else spin_us
        print(f"{path:>10} {spin:>8} {gap_us:>8g} {p50:>8} {p90:>8} {p99:>8}", flush=True)

    print(f"{'path':>10} {'spin us':>8} {'gap us':>8} {'p50 us':>8} {'p90 us':>8} {'p99 us':>8}")
    for gap_us in gaps:
        add("in-process", None, gap_us, in_process(gap_us, sweeps))
    for spin_us in spins:
        with cpu_service(spin_us) as address:
            options = HostTierOptions(address, BLOCKS, 8, 8, spin_us=spin_us)
            tier = ShmHostTier(SHAPE, options)
            for gap_us in gaps:
                add("shm", spin_us, gap_us, through(tier, gap_us, sweeps))
            tier.close()
    with cpu_service(spins[-1]) as address:
        inline = GrpcHostTier(SHAPE, HostTierOptions(address, BLOCKS, 8, 8, transport="grpc"))
        add("grpc", None, 0, through(inline, 0, max(sweeps // 10, 2)))
        inline.close()
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spin-us", type=int, nargs="+", default=[0, 20, 50, 200, 1000])
    parser.add_argument("--gap-us", type=float, nargs="+", default=[0, 100, 400])
    parser.add_argument("--sweeps", type=int, default=100)
    parser.add_argument("--json", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{os.cpu_count()} CPUs, load {os.getloadavg()[0]:.1f}")
    results = measure(arguments.spin_us, arguments.gap_us, arguments.sweeps)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
