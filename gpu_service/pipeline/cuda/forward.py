"""One sweep over the layers as kernel launches into fixed buffers: nothing is allocated, nothing
waits for the host, so the same calls run at once or are captured in a CUDA graph.

    per layer:  norm | QKV | rope, KV store | attention (decode rows, chunks) | output
                norm | gate, up | SiLU, multiply | down
    then:       rows that are sampled | norm | head | largest logit

Streamed rows are decode rows whose tables name staging; their KV comes and goes on branches
(`gpu_service.pipeline.cuda.streamed`). Host rows (deferred mode) come last. Beside attention they
leave for the host, and those that left in the same layer a sweep ago take their place
(`gpu_service.pipeline.cuda.host_rows`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gpu_service.model.model import CausalLM
from gpu_service.model.sampling_limits import MOST_LISTED
from gpu_service.pipeline.cuda.branch import Branch
from gpu_service.pipeline.cuda.dense import dense_steps
from gpu_service.pipeline.cuda.host_rows import HostRows
from gpu_service.pipeline.cuda.inputs import SweepInputs, SweepShape
from gpu_service.pipeline.cuda.kv import multiprocessors
from gpu_service.pipeline.cuda.shapes import padded
from gpu_service.pipeline.cuda.streamed import StreamedLayers
from gpu_service.pipeline.device_kv import AttentionGeometry
from kernels.gpu.decode_attention import DecodeAttention, choose_splits
from kernels.gpu.host_exchange import HostExchange
from kernels.gpu.host_stream import HostStream
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.prefill_attention import PrefillAttention
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.rope_store import rope_store
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
            self._streamed = StreamedLayers(stream, cache.memory, cache.layout.layers, inputs)
        self._model = model
        self._geometry = geometry
        self._cache = cache
        self._inputs = inputs
        self._buffers = activations
        half = spec.head_dim // 2
        # The kernel wants cos and sin once each; the table holds cos twice and sin with both signs.
        cos, sin = model.rope[:, 0, :half], model.rope[:, 1, half:]
        self._cos_sin = torch.stack((cos, sin), dim=1).contiguous()
        rotated = (spec.query_heads - 1, spec.query_heads)
        self._qk_norms = [
            None if layer.qk_norm is None else layer.qk_norm[list(rotated)].contiguous()
            for layer in model.layers
        ]
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
        self._host: HostRows | None = None
        if exchange is not None:
            self._host = HostRows(exchange, cache.layout, inputs, self._cos_sin, model.dtype)

    @torch.inference_mode()
    def run(self, shape: SweepShape, longest: int) -> None:
        """Launch a sweep of that shape over the inputs sent before. `longest`: rows of the longest
        chunk, or more.

        Afterwards `drawn` and `logits` hold its samples, in the inputs' order, and `residual` plus
        `update` the state of all rows."""
        given, buffers, model = self._inputs, self._buffers, self._model
        rows = shape.rows + shape.host
        host = self._host if shape.host else None
        arriving = buffers.attended[shape.rows : rows]
        if host is not None:
            host.begin(arriving)
        if self._streamed is not None:
            self._streamed.begin()
        tables = buffers.block_tables[: shape.sequences]
        counted = slice(0, shape.sequences)
        expand_tables(
            given.blocks, given.table_starts[counted], given.table_counts[counted], tables
        )
        residual, update = buffers.residual[:rows], buffers.update[:rows]
        dense = buffers.dense
        embed(
            given.token_ids[:rows], given.sources[:rows], buffers.drawn, model.embedding, residual
        )
        for index, layer in enumerate(model.layers):
            added, total = (update, residual) if index else (residual, None)
            qkv = buffers.qkv[:rows].flatten(1)
            dense.normed(layer.qkv, added, total, layer.input_norm, qkv)
            self._attention(index, shape, longest)
            dense.plain(layer.output, buffers.attended[:rows].flatten(1), update)
            if host is not None:
                host.used(index, arriving)
            gate_up = buffers.gate_up[:rows]
            dense.normed(layer.gate_up, update, residual, layer.post_norm, gate_up)
            dense.gated(layer.down, gate_up, update)
        self._head(shape)
        if host is not None:
            host.end()
        if self._streamed is not None:
            self._streamed.end()

    def _attention(self, index: int, shape: SweepShape, longest: int) -> None:
        given, buffers, rows = self._inputs, self._buffers, shape.rows
        left = self._leave(index, shape)
        if self._streamed is not None:
            self._streamed.ready(index)
        rope_store(
            buffers.qkv[:rows],
            self._cos_sin,
            given.positions[:rows],
            given.slots[:rows],
            buffers.q[:rows],
            self._cache.memory[index],
            self._cache.layout,
            qk_norm=self._qk_norms[index],
            eps=self._model.spec.norm_eps,
            layer=index,
        )
        with self._beside.forked(shape.decode and shape.prefill):
            self._attend_chunks(index, shape, longest)
        self._attend_decode(index, shape)
        self._beside.join()
        if self._host is not None and shape.host:
            self._host.ready(left)
        if self._streamed is not None:
            self._streamed.read(index)

    def _leave(self, index: int, shape: SweepShape) -> torch.cuda.Event | None:
        if self._host is None or not shape.host:
            return None
        buffers, rows = self._buffers, slice(shape.rows, shape.rows + shape.host)
        return self._host.leave(
            index,
            buffers.qkv[rows],
            buffers.q[rows],
            buffers.residual[rows],
            self._qk_norms[index],
            self._model.spec.norm_eps,
        )

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
        rows = shape.rows + shape.host
        torch.index_select(buffers.update[:rows], 0, chosen, out=update)
        torch.index_select(buffers.residual[:rows], 0, chosen, out=residual)
        add_rms_norm(update, residual, model.final_norm, update, eps=model.spec.norm_eps)
        logits = buffers.logits[:samples]
        model.head.into(update, logits)
        buffers.sampler.greedy(logits, buffers.drawn[:samples])
