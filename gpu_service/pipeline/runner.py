"""Runs plans: migrations, a sweep in the plan's mode, and the draw of the next tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch

from gpu_service.engine.messages import TokenLogprob
from gpu_service.model.sampling import Sampler, SamplingRow
from gpu_service.offload.host_tier import HostTierStalled
from gpu_service.pipeline.asymmetric import run_asymmetric
from gpu_service.pipeline.batch import DeviceBatch, device_batch
from gpu_service.pipeline.deferred import DeferredSweeps
from gpu_service.pipeline.inline import run_inline
from gpu_service.pipeline.launch import DoneSweep
from gpu_service.pipeline.migration import Migrator
from gpu_service.pipeline.parts import EngineParts, LaneOutcome
from gpu_service.pipeline.results import (
    PROMPT_LOGPROB_ROWS,
    is_out_of_memory,
    nothing_to_draw,
    out_of_memory,
)
from gpu_service.scheduling.plan import (
    Failure,
    IterationPlan,
    Migration,
    Mode,
    SampledToken,
    SubBatch,
    SweepResult,
)


class PlanRunner:
    """The engine's hands. One thread; nothing of a plan outlives `run` but the KV it has stored,
    and deferred rows."""

    def __init__(self, parts: EngineParts, sampler: Sampler, migrator: Migrator) -> None:
        self._parts = parts
        self._deferred = DeferredSweeps(parts)
        self._sampler = sampler
        self._migrator = migrator

    def close(self) -> None:
        """Nothing is held."""

    def launch(self, plan: IterationPlan, sampling: Mapping[int, SamplingRow]) -> DoneSweep:
        return DoneSweep(self.run(plan, sampling))

    @torch.inference_mode()
    def run(self, plan: IterationPlan, sampling: Mapping[int, SamplingRow]) -> SweepResult:
        """Run a plan. `sampling` has an entry for each of its choices.

        When memory runs out the sweep is void, and the request that asked for most of it ends: what
        the others stored is stored again, at the same places, by the next sweep.
        """
        lost = frozenset(m.key for m in plan.migrations if not self._migrate(m))
        try:
            return self._sweep(plan, sampling, lost)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        with suppress(HostTierStalled):
            self._parts.host.cancel_sweep()
        return out_of_memory(plan, lost, self._deferred.give_up(plan))

    def _migrate(self, migration: Migration) -> bool:
        try:
            return self._migrator.run(migration)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return False

    def _sweep(
        self, plan: IterationPlan, sampling: Mapping[int, SamplingRow], lost: frozenset[int]
    ) -> SweepResult:
        if not plan.batches and plan.mode is not Mode.DEFERRED:
            return SweepResult(lost=lost)
        batches = plan.batches or (SubBatch(),)
        size, device = self._parts.geometry.block_tokens, self._parts.model.device
        on_device = [device_batch(batch, size, device) for batch in batches]
        outcomes = self._run_lanes(plan, on_device)
        void = frozenset[int]().union(*(outcome.void for outcome in outcomes))
        skip = void | lost
        # One pass over the output layer's weights for all lanes.
        state = torch.cat([outcome.state for outcome in outcomes])
        start = 0
        chosen: dict[int, int] = {}
        logprobs: dict[int, list[TokenLogprob]] = {}
        for batch, placed, outcome in zip(batches, on_device, outcomes, strict=True):
            for key, row in _sampled_rows(plan.mode, batch, placed, outcome).items():
                if key in sampling and key not in skip:
                    chosen[key] = start + row
            self._prompt_logprobs(batch, placed, outcome.state, sampling, skip, logprobs)
            start += len(outcome.state)
        tokens, failed = self._sample(chosen, state, sampling)
        return SweepResult(
            tokens=tokens,
            void=void,
            lost=lost,
            failed=failed,
            landed=sum((o.finished + o.grounded for o in outcomes), ()),
            prompt_logprobs=logprobs,
            host_wait_seconds=self._parts.host_wait.take(),
        )

    def _run_lanes(
        self, plan: IterationPlan, batches: Sequence[DeviceBatch]
    ) -> Sequence[LaneOutcome]:
        if plan.mode is Mode.ASYMMETRIC:
            return run_asymmetric(self._parts, batches)
        (batch,) = batches
        if plan.mode is Mode.DEFERRED:
            return [self._deferred.run(batch, plan.number)]
        return [run_inline(self._parts, batch)]

    def _sample(
        self, chosen: Mapping[int, int], state: torch.Tensor, sampling: Mapping[int, SamplingRow]
    ) -> tuple[dict[int, SampledToken], dict[int, Failure]]:
        """Draw for these choices, each with its row of the state."""
        tokens: dict[int, SampledToken] = {}
        failed: dict[int, Failure] = {}
        if not chosen:
            return tokens, failed
        keys = list(chosen)
        rows = torch.tensor(list(chosen.values()), dtype=torch.int64, device=state.device)
        logits = self._parts.model.logits(state, rows)
        sampled = self._sampler.sample(logits, [sampling[key] for key in keys])
        failed.update((keys[i], nothing_to_draw(sampling[keys[i]])) for i in sampled.failed_rows())
        ids: list[int] = sampled.token_ids.tolist()
        for key, token_id, logprob in zip(keys, ids, sampled.logprobs, strict=True):
            if key not in failed:
                tokens[key] = SampledToken(token_id, logprob)
        return tokens, failed

    def _prompt_logprobs(
        self,
        batch: SubBatch,
        on_device: DeviceBatch,
        state: torch.Tensor,
        sampling: Mapping[int, SamplingRow],
        skip: frozenset[int],
        found: dict[int, list[TokenLogprob]],
    ) -> None:
        for row, chunk in zip(batch.prefill, on_device.chunks, strict=True):
            if not row.logprob_targets or row.key in skip:
                continue
            top = sampling[row.key].spec.prompt_logprobs
            assert top is not None
            listed = found.setdefault(row.key, [])
            for first in range(0, len(row.logprob_targets), PROMPT_LOGPROB_ROWS):
                targets = row.logprob_targets[first : first + PROMPT_LOGPROB_ROWS]
                start = chunk.rows.start + first
                logits = self._parts.model.logits(state[start : start + len(targets)])
                listed.extend(self._sampler.prompt_logprobs(logits, targets, top))


def _sampled_rows(
    mode: Mode, batch: SubBatch, on_device: DeviceBatch, outcome: LaneOutcome
) -> dict[int, int]:
    """Choice -> the row of the state that its next token is drawn from."""
    chunks = zip(batch.prefill, on_device.chunks, strict=True)
    found = {row.key: chunk.rows.stop - 1 for row, chunk in chunks if row.samples}
    decode = [*batch.gpu_decode, *batch.streamed]
    if mode is not Mode.DEFERRED:
        decode.extend(batch.host_decode)
    first = on_device.gpu_rows.start
    found.update((row.key, place) for place, row in enumerate(decode, first))
    if mode is Mode.DEFERRED:
        # A choice with a row of its own in this plan began anew since its flight started.
        busy = {chunk.key for chunk in batch.prefill} | {row.key for row in decode}
        for place, flight in enumerate(outcome.finished, first + len(decode)):
            if flight.key not in busy:
                found[flight.key] = place
    return found
