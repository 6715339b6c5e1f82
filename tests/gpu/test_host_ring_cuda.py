"""Streamed KV on a card: copy engine, words and kernels, beside a sweep's other work."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from gpu_service.pipeline.cuda.copy_engine import CopyEngine, check_cuda
from gpu_service.pipeline.cuda.host_ring import Brought, HostRing
from gpu_service.pipeline.cuda.streamed import StreamedLayers
from kernels.gpu.host_pieces import HostPieces
from kernels.gpu.host_stream import HostStream
from kernels.gpu.kv_cache import GpuKvLayout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]

LAYERS, STAGING, HOST_BLOCKS = 7, 24, 60
KINDS = {"bf16": (torch.bfloat16, torch.bfloat16), "bf16-int8": (torch.bfloat16, torch.int8)}


class Sweep:
    """Layers that look at staging and compute a while; any host blocks may be brought."""

    def __init__(self, dtype: torch.dtype, host_dtype: torch.dtype) -> None:
        self.device = torch.device("cuda")
        self.layout = GpuKvLayout(LAYERS, 2, 4, 16, 64, staging=STAGING)
        self.stream = HostStream(self.layout, host_dtype)
        piece = self.stream.piece_bytes
        draw = torch.Generator().manual_seed(5)
        # Neither infinite nor NaN, whatever the bytes are read as.
        shape = LAYERS, HOST_BLOCKS, piece
        self.pool = torch.randint(0, 60, shape, dtype=torch.uint8, generator=draw)
        code = torch.cuda.cudart().cudaHostRegister(  # type: ignore[no-untyped-call]
            self.pool.data_ptr(), self.pool.nbytes, 3
        )
        assert int(code) == 0
        cache = self.layout.allocate(dtype, self.device)
        self.staging = self.layout.staged(cache)
        self.inputs: Any = SimpleNamespace(
            brought=None,
            stream_counts=torch.zeros(3, dtype=torch.int32, device=self.device),
            brought_to=torch.arange(STAGING, dtype=torch.int32, device=self.device),
            put=torch.zeros(4, STAGING, dtype=torch.int32, device=self.device),
            stream_pool=torch.tensor(
                [self.pool.data_ptr(), HOST_BLOCKS * piece], device=self.device
            ),
        )
        ring = HostRing(self.stream, LAYERS, self.device, CopyEngine(self.device))
        self.layers = StreamedLayers(self.stream, ring, cache, LAYERS, self.inputs)
        self.seen = torch.empty(LAYERS, *self.staging.shape[1:], dtype=dtype, device=self.device)
        self.work = torch.randn(512, 512, device=self.device)

    def launch(self) -> None:
        self.layers.begin()
        for layer in range(LAYERS):
            for _ in range(4):
                torch.mm(self.work, self.work)
            self.layers.ready(layer)
            self.seen[layer].copy_(self.staging[layer % 2])
            self.layers.read(layer)
        self.layers.end()

    def bring(self, blocks: np.ndarray[Any, Any], number: int) -> None:
        piece, count = self.stream.piece_bytes, len(blocks)
        self.inputs.brought = None
        if count:
            address = self.pool.data_ptr()
            self.inputs.brought = Brought(
                blocks, np.arange(count), address, HOST_BLOCKS * piece, number
            )
        counts = torch.tensor([count, 0, number], dtype=torch.int64).to(torch.int32)
        self.inputs.stream_counts.copy_(counts)

    def expected(self, blocks: np.ndarray[Any, Any]) -> torch.Tensor:
        """What migrations read, which are other kernels."""
        pieces = HostPieces(GpuKvLayout(LAYERS, STAGING, 4, 16, 64), self.stream.dtype)
        found = torch.zeros_like(self.seen)
        where = torch.from_numpy(blocks.astype(np.int32)).to(self.device)
        there = torch.arange(len(blocks), dtype=torch.int32, device=self.device)
        pieces.read(self.pool, where, found, there)
        return found[:, : len(blocks)]


@pytest.fixture(params=KINDS)
def sweep(request: pytest.FixtureRequest) -> Iterator[Sweep]:
    check_cuda()
    made = Sweep(*KINDS[request.param])
    yield made
    torch.cuda.synchronize()
    torch.cuda.cudart().cudaHostUnregister(made.pool.data_ptr())  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("captured", [True, False])
def test_each_layer_finds_its_blocks(sweep: Sweep, captured: bool) -> None:
    """From sweep to sweep other blocks, none at all, and numbers that wrap around."""
    draw, stream = np.random.default_rng(1), torch.cuda.Stream()  # type: ignore[no-untyped-call]
    number, graph = 2**31 - 3 * LAYERS, torch.cuda.CUDAGraph()
    with torch.inference_mode(), torch.cuda.stream(stream):
        sweep.launch()
        stream.synchronize()
        if captured:
            graph.capture_begin(capture_error_mode="thread_local")
            sweep.launch()
            graph.capture_end()
        launch = graph.replay if captured else sweep.launch
        for count in (1, STAGING, 0, 5, STAGING, STAGING, 17, 3):
            blocks = draw.permutation(HOST_BLOCKS)[:count]
            sweep.bring(blocks, number)
            with sweep.layers.filled():
                launch()
            number += LAYERS if count else 0
            stream.synchronize()
            found, expected = sweep.seen[:, :count], sweep.expected(blocks)
            assert torch.equal(found.view(torch.int16), expected.view(torch.int16)), count


def test_a_launch_that_fails_in_the_middle_holds_nobody_up(sweep: Sweep) -> None:
    blocks = np.arange(STAGING)

    def fail() -> None:
        with sweep.layers.filled():
            sweep.layers.begin()
            raise MemoryError

    with torch.inference_mode():
        sweep.launch()
        sweep.bring(blocks, 0)
        with pytest.raises(MemoryError):
            fail()
        torch.cuda.synchronize()
        sweep.bring(blocks[::-1].copy(), LAYERS)
        with sweep.layers.filled():
            sweep.launch()
        torch.cuda.synchronize()
        expected = sweep.expected(blocks[::-1].copy())
        assert torch.equal(sweep.seen.view(torch.int16), expected.view(torch.int16))
