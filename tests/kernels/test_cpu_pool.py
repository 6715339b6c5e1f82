"""The KV pool's copies and conversions, the thread pool, and what bad arguments get."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from kernels import cpu
from kernels.cpu import DType, KvLayout, KvPool, ThreadPool
from tests.support.cpu_attention import TORCH, Case, Sequences, aligned

LAYOUT = KvLayout(3, 2, 80, 32, DType.BFLOAT16)


def make_pool(layout: KvLayout = LAYOUT, blocks: int = 4) -> tuple[KvPool, np.ndarray]:
    memory = aligned(layout.pool_bytes(blocks))
    return KvPool(layout, blocks, memory), memory


@pytest.mark.parametrize("dtype", list(TORCH), ids=lambda d: d.name.lower())
@pytest.mark.parametrize("block_tokens", [16, 32, 64])
def test_what_is_written_is_read_and_nothing_else_changes(dtype: DType, block_tokens: int) -> None:
    layout = KvLayout(2, 3, 48, block_tokens, dtype)
    pool, memory = make_pool(layout)
    before = memory.copy()
    slots = np.random.default_rng(0).permutation(4 * block_tokens)[: block_tokens + 5]
    k, v = (torch.randn(len(slots), 3, 48).to(TORCH[dtype]) for _ in range(2))
    with ThreadPool(2) as threads:
        pool.write(1, slots, k, v, threads)
        k_out, v_out = torch.empty_like(k), torch.empty_like(v)
        pool.read(1, slots, k_out, v_out, threads)
    assert torch.equal(k, k_out)
    assert torch.equal(v, v_out)
    changed = np.count_nonzero(memory != before)
    assert changed <= len(slots) * layout.piece_bytes // block_tokens
    assert np.array_equal(memory[: layout.pool_bytes(4) // 2], before[: layout.pool_bytes(4) // 2])


def test_int8_rounds_to_half_a_step_of_its_scale() -> None:
    pool, _ = make_pool(KvLayout(1, 2, 64, 16, DType.INT8))
    slots = np.arange(20)
    k, v = torch.randn(20, 2, 64) * 5, torch.randn(20, 2, 64)
    v[3] = 0
    pool.write(0, slots, k, v)
    k_out, v_out = torch.empty_like(k), torch.empty_like(v)
    pool.read(0, slots, k_out, v_out)
    step = k.abs().amax(-1, keepdim=True) / 127
    assert ((k - k_out).abs() <= step * 0.5001).all()
    assert (v_out[3] == 0).all()


def test_float_conversions_round_as_torch_does() -> None:
    special = torch.tensor([0.0, -0.0, 1e-8, -6e-8, 65504.0, 65520.0, 1e30, float("inf")])
    k = torch.cat([special, torch.randn(2000) * torch.logspace(-9, 6, 2000)])
    k = torch.cat([k, k.new_zeros(-len(k) % 16)]).reshape(-1, 1, 16)
    for dtype in (DType.BFLOAT16, DType.FLOAT16):
        layout = KvLayout(1, 1, 16, 16, dtype)
        pool, _ = make_pool(layout, blocks=-(-len(k) // 16))
        slots = np.arange(len(k))
        pool.write(0, slots, k, k)
        k_out, v_out = (torch.empty(k.shape, dtype=TORCH[dtype]) for _ in range(2))
        pool.read(0, slots, k_out, v_out)
        assert torch.equal(k_out, k.to(TORCH[dtype]))
        assert torch.equal(v_out, k.to(TORCH[dtype]))


def test_copy_from_moves_whole_blocks_of_all_layers() -> None:
    source, source_memory = make_pool()
    target, memory = make_pool(blocks=6)
    source_memory[:] = np.random.default_rng(0).integers(0, 255, len(source_memory))
    with ThreadPool(2) as threads:
        target.copy_from(source, np.array([3, 1]), np.array([0, 5]), threads)
    pieces = memory.reshape(3, 6, -1)
    expected = source_memory.reshape(3, 4, -1)
    assert np.array_equal(pieces[:, 0], expected[:, 3])
    assert np.array_equal(pieces[:, 5], expected[:, 1])
    assert (pieces[:, 1:5] == 0xFF).all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lengths": np.array([0, 20], np.int32)}, "length 0 of row 0"),
        ({"lengths": np.array([5, 33], np.int32)}, "length 33 of row 1"),
        ({"lengths": np.array([5, 20], np.int64)}, "lengths must be int32"),
        ({"lengths": np.array([5], np.int32)}, "lengths has shape"),
        ({"block_tables": np.full((2, 2), 99, np.int32)}, "block id 99 of row 0 is outside"),
        ({"block_tables": np.full((2, 2), -1, np.int32)}, "block id -1 of row 0 is outside"),
        ({"block_tables": np.zeros(4, np.int32)}, "block_tables"),
        ({"k_new": None}, "k_new and v_new come together"),
        ({"q": torch.zeros(2, 4, 64, dtype=torch.float64)}, "q must be float32"),
        ({"q": torch.zeros(2, 4, 128)[..., ::2]}, "q must be contiguous"),
        ({"q": torch.zeros(2, 3, 64)}, "shape"),
        ({"scale": float("nan")}, "scale and softcap must be finite"),
        ({"softcap": -1.0}, "softcap not negative"),
        ({"window": -1}, "window must not be negative"),
    ],
)
def test_bad_arguments_raise_a_sentence(changes: dict[str, object], message: str) -> None:
    sequences = Sequences(Case((5, 20)))
    with ThreadPool(1) as threads, pytest.raises(ValueError, match=message):
        sequences.attend(threads, **changes)


def test_bad_slots_layers_and_memory_raise_a_sentence() -> None:
    pool, memory = make_pool()
    kv = torch.zeros(1, 2, 80)
    for slot in (-1, 4 * 32):
        with pytest.raises(ValueError, match=f"slot {slot} is outside"):
            pool.write(0, np.array([slot]), kv, kv)
    with pytest.raises(ValueError, match="layer 3 does not exist"):
        pool.write(3, np.array([0]), kv, kv)
    with pytest.raises(ValueError, match="outside its pool"):
        pool.copy_from(pool, np.array([4]), np.array([0]))
    with pytest.raises(ValueError, match="bytes, but the memory has"):
        KvPool(LAYOUT, 5, memory)
    with pytest.raises(ValueError, match="aligned"):
        KvPool(LAYOUT, 3, memory[1:])
    for layout, message in (
        (KvLayout(1, 1, 72, 16, DType.INT8), "head_dim"),
        (KvLayout(1, 1, 64, 8, DType.INT8), "block_tokens"),
        (KvLayout(0, 1, 64, 16, DType.INT8), "layers"),
    ):
        with pytest.raises(ValueError, match=message):
            KvPool(layout, 1, memory)


def test_an_instruction_set_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEO_CPU_ISA", "mmx")
    with pytest.raises(ValueError, match="NEO_CPU_ISA is 'mmx'; this machine can run scalar"):
        ThreadPool(1)


@pytest.mark.parametrize(("dtype", "blocks"), [(DType.BFLOAT16, 131), (DType.INT8, 5)])
def test_reading_by_regions_reads_every_byte_once(dtype: DType, blocks: int) -> None:
    layout = KvLayout(1, 3, 16, 16, dtype)
    rng = np.random.default_rng(0)
    memory = aligned(layout.pool_bytes(blocks))
    memory[:] = rng.integers(0, 256, memory.size, np.uint8)
    words = memory.view(np.uint64).reshape(blocks, -1)
    chosen = rng.permutation(blocks)[: blocks - 1].astype(np.int32)
    with ThreadPool(2) as threads:
        total = cpu.read_regions(memory.ctypes.data, layout, chosen, threads)
    # The last group of four repeats the last block.
    repeats = -len(chosen) % 4 if len(chosen) % 64 else 0
    expected = int(words[chosen].sum(dtype=np.uint64)) + repeats * int(words[chosen[-1]].sum())
    assert total == expected % 2**64


def test_first_touch_keeps_what_is_there_and_reports_progress() -> None:
    memory = np.arange(3 << 20, dtype=np.uint64)
    expected = int(memory.sum())
    steps: list[tuple[int, int]] = []
    with ThreadPool(2) as threads:
        place, size = memory.ctypes.data, memory.nbytes
        cpu.first_touch(place, size, threads, lambda *step: steps.append(step))
        assert cpu.read_all(place, size, threads) == expected
        with pytest.raises(ValueError, match="positive size"):
            cpu.first_touch(place, 0, threads)
    assert steps[-1] == (size, size)


def test_many_small_regions_from_hot_and_parked_threads() -> None:
    memory = np.ones(3 << 17, np.uint64)
    for spin_us in (0, 1000):
        with ThreadPool(3, spin_us=spin_us) as threads:
            for _ in range(300):
                total = cpu.read_all(memory.ctypes.data, memory.nbytes, threads)
                assert total == len(memory)


def test_a_pool_needs_sensible_threads() -> None:
    for arguments, message in (((0,), "threads"), ((2, (-1,)), "cpus"), ((2, (), -1), "spin_us")):
        with pytest.raises(ValueError, match=message):
            ThreadPool(*arguments)
