"""Runs plans: migrations, a sweep in the plan's mode, and the draw of the next tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress

import torch

from gpu_service.engine.messages import TokenLogprob
from gpu_service.model.sampling import Sampler, SamplingRow
from gpu_service.offload.host_tier import HostTierStalled
from gpu_service.pipeline.batch import DeviceBatch, device_batch
from gpu_service.pipeline.inline import run_inline
from gpu_service.pipeline.launch import DoneSweep
from gpu_service.pipeline.migration import Migrator
from gpu_service.pipeline.parts import EngineParts, LaneOutcome
from gpu_service.pipeline.results import (
    NOT_FINITE,
    PROMPT_LOGPROB_ROWS,
    is_out_of_memory,
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

_PIPELINES: Mapping[Mode, Callable[[EngineParts, Sequence[DeviceBatch]], list[LaneOutcome]]] = {
    Mode.INLINE: run_inline
}


class PlanRunner:
    """The engine's hands. One thread; nothing of a plan outlives `run` but the KV it has stored."""

    def __init__(self, parts: EngineParts, sampler: Sampler, migrator: Migrator) -> None:
        self._parts = parts
        self._sampler = sampler
        self._migrator = migrator

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
        return out_of_memory(plan, lost)

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
        size, device = self._parts.geometry.block_tokens, self._parts.model.device
        batches = [device_batch(batch, size, device) for batch in plan.batches]
        outcomes = _PIPELINES[plan.mode](self._parts, batches)
        tokens: dict[int, SampledToken] = {}
        failed: dict[int, Failure] = {}
        logprobs: dict[int, list[TokenLogprob]] = {}
        void: set[int] = set()
        for batch, on_device, outcome in zip(plan.batches, batches, outcomes, strict=True):
            void.update(outcome.void)
            skip = outcome.void | lost
            self._sample(batch, on_device, outcome.state, sampling, skip, tokens, failed)
            self._prompt_logprobs(batch, on_device, outcome.state, sampling, skip, logprobs)
        return SweepResult(tokens, frozenset(void), lost, failed, logprobs)

    def _sample(
        self,
        batch: SubBatch,
        on_device: DeviceBatch,
        state: torch.Tensor,
        sampling: Mapping[int, SamplingRow],
        skip: frozenset[int],
        tokens: dict[int, SampledToken],
        failed: dict[int, Failure],
    ) -> None:
        """Draw for the rows that ask for it; fills `tokens` and `failed`."""
        chosen = [
            (key, row)
            for key, row in zip(batch.sampled_keys, _sampled_rows(batch, on_device), strict=True)
            if key not in skip
        ]
        if not chosen:
            return
        keys = [key for key, _ in chosen]
        rows = torch.tensor([row for _, row in chosen], dtype=torch.int64, device=state.device)
        logits = self._parts.model.logits(state, rows)
        sampled = self._sampler.sample(logits, [sampling[key] for key in keys])
        failed.update((keys[i], NOT_FINITE) for i in sampled.failed_rows())
        ids: list[int] = sampled.token_ids.tolist()
        for key, token_id, logprob in zip(keys, ids, sampled.logprobs, strict=True):
            if key not in failed:
                tokens[key] = SampledToken(token_id, logprob)

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


def _sampled_rows(batch: SubBatch, on_device: DeviceBatch) -> list[int]:
    """Rows of the dense state behind `batch.sampled_keys`."""
    chunks = zip(batch.prefill, on_device.chunks, strict=True)
    rows = [chunk.rows.stop - 1 for row, chunk in chunks if row.samples]
    rows.extend(range(on_device.gpu_rows.start, on_device.host_rows.stop))
    return rows
