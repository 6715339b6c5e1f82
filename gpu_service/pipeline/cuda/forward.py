"""One sweep over the layers as kernel launches into fixed buffers: nothing is allocated, nothing
waits for the host, so the same calls run at once or are captured in a CUDA graph.

    per layer:  norm | QKV | rope, KV store | attention (decode rows, chunks) | output
                norm | gate, up | SiLU, multiply | down
    then:       rows that are sampled | norm | head | largest logit

Streamed rows are decode rows whose tables name staging; their KV comes and goes on branches
(`gpu_service.pipeline.cuda.streamed`). Host rows come last. Beside attention they leave for the
host, and come back before the output projection, or, in deferred mode, those that left in the same
layer a sweep ago take their place (`gpu_service.pipeline.cuda.host_rows`).

Two sub-batches (asymmetric mode) have the buffers' rows one behind the other and take turns; they
share what a dense step leaves for the next one, since all dense steps are on the main stream:

    main | 1: norm, QKV | 0: norm, QKV, attention | 1: output ... QKV | 0: output ... attention |
    host               |== lane 1 ===============|                   |== lane 1 ==============|
                                     |== lane 0 ====================|

The first sub-batch's rows of the device attend as soon as its q, k and v are there.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from gpu_service.model.model import CausalLM
from gpu_service.model.sampling_limits import MOST_LISTED
from gpu_service.pipeline.cuda.branch import Branch
from gpu_service.pipeline.cuda.copy_engine import CopyEngine
from gpu_service.pipeline.cuda.dense import dense_steps
from gpu_service.pipeline.cuda.host_ring import HostRing
from gpu_service.pipeline.cuda.host_rows import DeferredRows, HostRows, RowBuffers, WaitedRows
from gpu_service.pipeline.cuda.inputs import SweepInputs, SweepShape
from gpu_service.pipeline.cuda.kv import multiprocessors
from gpu_service.pipeline.cuda.rope import RopeStore
from gpu_service.pipeline.cuda.shapes import padded
from gpu_service.pipeline.cuda.streamed import StreamedLayers
from gpu_service.pipeline.device_kv import AttentionGeometry
from kernels.gpu.decode_attention import DecodeAttention, choose_splits
from kernels.gpu.host_exchange import LANES, HostExchange
from kernels.gpu.host_stream import HostStream
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.prefill_attention import PrefillAttention
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.sampling import Sampler
from kernels.gpu.sweep_inputs import embed, expand_tables


@dataclass(frozen=True)
class DeviceCache:
    """The GPU tier's memory and its shape."""

    layout: GpuKvLayout
    memory: torch.Tensor


class Activations:
    """Buffers of one sweep; the largest one's size fixes them."""

    def __init__(
        self, model: CausalLM, rows: int, samples: int, draws: int, tables: tuple[int, int]
    ) -> None:
        """draws: the most rows of `samples` that a sweep really has."""
        spec, dtype, device = model.spec, model.dtype, model.device

        def empty(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=kind, device=device)

        heads = spec.query_heads + 2 * spec.kv_heads
        self.residual = empty(rows, spec.hidden_size)
        """The stream that layers add to. After the last layer `update` is still to be added."""
        self.update = empty(rows, spec.hidden_size)
        self.qkv = empty(rows, heads, spec.head_dim)
        self.q = empty(rows, spec.query_heads, spec.head_dim)
        self.attended = torch.zeros_like(self.q)
        """Zeros: padding rows of chunks are never written, and must stay finite."""
        self.gate_up = empty(rows, 2 * spec.intermediate_size)
        self.dense = dense_steps(model, rows)
        self.sampled = empty(2, samples, spec.hidden_size)
        self.logits = empty(samples, spec.vocab_size)
        self.sampler = Sampler(samples, spec.vocab_size, device, draws=draws, logprobs=MOST_LISTED)
        self.drawn = torch.zeros(samples, dtype=torch.int64, device=device)
        """The last sweep's tokens; -1 where its logits were not finite."""
        self.block_tables = torch.zeros(tables, dtype=torch.int32, device=device)


@dataclass(frozen=True)
class _Part:
    """One sub-batch of a sweep."""

    rows: slice
    """Of the buffers."""
    is_first: bool
    """The one with the rows that attend on the device."""
    host: HostRows | None
    """None without host rows."""


class Forward:
    """The launches. `decode_sizes`: padded numbers of decode rows that will come, ascending."""

    def __init__(
        self,
        model: CausalLM,
        geometry: AttentionGeometry,
        cache: DeviceCache,
        inputs: SweepInputs,
        activations: Activations,
        decode_sizes: tuple[int, ...],
        exchange: HostExchange | None = None,
        stream: HostStream | None = None,
    ) -> None:
        spec = model.spec
        self._streamed: StreamedLayers | None = None
        if stream is not None:
            layers, device = cache.layout.layers, model.device
            engine = CopyEngine(device) if device.type == "cuda" else None
            ring = HostRing(stream, layers, device, engine)
            self._streamed = StreamedLayers(stream, ring, cache.memory, layers, inputs)
        self._model = model
        self._geometry = geometry
        self._cache = cache
        self._inputs = inputs
        self._buffers = activations
        self._rope = RopeStore(model)
        processors = multiprocessors(model.device)
        self._decode = {
            size: DecodeAttention(
                cache.layout,
                spec.query_heads,
                size,
                choose_splits(size, spec.kv_heads, processors),
                model.device,
            )
            for size in decode_sizes
            if size
        }
        self._prefill = PrefillAttention(cache.layout, spec.query_heads, model.device, processors)
        self._beside = Branch(model.device)
        """Attention of chunks computes while that of decode rows waits for memory."""
        self._hosts = () if exchange is None else self._host_rows(exchange)

    def _host_rows(self, exchange: HostExchange) -> tuple[HostRows, ...]:
        """By sub-batch."""
        inputs, limits = self._inputs, self._inputs.limits
        given = exchange, self._cache.layout, inputs, self._rope, self._model.dtype
        if exchange.rows:
            return (DeferredRows(*given),)
        return tuple(WaitedRows(*given, limits.host, lane) for lane in range(LANES))

    def streaming(self) -> AbstractContextManager[object]:
        """Around the launch of a sweep that may read the host pool, by `run` or as a graph."""
        return nullcontext() if self._streamed is None else self._streamed.filled()

    @torch.inference_mode()
    def run(self, shape: SweepShape, longest: int) -> None:
        """Launch a sweep of that shape over the inputs sent before. `longest`: rows of the longest
        chunk, or more.

        Afterwards `drawn` and `logits` hold its samples, in the inputs' order, and `residual` plus
        `update` the state of all rows."""
        given, buffers = self._inputs, self._buffers
        parts = self._parts(shape)
        if self._streamed is not None:
            self._streamed.begin()
        tables = buffers.block_tables[: shape.sequences]
        counted = slice(0, shape.sequences)
        expand_tables(
            given.blocks, given.table_starts[counted], given.table_counts[counted], tables
        )
        rows = shape.all_rows
        residual, embedding = buffers.residual[:rows], self._model.embedding
        embed(given.token_ids[:rows], given.sources[:rows], buffers.drawn, embedding, residual)
        layers = len(self._model.layers)
        for part in parts:
            self._into_attention(0, part, shape, longest)
        for index in range(layers):
            for part in parts:
                self._out_of_attention(index, part)
                if index + 1 < layers:
                    self._into_attention(index + 1, part, shape, longest)
        self._head(shape)
        for part in parts:
            if part.host is not None:
                part.host.end()
        if self._streamed is not None:
            self._streamed.end()

    def _parts(self, shape: SweepShape) -> list[_Part]:
        """In the order of their turns; their host rows have begun."""
        first = slice(0, shape.rows + shape.host)
        parts = [_Part(first, True, self._begun(0, slice(shape.rows, first.stop)))]
        if shape.second:
            second = slice(first.stop, shape.all_rows)
            parts.insert(0, _Part(second, False, self._begun(1, second)))
        return parts

    def _begun(self, lane: int, rows: slice) -> HostRows | None:
        if rows.start == rows.stop:
            return None
        buffers, host = self._buffers, self._hosts[lane]
        host.begin(
            RowBuffers(
                qkv=buffers.qkv[rows],
                q=buffers.q[rows],
                attended=buffers.attended[rows],
                residual=buffers.residual[rows],
                positions=self._inputs.positions[rows],
            )
        )
        return host

    def _into_attention(self, index: int, part: _Part, shape: SweepShape, longest: int) -> None:
        """The layer's begin: up to attention, which has been launched."""
        buffers, layer = self._buffers, self._model.layers[index]
        residual, update = buffers.residual[part.rows], buffers.update[part.rows]
        added, total = (update, residual) if index else (residual, None)
        qkv = buffers.qkv[part.rows].flatten(1)
        buffers.dense.normed(layer.qkv, added, total, layer.input_norm, qkv)
        if part.host is not None:
            part.host.leave(index)
        if part.is_first:
            self._attend(index, shape, longest)

    def _out_of_attention(self, index: int, part: _Part) -> None:
        """The layer's end."""
        buffers, layer = self._buffers, self._model.layers[index]
        dense = buffers.dense
        residual, update = buffers.residual[part.rows], buffers.update[part.rows]
        if part.host is not None:
            part.host.ready()
        dense.plain(layer.output, buffers.attended[part.rows].flatten(1), update)
        if part.host is not None:
            part.host.used(index)
        gate_up = buffers.gate_up[part.rows]
        dense.normed(layer.gate_up, update, residual, layer.post_norm, gate_up)
        dense.gated(layer.down, gate_up, update)

    def _attend(self, index: int, shape: SweepShape, longest: int) -> None:
        """Rows that attend on the device, if there are any."""
        given, buffers, rows = self._inputs, self._buffers, shape.rows
        if self._streamed is not None:
            self._streamed.ready(index)
        self._rope(
            index,
            buffers.qkv[:rows],
            given.positions[:rows],
            given.slots[:rows],
            buffers.q[:rows],
            self._cache.memory[index],
            self._cache.layout,
            staging_layer=index,
        )
        with self._beside.forked(shape.decode and shape.prefill):
            self._attend_chunks(index, shape, longest)
        self._attend_decode(index, shape)
        self._beside.join()
        if self._streamed is not None:
            self._streamed.read(index)

    def _attend_decode(self, index: int, shape: SweepShape) -> None:
        decode, buffers = shape.decode, self._buffers
        if not decode:
            return
        attention = self._decode[padded(tuple(self._decode), decode)]
        attention(
            buffers.q[:decode],
            self._cache.memory[index],
            buffers.block_tables[:decode],
            self._inputs.lengths[:decode],
            buffers.attended[:decode],
            scale=self._geometry.scale,
            window=self._geometry.windows[index],
            layer=index,
        )

    def _attend_chunks(self, index: int, shape: SweepShape, longest: int) -> None:
        if not shape.prefill:
            return
        buffers, sequences = self._buffers, slice(shape.decode, shape.sequences)
        rows = slice(shape.decode, shape.rows)
        self._prefill(
            buffers.q[rows],
            self._cache.memory[index],
            buffers.block_tables[sequences],
            self._inputs.lengths[sequences],
            self._inputs.first_rows[: shape.chunks + 1],
            buffers.attended[rows],
            longest=longest,
            scale=self._geometry.scale,
            window=self._geometry.windows[index],
            layer=index,
        )

    def _head(self, shape: SweepShape) -> None:
        buffers, model, samples = self._buffers, self._model, shape.samples
        chosen = self._inputs.samples[:samples]
        update, residual = buffers.sampled[0, :samples], buffers.sampled[1, :samples]
        rows = shape.all_rows
        torch.index_select(buffers.update[:rows], 0, chosen, out=update)
        torch.index_select(buffers.residual[:rows], 0, chosen, out=residual)
        add_rms_norm(update, residual, model.final_norm, update, eps=model.spec.norm_eps)
        logits = buffers.logits[:samples]
        model.head.into(update, logits)
        buffers.sampler.greedy(logits, buffers.drawn[:samples])
