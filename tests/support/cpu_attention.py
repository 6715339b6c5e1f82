"""Cases for the CPU attention kernel: a pool full of poison with some sequences in it, the call,
and the comparison with the float64 oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from kernels import cpu
from kernels.cpu import DType, KvLayout, KvPool, ThreadPool
from kernels.reference.decode_attention import decode_attention

TORCH = {
    DType.FLOAT32: torch.float32,
    DType.BFLOAT16: torch.bfloat16,
    DType.FLOAT16: torch.float16,
}
FP32_EPS = torch.finfo(torch.float32).eps
SENTINEL = 12345.0


def aligned(size: int, fill: int = 0xFF) -> np.ndarray:
    """Bytes aligned to 64. 0xFF is NaN in every float format: poison."""
    buffer = np.full(size + 64, fill, np.uint8)
    first = -buffer.ctypes.data % 64
    return buffer[first : first + size]


@dataclass(frozen=True)
class Case:
    lengths: tuple[int, ...]
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    block_tokens: int = 16
    kv: DType = DType.FLOAT32
    activation: DType = DType.FLOAT32
    window: int = 0
    softcap: float = 0.0
    spread: float = 1.0
    """Standard deviation of q: large ones make one token take nearly all weight."""
    seed: int = 0


class Sequences:
    """The case's KV in a pool with permuted tables, and what decode_attention takes."""

    def __init__(self, case: Case, append: bool = True) -> None:
        self.case = case
        rng = np.random.default_rng(case.seed)
        torch.manual_seed(case.seed)
        self.layout = KvLayout(2, case.kv_heads, case.head_dim, case.block_tokens, case.kv)
        used = [-(-n // case.block_tokens) for n in case.lengths]
        blocks = sum(used) + 2
        self.memory = aligned(self.layout.pool_bytes(blocks))
        self.pool = KvPool(self.layout, blocks, self.memory)
        dtype = TORCH[case.activation]
        order = rng.permutation(blocks).astype(np.int32)
        self.tables = np.full((len(used), max(used)), -1, np.int32)
        self.lengths = np.array(case.lengths, np.int32)
        shape = (case.kv_heads, case.head_dim)
        self.k_new, self.v_new = (torch.randn(len(used), *shape).to(dtype) for _ in range(2))
        taken = 0
        for row, (count, length) in enumerate(zip(used, case.lengths, strict=True)):
            self.tables[row, :count] = order[taken : taken + count]
            taken += count
            stored = length - 1 if append else length
            k, v = (torch.randn(stored, *shape).to(dtype) for _ in range(2))
            self.pool.write(1, self.slots(row)[:stored], k, v)
        self.appends = append
        self.q = (torch.randn(len(used), case.query_heads, case.head_dim) * case.spread).to(dtype)

    def slots(self, row: int) -> np.ndarray:
        at = np.arange(self.case.lengths[row])
        size = self.case.block_tokens
        blocks: np.ndarray = self.tables[row, at // size].astype(np.int64)
        return blocks * size + at % size

    def attend(self, threads: ThreadPool, **changes: object) -> tuple[torch.Tensor, np.ndarray]:
        """Output and log-sum-exp, surrounded by sentinels that are checked here."""
        case = self.case
        rows = len(case.lengths)
        framed = torch.full((rows + 2, *self.q.shape[1:]), SENTINEL, dtype=self.q.dtype)
        out = framed[1:-1]
        lse = np.full((rows + 2, case.query_heads), SENTINEL, np.float32)
        arguments: dict[str, object] = {
            "q": self.q, "k_new": self.k_new if self.appends else None,
            "v_new": self.v_new if self.appends else None, "block_tables": self.tables,
            "lengths": self.lengths, "scale": case.head_dim**-0.5, "window": case.window,
            "softcap": case.softcap,
        } | changes  # fmt: skip
        cpu.decode_attention(threads, self.pool, 1, out=out, lse=lse[1:-1], **arguments)  # type: ignore[arg-type]
        sentinel = torch.tensor(SENTINEL, dtype=self.q.dtype)
        assert (framed[0] == sentinel).all()
        assert (framed[-1] == sentinel).all()
        assert (lse[[0, -1]] == np.float32(SENTINEL)).all()
        return out, lse[1:-1]

    def stored(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """K and V per row as the pool holds them, dequantised, float32."""
        keys, values = [], []
        for row, length in enumerate(self.case.lengths):
            k, v = (torch.empty(length, *self.k_new.shape[1:]) for _ in range(2))
            self.pool.read(1, self.slots(row), k, v)
            keys.append(k)
            values.append(v)
        return keys, values

    def oracle(self) -> tuple[np.ndarray, np.ndarray]:
        keys, values = self.stored()
        return decode_attention(
            self.q.double().numpy(),
            [k.double().numpy() for k in keys],
            [v.double().numpy() for v in values],
            scale=self.case.head_dim**-0.5,
            window=self.case.window,
            softcap=self.case.softcap,
        )

    def torch_error(self, expected: np.ndarray) -> float:
        """How far plain torch in the activation's dtype is from the oracle. Int8 KV is compared as
        bf16: the kernel's own rounding of q and weights is finer than that."""
        case = self.case
        dtype = torch.bfloat16 if case.kv is DType.INT8 else self.q.dtype
        keys, values = self.stored()
        group = case.query_heads // case.kv_heads
        worst = 0.0
        for row, (k, v) in enumerate(zip(keys, values, strict=True)):
            if case.window:
                k, v = k[-case.window :], v[-case.window :]
            k, v = (x.to(dtype).repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
            scores = self.q[row, :, None].to(dtype) @ k.transpose(1, 2) * case.head_dim**-0.5
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            out = (torch.softmax(scores, -1) @ v)[:, 0]
            worst = max(worst, float(np.abs(out.double().numpy() - expected[row]).max()))
        return worst


def check(sequences: Sequences, out: torch.Tensor, lse: np.ndarray) -> None:
    """Raises AssertionError unless both are within twice torch's own error, NaN included."""
    expected, expected_lse = sequences.oracle()
    error = np.abs(out.double().numpy() - expected).max()
    # One token is exact in torch: allow the output's own rounding. In fp32 the order of a sum of
    # 256 products shows as well.
    ulps = 8 if out.dtype is torch.float32 else 0.5
    rounding = ulps * torch.finfo(out.dtype).eps * float(np.abs(expected).max())
    # A rounded score is off by eps times its size, and so is its weight: with few tokens torch may
    # be luckier there than its bound says.
    rounding += FP32_EPS * float(np.abs(expected_lse).max() * np.abs(expected).max())
    bound = 2 * sequences.torch_error(expected) + rounding
    assert error <= bound, f"output is off by {error:.3g}, more than {bound:.3g}"
    exact = sequences.case.kv is not DType.INT8
    # fp32 sums of products of size `spread`, or 16-bit q for int8.
    tolerance = (2e-6 if exact else 2e-4) * (8 + np.abs(expected_lse).max())
    assert np.abs(lse - expected_lse).max() <= tolerance


def each_isa() -> Sequence[str]:
    return cpu.isas()
