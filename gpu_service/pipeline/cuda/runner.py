"""Runs plans on a CUDA device. A sweep is queued and not waited for; the tokens it draws stay on
the device for the sweep after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from gpu_service.engine.messages import TokenLogprob
from gpu_service.model.model import CausalLM
from gpu_service.model.sampling import Sampler, SamplingRow
from gpu_service.model.sampling_limits import draws_on_device
from gpu_service.offload.host_tier import HostTier
from gpu_service.offload.shm_tier import ShmHostTier
from gpu_service.pipeline.cuda.forward import Activations, DeviceCache, Forward
from gpu_service.pipeline.cuda.graphs import SweepGraphs
from gpu_service.pipeline.cuda.host_ring import Longs
from gpu_service.pipeline.cuda.host_side import HostSide, HostSweep
from gpu_service.pipeline.cuda.inputs import SweepInputs, SweepShape
from gpu_service.pipeline.cuda.logprobs import LandingLogprobs, SweepLogprobs
from gpu_service.pipeline.cuda.queued import Arriving, Beside, QueuedSweep, arriving_rows
from gpu_service.pipeline.cuda.sampling import DeviceDraws, Draw
from gpu_service.pipeline.cuda.shapes import ShapeTable
from gpu_service.pipeline.launch import DoneSweep, LaunchedSweep
from gpu_service.pipeline.results import is_out_of_memory, out_of_memory
from gpu_service.pipeline.runner import PlanRunner
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import (
    PENDING_TOKEN,
    DecodeRow,
    IterationPlan,
    Mode,
    SubBatch,
    SweepResult,
    Tier,
)
from kernels.gpu.host_exchange import HostExchange

_BYTES_PER_SECOND = 3e12


@dataclasses.dataclass(frozen=True)
class CudaSweeps:
    """What runs a sweep."""

    model: CausalLM
    table: ShapeTable
    cache: DeviceCache
    inputs: SweepInputs
    activations: Activations
    draws: DeviceDraws
    forward: Forward
    graphs: SweepGraphs
    exchange: HostExchange | None = None
    """None where the device does not deal with the host tier itself."""

    def costs(self) -> SweepCosts:
        """As timed at start, with attention at a high-end device's bandwidth: the first sweeps
        correct it."""
        spec, item = self.model.spec, self.model.dtype.itemsize
        token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * item
        return self.graphs.costs(1e3 * token_bytes / _BYTES_PER_SECOND)

    def runner(self, sampler: Sampler, inline: PlanRunner, host: HostTier) -> CudaRunner:
        side = None
        if self.exchange is not None:
            assert isinstance(host, ShmHostTier)
            side = HostSide(host, self.exchange, self.cache)
        return CudaRunner(self, sampler, inline, side)


class CudaRunner:
    """A `Runner`. The device itself deals with the host tier (`host`); without it, sweeps that the
    host tier takes part in run in `inline`, one at a time."""

    def __init__(
        self, sweeps: CudaSweeps, sampler: Sampler, inline: PlanRunner, host: HostSide | None
    ) -> None:
        self._sweeps = sweeps
        self._host = host
        self._sampler = sampler
        self._inline = inline
        self._drawn: dict[int, int] = {}
        """Choice -> index of its token in `activations.drawn`, of the last sweep."""
        drawn = sweeps.activations.drawn
        pin = drawn.is_cuda
        self._landing = [torch.zeros(drawn.shape, dtype=drawn.dtype, pin_memory=pin) for _ in "ab"]
        self._turn = 0

    def close(self) -> None:
        if self._host is not None:
            self._host.close()

    @torch.inference_mode()
    def launch(self, plan: IterationPlan, sampling: Mapping[int, SamplingRow]) -> LaunchedSweep:
        """See `Runner.launch`."""
        if self._host is None and (
            plan.migrations or any(_uses_host(batch) for batch in plan.batches)
        ):
            self._sweeps.draws.forget()
            resolved, known, self._drawn = *self._resolved(plan, sampling), {}
            return self._inline.launch(resolved, known)
        if self._host is not None:
            # That wait belongs to the copies, and not to this sweep's own time.
            self._host.join_copies()
        begin = self._mark()
        lost = self._host.migrate(plan) if self._host else frozenset()
        batch = plan.batches[0] if plan.batches else SubBatch()
        beside, waited = None, frozenset(_waited_for(plan))
        if plan.mode is Mode.DEFERRED or waited:
            assert self._host is not None
            beside = self._host.begin(plan)
        void = waited if beside is None else frozenset()
        batch, pool, gone = self._staged(batch)
        lost |= gone
        if beside is None and not (batch.prefill or batch.gpu_decode or batch.streamed):
            return DoneSweep(self._nothing(plan, lost, void))
        try:
            return self._queue(plan, batch, beside, pool, sampling, begin, lost, void)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._sweeps.draws.forget()
            under_way = self._host.lose(beside) if self._host else ()
            return DoneSweep(out_of_memory(plan, lost, under_way))

    def _staged(self, batch: SubBatch) -> tuple[SubBatch, Longs | None, frozenset[int]]:
        """Without what goes through staging if the host pool cannot be reached; where that is; and
        the choices that were left out."""
        chunks = [chunk for chunk in batch.prefill if chunk.tier is Tier.HOST]
        if not chunks and not batch.streamed:
            return batch, None, frozenset()
        assert self._host is not None
        pool = self._host.pool()
        if pool is not None:
            return batch, pool, frozenset()
        kept = tuple(chunk for chunk in batch.prefill if chunk.tier is Tier.GPU)
        gone = frozenset(c.key for c in chunks) | frozenset(row.key for row in batch.streamed)
        return dataclasses.replace(batch, prefill=kept, streamed=()), None, gone

    def _nothing(
        self, plan: IterationPlan, lost: frozenset[int], void: frozenset[int]
    ) -> SweepResult:
        """Of a plan without rows of the device: the host is away, and what was under way has come
        to nothing."""
        landed = self._host.lose() if self._host and plan.mode is Mode.DEFERRED else ()
        return SweepResult(void=void, lost=lost, landed=landed)

    def _queue(
        self,
        plan: IterationPlan,
        batch: SubBatch,
        beside: HostSweep | None,
        pool: Longs | None,
        sampling: Mapping[int, SamplingRow],
        begin: torch.cuda.Event | None,
        lost: frozenset[int],
        void: frozenset[int],
    ) -> QueuedSweep:
        inputs = beside.inputs if beside else None
        deferred = beside is not None and plan.mode is Mode.DEFERRED
        lanes = [len(rows) for rows in inputs.lanes] if inputs and not deferred else []
        shape = self._sweeps.table.shape_for(batch, deferred=deferred, lanes=lanes)
        self._drawn = self._sweeps.inputs.send(batch, shape, self._drawn, inputs, pool)
        with self._sweeps.forward.streaming():
            if not self._sweeps.graphs.replay(shape):
                longest = max((len(chunk.token_ids) for chunk in batch.prefill), default=0)
                self._sweeps.forward.run(shape, longest)
        arriving = arriving_rows(batch, beside, shape, sampling)
        logprobs = self._sample(batch, arriving, sampling)
        logprobs.prompts = self._prompt_logprobs(batch, shape, sampling)
        host = None
        if plan.mode is Mode.DEFERRED or beside is not None:
            assert self._host is not None
            host = Beside(self._host, beside, self._host.send_status(), arriving)
        landing = self._landing_copy(shape)
        end = self._mark()
        events = (begin, end) if begin and end else None
        return QueuedSweep(events, landing, self._drawn, sampling, logprobs, lost, void, host)

    def _mark(self) -> torch.cuda.Event | None:
        """Now, in the device's time."""
        if not self._sweeps.activations.drawn.is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _landing_copy(self, shape: SweepShape) -> torch.Tensor:
        """Where the sweep's tokens will be on the host, which two sweeps in turn use."""
        self._turn ^= 1
        drawn, landing = self._sweeps.activations.drawn, self._landing[self._turn]
        landing[: shape.samples].copy_(drawn[: shape.samples], non_blocking=True)
        return landing

    # -- what greedy sweeps do without -------------------------------------------------------

    def _sample(
        self,
        batch: SubBatch,
        arriving: Mapping[int, Arriving],
        sampling: Mapping[int, SamplingRow],
    ) -> SweepLogprobs:
        """Draw anew for those who want more than the largest logit."""
        decode = (*batch.gpu_decode, *batch.streamed)
        places = [(row.key, row.length, self._drawn[row.key]) for row in decode]
        places += [
            (row.key, row.start + len(row.token_ids), self._drawn[row.key])
            for row in batch.prefill
            if row.samples
        ]
        places += [(key, row.length, row.place) for key, row in arriving.items()]
        draws = [
            Draw(key, row, length - len(row.prompt_token_ids), place)
            for key, length, place in places
            for row in (sampling[key],)
        ]
        draws = [draw for draw in draws if not draw.is_greedy]
        on_device = [draw for draw in draws if draws_on_device(draw.row.spec)]
        logprobs = SweepLogprobs()
        if len(on_device) < len(draws):
            others = [draw for draw in draws if not draws_on_device(draw.row.spec)]
            logprobs.known = self._sample_waiting(others)
        if on_device:
            buffers = self._sweeps.activations
            logprobs.landing = self._sweeps.draws.draw(
                on_device, buffers.logits, buffers.drawn, sampling
            )
        return logprobs

    def _sample_waiting(self, draws: Sequence[Draw]) -> dict[int, TokenLogprob | None]:
        """For rows that the device's sampler has no room for; their output is known."""
        buffers = self._sweeps.activations
        index = torch.tensor([draw.place for draw in draws], device=buffers.drawn.device)
        sampled = self._sampler.sample(
            buffers.logits[index].float(),
            [draw.row for draw in draws],
            [draw.position for draw in draws],
        )
        buffers.drawn[index] = sampled.token_ids.masked_fill(~sampled.finite, -1)
        return dict(zip((draw.key for draw in draws), sampled.logprobs, strict=True))

    def _prompt_logprobs(
        self, batch: SubBatch, shape: SweepShape, sampling: Mapping[int, SamplingRow]
    ) -> list[tuple[Sequence[int], LandingLogprobs]]:
        """With the tokens that they are of."""
        found: list[tuple[Sequence[int], LandingLogprobs]] = []
        buffers, draws, row = self._sweeps.activations, self._sweeps.draws, shape.decode
        for chunk in batch.prefill:
            top = sampling[chunk.key].spec.prompt_logprobs
            for first in range(0, len(chunk.logprob_targets), draws.prompt_rows):
                assert top is not None
                targets = chunk.logprob_targets[first : first + draws.prompt_rows]
                rows = slice(row + first, row + first + len(targets))
                logits = self._sweeps.model.logits(buffers.residual[rows] + buffers.update[rows])
                found.append((targets, draws.prompt_logprobs(chunk.key, logits, targets, top)))
            row += len(chunk.token_ids)
        return found

    # -- sweeps with host rows ---------------------------------------------------------------

    def _resolved(
        self, plan: IterationPlan, sampling: Mapping[int, SamplingRow]
    ) -> tuple[IterationPlan, Mapping[int, SamplingRow]]:
        """The plan and its rows' outputs with tokens in the place of pending ones. Waits for the
        sweep that draws them."""
        pending = {
            row.key
            for batch in plan.batches
            for row in (*batch.gpu_decode, *batch.host_decode)
            if row.token_id == PENDING_TOKEN
        }
        if not pending:
            return plan, sampling
        drawn: list[int] = self._sweeps.activations.drawn.tolist()
        known = {key: max(drawn[self._drawn[key]], 0) for key in pending}

        def rows(of: Sequence[DecodeRow]) -> tuple[DecodeRow, ...]:
            return tuple(
                dataclasses.replace(row, token_id=known.get(row.key, row.token_id)) for row in of
            )

        batches = tuple(
            dataclasses.replace(
                batch, gpu_decode=rows(batch.gpu_decode), host_decode=rows(batch.host_decode)
            )
            for batch in plan.batches
        )
        keys = {row.key for batch in plan.batches for row in batch.prefill}
        keys.update(key for batch in plan.batches for key in batch.sampled_keys)
        said = {key: sampling[key] for key in keys}
        for key, token in known.items():
            output = (*said[key].output_token_ids, token)
            said[key] = dataclasses.replace(said[key], output_token_ids=output)
        return dataclasses.replace(plan, batches=batches), said


def _waited_for(plan: IterationPlan) -> list[int]:
    """Choices whose host rows come back in the layer where they leave."""
    if plan.mode is Mode.DEFERRED:
        return []
    return [row.key for batch in plan.batches for row in batch.host_decode]


def _uses_host(batch: SubBatch) -> bool:
    return bool(batch.host_decode) or any(chunk.tier is Tier.HOST for chunk in batch.prefill)
