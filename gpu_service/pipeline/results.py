"""Results of sweeps that every runner makes alike."""

from __future__ import annotations

import torch

from gpu_service.model.adjust import SamplingRow
from gpu_service.scheduling.plan import Failure, Flight, IterationPlan, SweepResult

PROMPT_LOGPROB_ROWS = 64
"""Prompt positions whose logits exist at once: 64 rows of 150,000 tokens are 38 MB."""


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's CPU allocator has no exception type of its own."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in str(
        error
    )


def out_of_memory(
    plan: IterationPlan, lost: frozenset[int], landed: tuple[Flight, ...] = ()
) -> SweepResult:
    """The newest prompt chunk ends, or the newest decode row without chunks, which take most.
    `landed`: what was under way, and has come to nothing."""
    chunks = {row.key for batch in plan.batches for row in batch.prefill}
    rows = (row for b in plan.batches for row in (*b.gpu_decode, *b.streamed, *b.host_decode))
    decode = {row.key for row in rows}
    victim = max(chunks or decode or {flight.key for flight in landed})
    void = (chunks | decode) - {victim}
    return SweepResult(
        void=frozenset(void), lost=lost, failed={victim: _OUT_OF_MEMORY}, landed=landed
    )


def nothing_to_draw(row: SamplingRow | None) -> Failure:
    """Why no token could be drawn. None: of a choice that has ended."""
    if row is not None and row.guide is not None and row.guide.problem:
        return Failure("GRAMMAR_FAILED", f"sampling.structured: {row.guide.problem}")
    return _NOT_FINITE


_NOT_FINITE = Failure("NUMERICAL", "the model's logits for this request are not finite")
_OUT_OF_MEMORY = Failure(
    "OUT_OF_MEMORY", "memory ran out while this request was running; the engine goes on"
)
