"""One request as its client sees it, for metrics and its trace."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from gpu_service.engine.messages import Mark, Submit
from gpu_service.frontend.dispatch import Update
from gpu_service.frontend.metrics import FrontendMetrics
from neo_common.errors import ServiceError
from neo_common.tracing import NO_SPAN, Span
from protos.neo.v1 import types_pb2 as types

_REASONS = {
    types.FINISH_REASON_STOP: "stop",
    types.FINISH_REASON_LENGTH: "length",
    types.FINISH_REASON_ABORTED: "abort",
}


class Observed:
    """Fed with each update. Costs a few observations per message, none per token within one."""

    def __init__(
        self,
        metrics: FrontendMetrics,
        submit: Submit,
        span: Span = NO_SPAN,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._metrics = metrics
        self._submit = submit
        self._span = span
        self._exemplar = {"trace_id": span.trace_id} if span.recording else None
        self._clock = clock
        self._last = 0.0
        self._first: float | None = None
        self._lengths: dict[int, int] = {}
        self._finished = 0
        metrics.asked_n.observe(submit.sampling.n)
        metrics.asked_tokens.observe(submit.sampling.max_tokens)

    def take_in(self, update: Update) -> None:
        metrics, now, tokens = self._metrics, self._clock(), 0
        for choice in update.choices:
            new = len(choice.token_ids)
            tokens += new
            self._lengths[choice.index] = self._lengths.get(choice.index, 0) + new
            if choice.finish_reason:
                self._finish(_REASONS.get(choice.finish_reason, "stop"))
        if tokens:
            if self._first is None:
                self._first = now
                metrics.ttft.observe(now - self._submit.arrival, self._exemplar)
                metrics.prompt_tokens.inc(len(self._submit.prompt_token_ids))
            else:
                gap = (now - self._last) / tokens * len(update.choices)
                metrics.itl.observe(gap, self._exemplar)
            metrics.output_tokens.inc(tokens)
            self._last = now
        if update.usage is not None:
            self._end(update.usage, now)
            if self._span.recording:
                self._trace(update.usage, update.marks)

    def _finish(self, reason: str, count: int = 1) -> None:
        self._finished += count
        self._metrics.finished[reason].inc(count)

    def _end(self, usage: types.Usage, now: float) -> None:
        metrics, arrival, exemplar = self._metrics, self._submit.arrival, self._exemplar
        planned = arrival + usage.queue_seconds
        first = arrival + usage.ttft_seconds
        metrics.e2e.observe(now - arrival, exemplar)
        metrics.queue.observe(usage.queue_seconds, exemplar)
        metrics.prefill.observe(max(first - planned, 0.0))
        metrics.inference.observe(max(now - planned, 0.0))
        metrics.decode.observe(max(now - first, 0.0))
        metrics.prompt_length.observe(usage.prompt_tokens)
        metrics.output_length.observe(usage.completion_tokens)
        longest = max(self._lengths.values(), default=0)
        metrics.max_output.observe(longest)
        if longest > 1:
            metrics.tpot.observe((now - first) / (longest - 1), exemplar)

    def _trace(self, usage: types.Usage, marks: Sequence[Mark]) -> None:
        """Parts of the request as spans: how the engine spent its time."""
        arrival, span = self._submit.arrival, self._span
        span.child("queue", arrival, arrival + usage.queue_seconds, {})
        for mark in marks:
            attributes = {f"neo.{name}": value for name, value in mark.attributes.items()}
            span.child(mark.name, mark.start, mark.end, attributes)
        span.set(
            gen_ai__usage__input_tokens=usage.prompt_tokens,
            gen_ai__usage__output_tokens=usage.completion_tokens,
            neo__gpu_tokens=usage.gpu_tokens,
            neo__host_tokens=usage.host_tokens,
            neo__demotions=usage.demotions,
            neo__promotions=usage.promotions,
            neo__recomputations=usage.recomputations,
            neo__ttft_seconds=usage.ttft_seconds,
            neo__cached_prompt_tokens=usage.cached_prompt_tokens,
        )

    def end_early(self, reason: str) -> None:
        """The choices that have not ended never will."""
        self._span.set(neo__finish=reason)
        left = self._submit.sampling.n - self._finished
        if left > 0:
            self._finish(reason, left)


@contextmanager
def observe(metrics: FrontendMetrics, submit: Submit, span: Span = NO_SPAN) -> Iterator[Observed]:
    """Around all that is done for one request; what ends the block is how the request ended."""
    observed = Observed(metrics, submit, span)
    try:
        yield observed
    except (asyncio.CancelledError, GeneratorExit):
        observed.end_early("abort")
        raise
    except ServiceError:
        observed.end_early("error")
        raise


@contextmanager
def count_errors(metrics: FrontendMetrics) -> Iterator[None]:
    """Counts what is refused or fails, by its machine-readable reason."""
    try:
        yield
    except ServiceError as error:
        metrics.errors[error.reason].inc()
        raise
