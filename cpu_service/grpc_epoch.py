"""One epoch of a session with the grpc transport: the same operations, with tensors inline in the
messages."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import numpy.typing as npt

from cpu_service.epoch import EpochStats, ThreadPlan
from cpu_service.spec import MAX_INLINE_BYTES, SessionSpec
from kernels import cpu
from kernels.cpu.dataplane import LAYER_BOUNDS_SECONDS
from neo_common.errors import Reason, ServiceError
from neo_common.shm.memory import SharedMemory
from protos.neo.v1 import cpu_attention_pb2 as pb

_NUMPY: dict[cpu.DType, np.dtype[Any]] = {
    cpu.DType.FLOAT32: np.dtype(np.float32),
    cpu.DType.BFLOAT16: np.dtype(np.uint16),  # the extension takes it as such
    cpu.DType.FLOAT16: np.dtype(np.float16),
}

Array = npt.NDArray[Any]


class GrpcEpoch:
    """Operations run one after the other, in a thread of their own, in the order of the stream."""

    def __init__(
        self, spec: SessionSpec, number: int, pool: SharedMemory, plan: ThreadPlan
    ) -> None:
        self.number = number
        self.ended = asyncio.Event()
        self._spec = spec
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="neo-inline")
        self._threads = cpu.ThreadPool(plan.threads, plan.cpus, plan.spin_us)
        self._pool = cpu.KvPool(spec.layout, spec.blocks, memoryview(pool.buffer))
        self._stats = EpochStats()
        self._last_sweep = -1
        self._stopping: asyncio.Task[None] | None = None

    def describe(self, opened: pb.SessionOpened) -> None:
        """Nothing is shared."""

    def ready(self, nonce: bytes) -> None:
        """There is nothing to map."""

    def stats(self) -> EpochStats:
        return self._stats

    async def run(self, request: pb.AttendRequest) -> pb.AttendResponse | None:
        """Carry out one message that holds tensors. Raises ServiceError when it is malformed."""
        if self.ended.is_set():
            raise ServiceError(Reason.STALE_EPOCH, "the epoch is over")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._run, request)

    async def stop(self) -> None:
        """The pool is not touched after this. Idempotent."""
        if self._stopping is None:
            self._stopping = asyncio.create_task(self._stop())
        await asyncio.shield(self._stopping)

    async def _stop(self) -> None:
        self.ended.set()
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)
        self._threads.close()
        del self._pool

    def _run(self, request: pb.AttendRequest) -> pb.AttendResponse | None:
        kind = request.WhichOneof("message")
        try:
            if kind == "write_kv":
                self._write(request.write_kv)
                return None
            if kind == "read_kv":
                return pb.AttendResponse(kv_data=self._read(request.read_kv))
            assert kind == "step"
            return pb.AttendResponse(result=self._attend(request.step))
        except ValueError as error:
            if kind == "step":
                failure = pb.StepError(sweep=request.step.sweep, message=str(error))
                return pb.AttendResponse(step_error=failure)
            raise ServiceError(Reason.INVALID_ARGUMENT, f"{kind}: {error}", field=kind) from error
        except MemoryError as error:
            raise ServiceError(
                Reason.OUT_OF_HOST_MEMORY, f"{kind}: there is no memory for its tables", field=kind
            ) from error

    def _tensor(self, data: bytes, rows: int, heads: int, name: str) -> Array:
        dtype = self._spec.step.activation
        shape = (rows, heads, self._spec.layout.head_dim)
        array = np.frombuffer(data, _NUMPY[dtype])
        if array.size != np.prod(shape):
            raise ValueError(f"{name} holds {array.size} elements, not {shape}")
        return array.reshape(shape)

    def _kv(self, rows: int, k: bytes, v: bytes) -> tuple[Array, Array]:
        heads = self._spec.layout.kv_heads
        return self._tensor(k, rows, heads, "k"), self._tensor(v, rows, heads, "v")

    def _slots(self, request: pb.WriteKv | pb.ReadKv) -> npt.NDArray[np.int64]:
        self._check_layer(request.layer)
        slots = np.array(request.slots, np.uint64)
        room = self._spec.blocks * self._spec.layout.block_tokens
        if len(slots) and slots.max() >= room:
            raise ValueError(f"slot {slots.max()} is outside the pool of {room}")
        return slots.astype(np.int64)

    def _check_layer(self, layer: int) -> None:
        if layer >= self._spec.layout.layers:
            raise ValueError(f"layer {layer} does not exist")

    def _write(self, request: pb.WriteKv) -> None:
        slots = self._slots(request)
        k, v = self._kv(len(slots), request.k, request.v)
        self._pool.write(request.layer, slots, k, v, self._threads)

    def _read(self, request: pb.ReadKv) -> pb.KvData:
        row_bytes = 2 * self._spec.step.kv_row_bytes
        if len(request.slots) * row_bytes > MAX_INLINE_BYTES:
            raise ValueError(
                f"{len(request.slots)} slots are more than the {MAX_INLINE_BYTES // row_bytes} "
                "whose K and V one message carries"
            )
        slots = self._slots(request)
        dtype = self._spec.step.activation
        shape = (len(slots), self._spec.layout.kv_heads, self._spec.layout.head_dim)
        k, v = np.empty(shape, _NUMPY[dtype]), np.empty(shape, _NUMPY[dtype])
        self._pool.read(request.layer, slots, k, v, self._threads)
        return pb.KvData(call_id=request.call_id, k=k.tobytes(), v=v.tobytes())

    def _tables(self, step: pb.AttendStep) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Lengths `[rows]` and block tables `[rows, width]` from the ragged message."""
        lengths = np.array(step.lengths, np.int64)
        longest = self._spec.step.max_blocks_per_row * self._spec.layout.block_tokens
        if len(lengths) > self._spec.step.max_rows:
            raise ValueError(f"{len(lengths)} rows exceed the session's {self._spec.step.max_rows}")
        if len(lengths) == 0 or lengths.min() < 1 or lengths.max() > longest:
            raise ValueError(f"lengths must be between 1 and {longest}")
        used = -(-lengths // self._spec.layout.block_tokens)
        ids = np.array(step.block_ids, np.int64)
        if len(ids) != used.sum():
            raise ValueError(
                f"{len(ids)} block ids do not match the lengths, which need {used.sum()}"
            )
        if ids.max() >= self._spec.blocks:
            raise ValueError(f"block id {ids.max()} is outside the pool")
        tables = np.zeros((len(lengths), int(used.max())), np.int32)
        tables[np.arange(tables.shape[1]) < used[:, None]] = ids
        return lengths.astype(np.int32), tables

    def _attend(self, step: pb.AttendStep) -> pb.AttendResult:
        spec = self._spec
        self._check_layer(step.layer)
        lengths, tables = self._tables(step)
        rows = len(lengths)
        q = self._tensor(step.q, rows, spec.step.query_heads, "q")
        k, v = self._kv(rows, step.k, step.v)
        out = np.empty_like(q)
        window = spec.windows[step.layer] if spec.windows else 0
        start = time.perf_counter()
        cpu.decode_attention(
            self._threads,
            self._pool,
            step.layer,
            q,
            k,
            v,
            tables,
            lengths,
            out,
            scale=spec.scale,
            window=window,
            softcap=spec.softcap,
        )
        self._count(step, lengths, window, time.perf_counter() - start)
        return pb.AttendResult(sweep=step.sweep, layer=step.layer, lane=step.lane, o=out.tobytes())

    def _count(
        self, step: pb.AttendStep, lengths: npt.NDArray[np.int32], window: int, seconds: float
    ) -> None:
        old = self._stats
        tokens = int((np.minimum(lengths, window) if window else lengths).sum())
        token_bytes = self._spec.layout.piece_bytes // self._spec.layout.block_tokens
        layers = list(old.layers)
        layers[bisect_left(LAYER_BOUNDS_SECONDS, seconds)] += 1
        self._stats = EpochStats(
            sweeps=old.sweeps + (step.sweep != self._last_sweep),
            rows=old.rows + len(lengths),
            kv_bytes_read=old.kv_bytes_read + tokens * token_bytes,
            busy_seconds=old.busy_seconds + seconds,
            layer_seconds=old.layer_seconds + seconds,
            layers=tuple(layers),
        )
        self._last_sweep = step.sweep
