"""The model of a machine: how long a planned sweep takes.

gpu_only     one captured sweep: gaps + head + layers * (dense + small + prefill attention
             + decode attention)
inline       launched layer by layer, each of which waits for its host rows:
             layers * max(launch, dense + small + max(GPU attention, host attention))
asymmetric   launched as well, twice; the host attends for one sub-batch beside the other:
             layers * (max(dense(0) + small(0) + GPU attention, host attention(1))
                       + max(dense(1) + small(1), host attention(0)))
deferred     captured, host rows beside the others:
             max(gpu_only + exchange, host attention of what is under way, link,
             what both read of the host's memory)
streamed     rows of any of these: GPU attention over KV that comes over the link beside the sweep
migrations   over the link, before the sweep or, those that nobody in it needs, beside it: the next
             one begins behind them
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.pipeline.cuda.shapes import ShapeTable
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import IterationPlan, Mode, PrefillRow, SubBatch, Tier
from gpu_service.scheduling.rates import HostRates
from neo_common.model_spec import ModelSpec
from neo_plan.simulator.profile import Profile

GPU_ONLY = "gpu_only"
_ELEMENT_BYTES = 2
_SCALE_BYTES = 4
"""int8 KV: a scale for each token and head of K and of V."""


@dataclass(frozen=True)
class SweepTime:
    """Milliseconds of one sweep."""

    mode: str
    """"gpu_only", or that of a plan that the host tier takes part in."""
    total: float
    gpu: float
    """The GPU computes or copies."""
    cpu: float = 0.0
    """The cpu_service computes."""
    link: float = 0.0
    """Copies over the link, all of which the next sweep waits for; those beside this one may take
    longer than it."""
    queued: bool = False
    """The engine launches it and goes on, as its runner does."""

    @property
    def overlaps(self) -> bool:
        return self.queued or self.mode == GPU_ONLY


class Machine:
    """A profile for one model. Sliding windows are not modelled: the whole context is read."""

    def __init__(
        self,
        profile: Profile,
        measured: ModelSpec,
        spec: ModelSpec,
        table: ShapeTable,
        host_kv_int8: bool = False,
        device_deals: bool = True,
    ) -> None:
        """`measured`: the profile's model. `table`: padded sizes of captured sweeps.
        `device_deals`: migrations, streamed rows and deferred ones are queued as sweeps are, and
        nobody waits for them."""
        self._device_deals = device_deals
        self.profile, self.spec, self.table = profile, spec, table
        self._kv_bytes = spec.kv_bytes_per_token(_ELEMENT_BYTES)
        self._host_kv_bytes = self._kv_bytes
        if host_kv_int8:
            scales = 2 * spec.layers * spec.kv_heads * _SCALE_BYTES
            self._host_kv_bytes = spec.kv_bytes_per_token(1) + scales
        cpu = profile.cpu
        share = cpu.attention_share_int8 if host_kv_int8 else cpu.attention_share
        self._cpu_gbps = cpu.read_gbps.value * share.value
        self._dense = _weights(spec) / _weights(measured)
        self._small = spec.layers * spec.hidden_size / (measured.layers * measured.hidden_size)
        head, measured_head = (s.vocab_size * s.hidden_size for s in (spec, measured))
        self._head = head / measured_head
        self._gaps = spec.layers / measured.layers

    @property
    def host_kv_token_bytes(self) -> int:
        """A token's K and V in all layers, as the host pool holds them."""
        return self._host_kv_bytes

    def sweep(self, plan: IterationPlan, under_way: Sequence[int]) -> SweepTime:
        """Of a plan that is not empty, from the device's start with it to its end.

        `under_way`: tokens that each host row attends to which is between two layers in deferred
        mode; those that start with the plan are among them."""
        copied = self._migrations_ms(plan)
        moved = 0.0 if self._device_deals and plan.copies_beside else copied
        batch = plan.batches[0] if plan.batches else SubBatch()
        link = copied + self._on_link_ms(batch)
        if plan.mode is Mode.DEFERRED or self._captures(plan):
            return self._captured(plan, batch, moved, link, under_way)
        if plan.mode is Mode.ASYMMETRIC:
            gpu, cpu, total = self._asymmetric(*plan.batches)
        elif not plan.batches:
            gpu = cpu = total = 0.0
        else:
            gpu, cpu, total = self._inline(batch)
        return SweepTime(plan.mode.value, moved + total, moved + gpu, cpu, link)

    def _captures(self, plan: IterationPlan) -> bool:
        """A sweep that needs nobody's wait for the host: one captured, or queued all the same."""
        if plan.mode is not Mode.INLINE or not plan.batches:
            return False
        (batch,) = plan.batches
        on_host = any(chunk.tier is Tier.HOST for chunk in batch.prefill) or batch.streamed
        return not batch.host_decode and (self._device_deals or not (plan.migrations or on_host))

    def _captured(
        self,
        plan: IterationPlan,
        batch: SubBatch,
        moved: float,
        link: float,
        under_way: Sequence[int],
    ) -> SweepTime:
        """`moved`: by migrations before the sweep. `link`: by all that goes over it."""
        gpu, cpu = moved + self._captured_ms(batch), 0.0
        if batch.streamed:
            gpu += 1e-3 * self.spec.layers * self.profile.link.streamed_layer_us.value
        if plan.mode is Mode.DEFERRED:
            gpu += 1e-3 * self.spec.layers * self.profile.link.deferred_layer_us.value
            gpu += self._dense_ms(batch.tokens + len(under_way) / (self.spec.layers + 1))
            gpu -= self._dense_ms(batch.tokens)
            cpu = self._host_attention_ms(sum(under_way)) / (self.spec.layers + 1)
        read = self._memory_ms(sum(under_way) / (self.spec.layers + 1), batch)
        total = max(gpu, cpu, moved + self._on_link_ms(batch), moved + read)
        mode = GPU_ONLY if plan.mode is Mode.INLINE else plan.mode.value
        queued = self._device_deals or plan.mode is Mode.INLINE
        return SweepTime(mode, total, gpu, cpu, link, queued)

    def host_ms(self, plan: IterationPlan) -> float:
        """What the engine's thread computes for one iteration."""
        sequences = sum(map(_sequences, plan.batches))
        return self.profile.host.iteration_ms.at(sequences)

    def start_costs(self) -> SweepCosts:
        """What the engine would time at its start: every padded size, on padding."""
        table = self.table
        decode = {rows: self._padded_ms(SweepShape(rows, 0, 0)) for rows in table.decode}
        mixed = {
            rows: self._padded_ms(SweepShape(0, rows, table.chunks))
            for rows in (*table.totals, *table.eager)
        }
        context_ms = 1e-6 * self._kv_bytes / self.profile.gpu.decode_attention_gbps.value
        return SweepCosts(decode, mixed, context_ms, table.beside_chunks)

    def start_rates(self) -> HostRates:
        """What the engine would time at its start."""
        link, layers = self.profile.link, self.spec.layers
        captured = self._device_deals
        return HostRates(
            cpu_token_ms=self._host_attention_ms(1),
            link_token_ms=self._link_ms(self._host_kv_bytes),
            streamed_token_ms=self._link_ms(self._host_kv_bytes),
            move_ms=1e-3 * link.copy_us.value,
            deferred_ms=1e-3 * layers * link.deferred_layer_us.value,
            streamed_ms=1e-3 * layers * link.streamed_layer_us.value,
            inline_ms=0.0 if captured else self._launches_ms,
        )

    # -- parts, milliseconds -----------------------------------------------------------------

    def _captured_ms(self, batch: SubBatch) -> float:
        padded = self._padded_ms(self.table.shape_for(batch))
        return padded + self._decode_ms(batch) + self._prefill_ms(batch.prefill)

    def _padded_ms(self, shape: SweepShape) -> float:
        """Without attention."""
        gaps = self._gaps * self.profile.gpu.gaps_ms.value
        return gaps + self._dense_ms(shape.rows) + self._head_ms(shape.sequences)

    def _dense_ms(self, rows: float) -> float:
        gpu = self.profile.gpu
        return self._dense * gpu.dense_ms.at(rows) + self._small * gpu.small_ms.at(rows)

    def _head_ms(self, sequences: float) -> float:
        return self._head * self.profile.gpu.head_ms.at(sequences)

    def _decode_ms(self, batch: SubBatch) -> float:
        gpu = self.profile.gpu
        context = sum(row.length for row in (*batch.gpu_decode, *batch.streamed))
        if not context:
            return 0.0
        read = 1e-6 * context * self._kv_bytes / gpu.decode_attention_gbps.value
        return read + 1e-3 * self.spec.layers * gpu.decode_attention_layer_us.value

    def _prefill_ms(self, chunks: tuple[PrefillRow, ...]) -> float:
        if not chunks:
            return 0.0
        gpu, spec = self.profile.gpu, self.spec
        pairs = sum(_pairs(chunk.start, len(chunk.token_ids)) for chunk in chunks)
        operations = 4 * spec.layers * spec.query_heads * spec.head_dim * pairs
        compute = 1e-9 * operations / gpu.prefill_attention_tflops.value
        return compute + 1e-3 * spec.layers * gpu.prefill_attention_layer_us.value

    def _migrations_ms(self, plan: IterationPlan) -> float:
        link, tokens = self.profile.link, sum(m.tokens for m in plan.migrations)
        copies = 1e-3 * len(plan.migrations) * link.copy_us.value
        return copies + self._link_ms(tokens * self._host_kv_bytes)

    def _link_ms(self, size: int) -> float:
        return 1e-6 * size / self.profile.link.gbps.value

    def _host_attention_ms(self, context: int) -> float:
        """Of all layers."""
        return 1e-6 * context * self._host_kv_bytes / self._cpu_gbps

    def _host_prompts_ms(self, batch: SubBatch) -> float:
        """KV of host-tier prompts leaves, and that of their earlier chunks is read back."""
        chunks = [chunk for chunk in batch.prefill if chunk.tier is Tier.HOST]
        tokens = sum(chunk.start + len(chunk.token_ids) for chunk in chunks)
        return self._link_ms(tokens * self._host_kv_bytes)

    def _streamed_ms(self, batch: SubBatch) -> float:
        return self._link_ms(sum(row.length for row in batch.streamed) * self._host_kv_bytes)

    def _memory_ms(self, context: float, batch: SubBatch) -> float:
        """The host's memory gives what its own attention reads, and what the link carries."""
        attention = 1e-6 * context * self._host_kv_bytes / self.profile.cpu.read_gbps.value
        share = self.profile.link.gbps.value / self.profile.cpu.read_gbps.value
        return attention + share * self._on_link_ms(batch)

    def _on_link_ms(self, batch: SubBatch) -> float:
        """What its rows need of the link."""
        return self._host_prompts_ms(batch) + self._streamed_ms(batch)

    # -- modes -------------------------------------------------------------------------------

    def _inline(self, batch: SubBatch) -> tuple[float, float, float]:
        """GPU, CPU, and all from begin to end."""
        head = self._head_ms(_sequences(batch))
        gpu, dense = self._attention_ms(batch), self._dense_ms(batch.tokens)
        cpu, exchange = self._host_rows_ms(batch)
        device = dense + max(gpu, cpu + exchange)
        return head + dense + gpu, cpu, head + max(self._launches_ms, device)

    def _asymmetric(self, first: SubBatch, second: SubBatch) -> tuple[float, float, float]:
        """As `_inline`."""
        head = self._head_ms(_sequences(first) + _sequences(second))
        gpu, dense = self._attention_ms(first), self._dense_ms(first.tokens)
        behind = self._dense_ms(second.tokens)
        (cpu, exchange), (cpu_1, exchange_1) = map(self._host_rows_ms, (first, second))
        device = max(dense + gpu, cpu_1 + exchange_1) + max(behind, cpu + exchange)
        busy = head + dense + gpu + behind
        return busy, cpu + cpu_1, head + max(2 * self._launches_ms, device)

    @property
    def _launches_ms(self) -> float:
        """Of one sub-batch, layer by layer."""
        return 1e-3 * self.spec.layers * self.profile.host.launched_singly_layer_us.value

    def _attention_ms(self, batch: SubBatch) -> float:
        """The GPU's, and what it waits for on the link."""
        computed = self._decode_ms(batch) + self._prefill_ms(batch.prefill)
        return computed + self._on_link_ms(batch)

    def _host_rows_ms(self, batch: SubBatch) -> tuple[float, float]:
        """The host's attention, and what goes to it and comes back."""
        if not batch.host_decode:
            return 0.0, 0.0
        spec, link = self.spec, self.profile.link
        cpu = self._host_attention_ms(sum(row.length for row in batch.host_decode))
        # q and o have query_heads, k and v kv_heads; four copies a layer.
        heads = 2 * (spec.query_heads + spec.kv_heads)
        size = len(batch.host_decode) * heads * spec.head_dim * _ELEMENT_BYTES
        delay_us = link.doorbell_us.value + 4 * link.copy_us.value
        return cpu, spec.layers * (1e-3 * delay_us + self._link_ms(size))


def _sequences(batch: SubBatch) -> int:
    decode = len(batch.gpu_decode) + len(batch.streamed) + len(batch.host_decode)
    return len(batch.prefill) + decode


def _weights(spec: ModelSpec) -> int:
    """Parameters of all layers' matrices."""
    attention = 2 * (spec.query_heads + spec.kv_heads) * spec.head_dim
    return spec.layers * spec.hidden_size * (attention + 3 * spec.intermediate_size)


def _pairs(start: int, tokens: int) -> int:
    """Queries times keys of a chunk behind `start` tokens, causally masked."""
    return tokens * start + tokens * (tokens + 1) // 2
