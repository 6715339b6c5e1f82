"""Runs plans on a CUDA device. A GPU-only sweep is queued and not waited for; the tokens it draws
stay on the device for the sweep after it."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence

import torch

from gpu_service.engine.messages import TokenLogprob
from gpu_service.model.model import CausalLM
from gpu_service.model.sampling import Sampler, SamplingRow
from gpu_service.model.sampling_limits import draws_on_device
from gpu_service.pipeline.cuda.forward import Activations, Forward
from gpu_service.pipeline.cuda.graphs import SweepGraphs
from gpu_service.pipeline.cuda.inputs import SweepInputs, SweepShape
from gpu_service.pipeline.cuda.logprobs import LandingLogprobs, SweepLogprobs
from gpu_service.pipeline.cuda.sampling import DeviceDraws, Draw
from gpu_service.pipeline.cuda.shapes import ShapeTable
from gpu_service.pipeline.launch import DoneSweep, LaunchedSweep
from gpu_service.pipeline.results import NOT_FINITE, is_out_of_memory, out_of_memory
from gpu_service.pipeline.runner import PlanRunner
from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import (
    PENDING_TOKEN,
    DecodeRow,
    IterationPlan,
    SampledToken,
    SubBatch,
    SweepResult,
    Tier,
)

_BYTES_PER_SECOND = 3e12


@dataclasses.dataclass(frozen=True)
class CudaSweeps:
    """What runs a GPU-only sweep."""

    model: CausalLM
    table: ShapeTable
    inputs: SweepInputs
    activations: Activations
    draws: DeviceDraws
    forward: Forward
    graphs: SweepGraphs

    def costs(self) -> SweepCosts:
        """As timed at start, with attention at a high-end device's bandwidth: the first sweeps
        correct it."""
        spec, item = self.model.spec, self.model.dtype.itemsize
        token_bytes = 2 * spec.layers * spec.kv_heads * spec.head_dim * item
        return self.graphs.costs(1e3 * token_bytes / _BYTES_PER_SECOND)

    def runner(self, sampler: Sampler, inline: PlanRunner) -> CudaRunner:
        return CudaRunner(self, sampler, inline)


class CudaRunner:
    """A `Runner`. Sweeps that the host tier takes part in run in `inline`, one at a time."""

    def __init__(self, sweeps: CudaSweeps, sampler: Sampler, inline: PlanRunner) -> None:
        self._sweeps = sweeps
        self._sampler = sampler
        self._inline = inline
        self._drawn: dict[int, int] = {}
        """Choice -> index of its token in `activations.drawn`, of the last sweep."""
        drawn = sweeps.activations.drawn
        pin = drawn.is_cuda
        self._landing = [torch.zeros(drawn.shape, dtype=drawn.dtype, pin_memory=pin) for _ in "ab"]
        self._turn = 0

    @torch.inference_mode()
    def launch(self, plan: IterationPlan, sampling: Mapping[int, SamplingRow]) -> LaunchedSweep:
        """See `Runner.launch`."""
        if plan.migrations or any(_uses_host(batch) for batch in plan.batches):
            self._sweeps.draws.forget()
            resolved, known, self._drawn = *self._resolved(plan, sampling), {}
            return self._inline.launch(resolved, known)
        (batch,) = plan.batches
        shape = self._sweeps.table.shape_for(batch)
        begin = self._mark()
        self._drawn = self._sweeps.inputs.send(batch, shape, self._drawn)
        try:
            if not self._sweeps.graphs.replay(shape):
                longest = max((len(chunk.token_ids) for chunk in batch.prefill), default=0)
                self._sweeps.forward.run(shape, longest)
            logprobs = self._sample(batch, sampling)
            logprobs.prompts = self._prompt_logprobs(batch, shape, sampling)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self._sweeps.draws.forget()
            return DoneSweep(out_of_memory(plan, frozenset()))
        return self._landing_sweep(shape, begin, logprobs)

    def _mark(self) -> torch.cuda.Event | None:
        """Now, in the device's time."""
        if not self._sweeps.activations.drawn.is_cuda:
            return None
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def _landing_sweep(
        self,
        shape: SweepShape,
        begin: torch.cuda.Event | None,
        logprobs: SweepLogprobs,
    ) -> QueuedSweep:
        self._turn ^= 1
        drawn, landing = self._sweeps.activations.drawn, self._landing[self._turn]
        landing[: shape.sequences].copy_(drawn[: shape.sequences], non_blocking=True)
        end = self._mark()
        events = (begin, end) if begin and end else None
        return QueuedSweep(events, landing, self._drawn, logprobs)

    # -- what greedy sweeps do without -------------------------------------------------------

    def _sample(self, batch: SubBatch, sampling: Mapping[int, SamplingRow]) -> SweepLogprobs:
        """Draw anew for those who want more than the largest logit."""
        lengths = [(row.key, row.length) for row in batch.gpu_decode]
        lengths += [
            (row.key, row.start + len(row.token_ids)) for row in batch.prefill if row.samples
        ]
        draws = [
            Draw(key, row, length - len(row.prompt_token_ids), self._drawn[key])
            for key, length in lengths
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


class QueuedSweep:
    """A sweep whose tokens are on their way to the host."""

    def __init__(
        self,
        events: tuple[torch.cuda.Event, torch.cuda.Event] | None,
        landing: torch.Tensor,
        indices: dict[int, int],
        logprobs: SweepLogprobs,
    ) -> None:
        self._events = events
        self._landing = landing
        self._indices = indices
        self._logprobs = logprobs

    @property
    def is_done(self) -> bool:
        """Never asked for again once it is: it stays in flight until the next one is launched."""
        return False

    def result(self) -> SweepResult:
        device_seconds, waiting = 0.0, time.perf_counter()
        if self._events is not None:
            begin, end = self._events
            end.synchronize()
            device_seconds = 1e-3 * float(begin.elapsed_time(end))
        waited = time.perf_counter() - waiting
        ids: list[int] = self._landing.tolist()
        drawn = {key: ids[index] for key, index in self._indices.items()}
        logprobs = self._logprobs.of_tokens(drawn)
        return SweepResult(
            tokens={k: SampledToken(t, logprobs.get(k)) for k, t in drawn.items() if t >= 0},
            failed={key: NOT_FINITE for key, token in drawn.items() if token < 0},
            prompt_logprobs=self._logprobs.of_prompts(),
            device_seconds=device_seconds,
            waited_seconds=waited,
        )


def _uses_host(batch: SubBatch) -> bool:
    return bool(batch.host_decode) or any(chunk.tier is Tier.HOST for chunk in batch.prefill)
