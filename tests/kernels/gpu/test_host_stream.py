"""The host pool's blocks into staging and new tokens out again, one layer at a time: bit for bit
what kernels.cpu reads and writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from kernels import cpu
from kernels.gpu import host_stream
from kernels.gpu.decode_attention import DecodeAttention
from kernels.gpu.host_stream import HostStream
from kernels.gpu.kv_cache import STAGED, GpuKvLayout
from kernels.gpu.prefill_attention import PrefillAttention
from kernels.gpu.rope_store import rope_store
from kernels.gpu.tensors import INTERPRET
from tests.support.mutants import mutated

pytestmark = pytest.mark.skipif(not INTERPRET, reason="its pool is memory of this process")

LAYERS, BLOCKS, STAGING, HOST_BLOCKS, MOST = 3, 4, 6, 7, 8
SHAPES = {"llama": (2, 16, 128), "smollm2": (3, 32, 64), "odd-dim": (1, 64, 80)}
TYPES = {
    "fp32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "bf16-int8": (torch.bfloat16, torch.int8),
    "fp32-int8": (torch.float32, torch.int8),
}
HOST_TYPES = {
    torch.float32: cpu.DType.FLOAT32,
    torch.bfloat16: cpu.DType.BFLOAT16,
    torch.float16: cpu.DType.FLOAT16,
    torch.int8: cpu.DType.INT8,
}
BROUGHT = ((2, 0), (6, 5), (0, 3))
"""Host block, block of the ring and of staging"""
PUT = ((5, 6, 0, 1), (3, 0, 7, 8), (0, 2, 15, 16), (1, 4, 3, 14), (4, 5, 0, 0))
"""Staging block, host block, first token, end"""


class Both:
    """A host pool with something in it, and a cache with staging."""

    def __init__(self, shape: str, kinds: str) -> None:
        heads, tokens, dim = SHAPES[shape]
        self.dtype, self.host_dtype = TYPES[kinds]
        self.layout = GpuKvLayout(LAYERS, BLOCKS, heads, tokens, dim, staging=STAGING)
        self.cache = self.layout.allocate(self.dtype, "cpu")
        self.staging = self.layout.staged(self.cache)
        host = cpu.KvLayout(LAYERS, heads, dim, tokens, HOST_TYPES[self.host_dtype])
        size = host.pool_bytes(HOST_BLOCKS)
        self.memory = np.empty(size + 64, dtype=np.uint8)
        self.begin = -self.memory.ctypes.data % 64
        self.pool = cpu.KvPool(host, HOST_BLOCKS, self.memory[self.begin : self.begin + size])
        self.bytes = self.memory[self.begin : self.begin + size]
        draw = torch.Generator().manual_seed(3)
        self.staging.copy_(torch.randn(self.staging.shape, generator=draw) * 3)
        everywhere = torch.arange(HOST_BLOCKS * tokens)
        for layer in range(LAYERS):
            k, v = torch.randn(2, len(everywhere), heads, dim, generator=draw).to(self.dtype)
            self.pool.write(layer, everywhere, k, v)
        address = self.memory.ctypes.data + self.begin
        self.where = torch.tensor([address, size // LAYERS], dtype=torch.int64)

    def read_by_cpu(self, layer: int, block: int) -> torch.Tensor:
        """`[2, heads, tokens, dim]`"""
        _, tokens, _ = shape = self.layout.kv_heads, self.layout.block_tokens, self.layout.head_dim
        both = torch.empty((2, tokens, shape[0], shape[2]), dtype=self.dtype)
        self.pool.read(layer, torch.arange(tokens) + block * tokens, both[0], both[1])
        return both.transpose(1, 2)


def table(moves: Any, columns: int) -> torch.Tensor:
    """With an entry more than counts: it is not to be looked at."""
    filled = torch.full((columns, MOST), 1 << 20, dtype=torch.int32)
    filled[:, : len(moves)] = torch.tensor(moves, dtype=torch.int32).view(-1, columns).T
    return filled


def counts(brought: int, put: int, number: int = 0) -> torch.Tensor:
    return torch.tensor([brought, put, number], dtype=torch.int32)


def check_unpack(both: Both, make: Any = HostStream) -> None:
    stream = make(both.layout, both.host_dtype)
    piece = stream.piece_bytes
    for layer in (0, 2):
        staging = both.staging[layer % 2]
        staging.fill_(3.0)
        expected, ring = staging.clone(), torch.zeros(STAGING, piece, dtype=torch.uint8)
        for block, staged in BROUGHT:
            expected[staged] = both.read_by_cpu(layer, block)
            first = (layer * HOST_BLOCKS + block) * piece
            ring[staged] = torch.from_numpy(both.bytes[first : first + piece])
        moves = table([staged for _, staged in BROUGHT], 1)[0]
        stream.unpack(ring, staging, moves, counts(len(BROUGHT), 9))
        integers = torch.int32 if both.dtype == torch.float32 else torch.int16
        assert torch.equal(staging.view(integers), expected.view(integers))


def check_put(both: Both, make: Any = HostStream) -> None:
    layer, staging = 1, both.staging[1]
    before, size = both.bytes.copy(), both.layout.block_tokens
    # The last one is a whole block.
    puts = [(*put[:3], put[3] or size) for put in PUT]
    make(both.layout, both.host_dtype).put(
        layer, staging, table(puts, 4), counts(9, len(puts)), both.where
    )
    found = both.bytes.copy()
    both.bytes[:] = before
    for staged, block, first, end in puts:
        k, v = staging[staged].transpose(1, 2)[:, first:end].contiguous()
        both.pool.write(layer, torch.arange(first, end) + block * size, k, v)
    assert np.array_equal(found, both.bytes)
    assert not np.array_equal(found, before)


@pytest.mark.parametrize("kinds", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_bits_are_those_of_the_cpu(shape: str, kinds: str) -> None:
    both = Both(shape, kinds)
    check_unpack(both)
    check_put(both)


def test_without_anything_to_move_nothing_is_looked_at() -> None:
    both = Both("llama", "bf16")
    staging, before = both.staging.clone(), both.bytes.copy()
    nowhere, nothing = torch.zeros(2, dtype=torch.int64), counts(0, 0)
    stream = HostStream(both.layout, torch.bfloat16)
    ring = torch.zeros(STAGING, stream.piece_bytes, dtype=torch.uint8)
    words = torch.tensor([-5, -7], dtype=torch.int32)
    stream.arrive(0, words, nothing)
    stream.unpack(ring, both.staging[0], table((), 1)[0], nothing)
    stream.put(0, both.staging[0], table((), 4), nothing, nowhere)
    assert torch.equal(both.staging, staging)
    assert np.array_equal(both.bytes, before)
    assert words.tolist() == [-5, -7]


@pytest.mark.parametrize("number", [0, 40, (1 << 31) - 3, -(1 << 31) + 5])
def test_a_layer_arrives_once_it_is_said_to_be_there(number: int) -> None:
    """Numbers wrap around. The word says that the layers before have been unpacked."""
    stream = HostStream(Both("llama", "bf16").layout, torch.bfloat16)

    def wrapped(value: int) -> int:
        return (value + (1 << 31)) % (1 << 32) - (1 << 31)

    for there in (1, 2, 3):
        words = torch.tensor([wrapped(number + there), 9], dtype=torch.int32)
        if there < 3:
            with pytest.raises(AssertionError, match="nobody"):
                stream.arrive(2, words, counts(1, 0, number))
            continue
        stream.arrive(2, words, counts(1, 0, number))
        assert words[1] == wrapped(number + 2)


def test_staging_is_behind_the_cache() -> None:
    layout = GpuKvLayout(LAYERS, BLOCKS, 1, 16, 16, staging=STAGING)
    cache = layout.allocate(torch.float32, "cpu")
    staging = layout.staged(cache)
    assert cache.shape == layout.shape
    assert staging.shape == (2, STAGING, 2, 1, 16, 16)
    staging[1, 2].fill_(7.0)
    assert not cache.any()
    for layer in range(LAYERS):
        at = (STAGED + layout.staging_shift(layer)) * layout.piece_elements
        begin = staging[layer % 2].storage_offset() - cache[layer].storage_offset()
        assert at == begin


def test_wrong_arguments_are_sentences() -> None:
    both = Both("llama", "bf16")
    stream = HostStream(both.layout, torch.bfloat16)
    with pytest.raises(ValueError, match="must be a float or int8"):
        HostStream(both.layout, torch.float64)
    ring = torch.zeros(STAGING, 4, dtype=torch.uint8)
    with pytest.raises(ValueError, match="ring has shape"):
        stream.unpack(ring, both.staging[0], table((), 1)[0], counts(0, 0))
    with pytest.raises(ValueError, match="moves has shape"):
        stream.put(0, both.staging[0], table((), 2), counts(0, 0), both.where)
    with pytest.raises(ValueError, match="does not go into a pool"):
        HostStream(both.layout, torch.float32).put(
            0, both.staging[0], table((), 4), counts(0, 0), both.where
        )


MUTANTS = {
    "another head of the ring": ("(block * KV_HEADS + head) * region", "block * region", "bf16"),
    "another layer": ("layer.to(tl.int64) * tl.load(pool_ptr + 1)", "0", "bf16"),
    "one head for all": ("* KV_HEADS + head) * REGION", "* KV_HEADS) * REGION", "bf16"),
    "one program's share": ("tl.program_id(0), pieces, tl.num", "0, 2, tl.num", "bf16"),
    "scales of K for V": ("scales + BLOCK", "scales", "bf16-int8"),
    "no scales in between": ("(8 * BLOCK if QUANTISED else 0)", "0", "bf16-int8"),
    "one token too many": ("(token < end)", "(token <= end)", "bf16-int8"),
    "a block's other tokens": ("(turned >= first)", "(turned >= 0)", "bf16"),
    "a whole block's other half": ("move(values, target", "move(source, target", "bf16"),
    "keys in the order of values": ("if IS_KEY:", "if False:", "bf16"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, tmp_path: Path) -> None:
    old, new, kinds = MUTANTS[name]
    make = mutated(host_stream, old, new, tmp_path).HostStream

    def check() -> None:
        both = Both("llama", kinds)
        check_unpack(both, make)
        check_put(both, make)

    with pytest.raises(AssertionError):
        check()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_attention_reads_staging_as_it_reads_the_cache(layer: int) -> None:
    """The same tokens in the layer's own blocks and, in part, in staging."""
    layout = GpuKvLayout(LAYERS, BLOCKS, 2, 16, 32, staging=STAGING)
    cache = layout.allocate(torch.float32, "cpu")
    staging, draw = layout.staged(cache), torch.Generator().manual_seed(layer)
    cache[:] = torch.randn(cache.shape, generator=draw)
    staging.fill_(float("nan"))
    for block, staged in ((1, 4), (3, 0)):
        staging[layer % 2, staged] = cache[layer, block]
    own = torch.tensor([[2, 1, 3]], dtype=torch.int32)
    mixed = torch.tensor([[2, STAGED + 4, STAGED]], dtype=torch.int32)
    lengths = torch.tensor([37], dtype=torch.int32)
    decode = DecodeAttention(layout, 4, 1, 2, "cpu")
    prefill = PrefillAttention(layout, 4, "cpu")
    q, first_rows = torch.randn(5, 4, 32, generator=draw), torch.tensor([0, 5], dtype=torch.int32)
    told = []
    for tables in (own, mixed):
        out = torch.zeros(6, 4, 32)
        decode(q[:1], cache[layer], tables, lengths, out[:1], scale=0.2, layer=layer)
        prefill(
            q, cache[layer], tables, lengths, first_rows, out[1:], longest=5, scale=0.2, layer=layer
        )
        told.append(out)
    assert torch.equal(*told)
    assert told[0].isfinite().all()


def test_new_tokens_are_stored_in_staging() -> None:
    layout = GpuKvLayout(LAYERS, BLOCKS, 2, 16, 32, staging=STAGING)
    cache = layout.allocate(torch.float32, "cpu")
    staging = layout.staged(cache)
    qkv, cos_sin = torch.randn(2, 8, 32), torch.rand(8, 2, 16)
    slots, positions = torch.tensor([(STAGED + 3) * 16 + 5, 2 * 16 + 7]), torch.tensor([1, 1])
    rope_store(qkv, cos_sin, positions, slots, torch.empty(2, 4, 32), cache[1], layout, layer=1)
    assert torch.equal(staging[1, 3, 1, :, 5], qkv[0, 6:])
    assert torch.equal(cache[1, 2, 1, :, 7], qkv[1, 6:])
    assert torch.count_nonzero(staging) == torch.count_nonzero(cache) == 2 * 2 * 32
