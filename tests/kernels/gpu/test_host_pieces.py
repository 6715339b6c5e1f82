"""Blocks between the GPU tier's cache and the host's layout: bit for bit what kernels.cpu says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernels import cpu
from kernels.gpu import host_pieces
from kernels.gpu.host_pieces import HOST_LAYOUT_VERSION, HostPieces
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.tensors import INTERPRET
from tests.support.mutants import mutated

DEVICE = "cpu" if INTERPRET else "cuda"
LAYERS, BLOCKS, HOST_BLOCKS = 2, 5, 7
SHAPES = {
    "llama": (2, 16, 128),
    "smollm2": (3, 32, 64),
    "odd-dim": (1, 64, 80),
    "small": (2, 16, 16),
    "wide": (1, 16, 256),
}
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-int8": (torch.bfloat16, torch.int8),
    "fp16-int8": (torch.float16, torch.int8),
    "fp32-int8": (torch.float32, torch.int8),
}
HOST_TYPES = {
    torch.float32: cpu.DType.FLOAT32,
    torch.bfloat16: cpu.DType.BFLOAT16,
    torch.float16: cpu.DType.FLOAT16,
    torch.int8: cpu.DType.INT8,
}
MOVED = ((4, 2), (0, 6), (3, 0))
"""GPU block, host block"""


class Both:
    """A cache and a host pool, and the pool's bytes as the device sees them."""

    def __init__(self, shape: str, kinds: str) -> None:
        heads, tokens, dim = SHAPES[shape]
        self.dtype, self.host_dtype = TYPES[kinds]
        self.layout = GpuKvLayout(LAYERS, BLOCKS, heads, tokens, dim)
        draw = torch.Generator().manual_seed(3)
        cache = torch.randn(self.layout.shape, generator=draw) * 4
        cache[0, 3, 0, 0, 2] = 0
        # Halves between two integers once scaled: the even one is taken.
        cache[1, 3, 1, 0, 1] = 2.5
        cache[1, 3, 1, 0, 1, 0] = 127.0
        self.cache = cache.to(self.dtype)
        host = cpu.KvLayout(LAYERS, heads, dim, tokens, HOST_TYPES[self.host_dtype])
        self.piece_bytes = host.piece_bytes
        # The pool wants 64 bytes of alignment.
        memory = np.full(host.pool_bytes(HOST_BLOCKS) + 64, 7, dtype=np.uint8)
        begin = -memory.ctypes.data % 64
        self.memory = memory[begin : begin + host.pool_bytes(HOST_BLOCKS)]
        self.pool = cpu.KvPool(host, HOST_BLOCKS, self.memory)

    def pieces(self) -> torch.Tensor:
        """uint8 `[layers, host blocks, piece_bytes]`, a copy."""
        shape = (LAYERS, HOST_BLOCKS, self.piece_bytes)
        return torch.from_numpy(self.memory.copy()).reshape(shape).to(DEVICE)

    def slots(self) -> torch.Tensor:
        size = self.layout.block_tokens
        return torch.cat([torch.arange(size) + host * size for _, host in MOVED])

    def write_by_cpu(self) -> None:
        for layer in range(LAYERS):
            k, v = (
                torch.cat([self.cache[layer, block, half].transpose(0, 1) for block, _ in MOVED])
                for half in (0, 1)
            )
            self.pool.write(layer, self.slots(), k.contiguous(), v.contiguous())

    def read_by_cpu(self) -> torch.Tensor:
        """The cache after promotion; what is not moved stays."""
        result, size = torch.full_like(self.cache, 3.0), self.layout.block_tokens
        shape = (len(MOVED) * size, self.layout.kv_heads, self.layout.head_dim)
        for layer in range(LAYERS):
            both = torch.empty((2, *shape), dtype=self.dtype)
            self.pool.read(layer, self.slots(), both[0], both[1])
            for half in (0, 1):
                for chunk, (block, _) in zip(both[half].split(size), MOVED, strict=True):
                    result[layer, block, half] = chunk.transpose(0, 1)
        return result


def check_both_ways(both: Both, make: Any = HostPieces) -> None:
    pieces = make(both.layout, both.host_dtype)
    assert pieces.piece_bytes == both.piece_bytes
    numbers = torch.tensor([*MOVED, (1, -1)], dtype=torch.int32, device=DEVICE)
    blocks, host_blocks = (numbers[:, i].contiguous() for i in (0, 1))
    written = both.pieces()
    pieces.write(both.cache.to(DEVICE), blocks, written, host_blocks)
    both.write_by_cpu()
    assert torch.equal(written, both.pieces())
    cache = torch.full_like(both.cache, 3.0, device=DEVICE)
    pieces.read(written, host_blocks, cache, blocks)
    expected = both.read_by_cpu()
    integers = torch.int32 if both.dtype == torch.float32 else torch.int16
    assert torch.equal(cache.cpu().view(integers), expected.view(integers))


@pytest.mark.parametrize("kinds", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_the_cpu(shape: str, kinds: str) -> None:
    check_both_ways(Both(shape, kinds))


def test_the_layout_is_the_one_meant() -> None:
    assert cpu.LAYOUT_VERSION == HOST_LAYOUT_VERSION


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows(bad: float) -> None:
    both = Both("llama", "bf16-int8")
    both.cache[0, 4, 0, 1, 5, 9] = bad
    pieces, written = HostPieces(both.layout, torch.int8), both.pieces()
    ids = torch.tensor(MOVED, dtype=torch.int32, device=DEVICE)
    blocks, host_blocks = ids[:, 0].contiguous(), ids[:, 1].contiguous()
    pieces.write(both.cache.to(DEVICE), blocks, written, host_blocks)
    cache = torch.zeros_like(both.cache, device=DEVICE)
    pieces.read(written, host_blocks, cache, blocks)
    assert cache[0, 4, 0, 1, 5].isnan().all()
    cache[0, 4, 0, 1, 5] = 0
    assert cache.isfinite().all()


def test_one_layer_by_itself() -> None:
    """As a prompt's KV leaves, layer by layer, into a staging buffer."""
    both = Both("llama", "bf16")
    pieces, staging = HostPieces(both.layout, torch.bfloat16), both.pieces()[:1]
    ids = torch.tensor(MOVED, dtype=torch.int32, device=DEVICE)
    blocks, host_blocks = ids[:, 0].contiguous(), ids[:, 1].contiguous()
    pieces.write(both.cache[1:].to(DEVICE), blocks, staging, host_blocks)
    both.write_by_cpu()
    assert torch.equal(staging[0], both.pieces()[1])


def test_wrong_arguments_are_sentences() -> None:
    both = Both("llama", "bf16")
    ids = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    cache = both.cache.to(DEVICE)
    with pytest.raises(ValueError, match="must be a float or int8"):
        HostPieces(both.layout, torch.float64)
    wrong = torch.zeros(LAYERS, 1, 2 * both.piece_bytes, dtype=torch.uint8, device=DEVICE)
    with pytest.raises(ValueError, match="does not go into a pool"):
        HostPieces(both.layout, torch.float32).write(cache, ids, wrong, ids)
    with pytest.raises(ValueError, match="host has shape"):
        HostPieces(both.layout, torch.int8).write(cache, ids, both.pieces(), ids)


MUTANTS = {
    "keys not turned": ("tl.permute(tiles, (0, 2, 1, 3))", "tiles", "bf16"),
    "values not turned": ("tl.permute(tiles, (0, 2, 1))", "tiles", "bf16-int8"),
    "scales exchanged": ("scales + BLOCK, False", "scales, False", "bf16-int8"),
    "scale of 128": ("tl.div_rn(largest, 127.0)", "tl.div_rn(largest, 128.0)", "bf16-int8"),
    "rounded down": ("(scaled + 12582912.0) - 12582912.0", "scaled", "bf16-int8"),
    "bf16 cut off": ("bits + 0x7FFF + ((bits >> 16) & 1)", "bits", "bf16-int8"),
    "heads reversed": (
        "KV_HEADS + first + head) * region",
        "KV_HEADS + KV_HEADS - 1 - first - head) * region",
        "bf16",
    ),
    "K and V exchanged": ("cache + KV_HEADS * half,", "cache,", "bf16"),
    "one turn alone": ("turns, tl.num_programs(0)", "turns, turns", "bf16"),
    "one head alone": ("tl.static_range(HEADS)", "tl.static_range(1)", "bf16"),
    "one layer for all": ("layer * host_blocks", "0 * host_blocks", "bf16"),
    "w of another type": ("torch.bfloat16: 2", "torch.bfloat16: 4", "bf16"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, tmp_path: Path) -> None:
    old, new, kinds = MUTANTS[name]
    make = mutated(host_pieces, old, new, tmp_path).HostPieces
    with pytest.raises(AssertionError):
        check_both_ways(Both("llama", kinds), make)
