"""Live requests, and the one task that hands them what the engine core says.

    async with dispatcher.open(parsed) as live:      submitted; aborted if left before its end
        async for update in live:                    coalesced: a slow reader gets larger updates
            ...

Memory is bounded: what a reader has not fetched yet is one delta per choice, whose tokens are at
most max_tokens.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from gpu_service.engine.messages import (
    Abort,
    ChoiceDelta,
    Command,
    EngineCounters,
    Event,
    Failed,
    ForgetPrefixes,
    Load,
    Mark,
    Output,
    PromptLogprobs,
    Refusal,
    RequestUsage,
)
from gpu_service.frontend.choice import ChoiceStream, logprob_message
from gpu_service.frontend.metrics import FrontendMetrics
from gpu_service.frontend.validate import ParsedRequest
from gpu_service.model.tokenizer import Tokenizer
from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types


class Engine(Protocol):
    """What the dispatcher needs of `EngineClient`."""

    async def send(self, command: Command) -> None: ...

    def __aiter__(self) -> AsyncIterator[Event]: ...


@dataclass
class Update:
    """News of a request since the last one; `usage` comes with the last, and `marks` of a traced
    request."""

    choices: list[inference.Choice] = field(default_factory=list)
    prompt_logprobs: list[types.TokenLogprobs] = field(default_factory=list)
    usage: types.Usage | None = None
    marks: list[Mark] = field(default_factory=list)


class LiveRequest:
    """One request between its submission and its end. One reader."""

    def __init__(self, parsed: ParsedRequest, tokenizer: Tokenizer) -> None:
        self.parsed = parsed
        submit = parsed.submit
        self.choices = [
            ChoiceStream(
                index,
                tokenizer.stream(
                    submit.prompt_token_ids, skip_special_tokens=parsed.skip_special_tokens
                )
                if parsed.detokenize
                else None,
                parsed.stop,
            )
            for index in range(submit.sampling.n)
        ]
        self._prompt_logprobs: list[types.TokenLogprobs] = []
        self._usage: types.Usage | None = None
        self._marks: list[Mark] = []
        self._error: ServiceError | None = None
        self._news = asyncio.Event()
        self.ended = False
        """The engine has nothing more to say of it."""

    def take_in(self, delta: ChoiceDelta) -> bool:
        """True when the engine must be told that a stop string ended the choice."""
        self._news.set()
        return self.choices[delta.index].take_in(delta)

    def take_prompt_logprobs(self, message: PromptLogprobs) -> None:
        self._prompt_logprobs = [logprob_message(logprob) for logprob in message.logprobs]

    def end(self, usage: RequestUsage) -> None:
        self._usage = self._usage_message(usage)
        self._marks = usage.marks
        self.ended = True
        self._news.set()

    def fail(self, error: ServiceError) -> None:
        self._error = error
        self.ended = True
        self._news.set()

    async def __aiter__(self) -> AsyncIterator[Update]:
        """Raises ServiceError when the request failed; what it had to say before comes first."""
        while True:
            await self._news.wait()
            self._news.clear()
            update = self._take_out()
            if update.choices or update.usage is not None:
                yield update
            if update.usage is not None:
                return
            if self._error is not None:
                raise self._error

    def _take_out(self) -> Update:
        choices = [out for choice in self.choices if (out := choice.take_out()) is not None]
        update = Update(choices, usage=self._usage, marks=self._marks)
        if choices:
            update.prompt_logprobs, self._prompt_logprobs = self._prompt_logprobs, []
        return update

    def _usage_message(self, usage: RequestUsage) -> types.Usage:
        """The engine also counts what it decoded behind a stop string before it heard of it; the
        client's usage counts what the client got, less on the tier that decoded most."""
        delivered = sum(choice.tokens for choice in self.choices)
        surplus = usage.completion_tokens - delivered
        gpu, host = usage.gpu_tokens, usage.host_tokens
        if host > gpu:
            host = max(host - surplus, 0)
            gpu = delivered - host
        else:
            gpu = max(gpu - surplus, 0)
            host = delivered - gpu
        return types.Usage(
            prompt_tokens=len(self.parsed.submit.prompt_token_ids),
            completion_tokens=delivered,
            gpu_tokens=gpu,
            host_tokens=host,
            demotions=usage.demotions,
            promotions=usage.promotions,
            recomputations=usage.recomputations,
            queue_seconds=usage.queue_seconds,
            ttft_seconds=usage.ttft_seconds,
            cached_prompt_tokens=usage.cached_prompt_tokens,
            cached_host_tokens=usage.cached_host_tokens,
            prefix_hit_tokens=usage.prefix_hit_tokens,
        )


class Dispatcher:
    """Owns all live requests of this process. Used from one event loop."""

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        metrics: FrontendMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._metrics = metrics
        self._live: dict[str, LiveRequest] = {}
        self._over = False
        self._clock = clock
        self._owed_since = 0.0
        self.load: Load | None = None
        self.counters: EngineCounters | None = None
        self.snapshots = 0

    @property
    def live(self) -> int:
        return len(self._live)

    def silent_seconds(self) -> float:
        """How long the engine has owed its live requests a word; each iteration says something."""
        return self._clock() - self._owed_since if self._live else 0.0

    async def run(self) -> str:
        """Hand out what the engine says until it ends; returns how it failed, "" where it ended
        well. All live requests then fail with UNAVAILABLE."""
        failure = ""
        try:
            async for event in self._engine:
                if isinstance(event, Output):
                    await self._output(event)
                elif isinstance(event, Failed):
                    failure = event.message
        finally:
            self._over = True
            for live in self._live.values():
                live.fail(self._lost())
        return failure

    @asynccontextmanager
    async def open(self, parsed: ParsedRequest) -> AsyncIterator[LiveRequest]:
        """Submit a request. Raises ServiceError for an id that is live, or without an engine."""
        identity = parsed.submit.request_id
        if self._over:
            raise self._lost()
        if identity in self._live:
            raise ServiceError(
                Reason.DUPLICATE_REQUEST_ID,
                "request_id names a request that is still live",
                field="request_id",
            )
        if not self._live:
            self._owed_since = self._clock()
        live = self._live[identity] = LiveRequest(parsed, self._tokenizer)
        try:
            await self._engine.send(parsed.submit)
            yield live
        finally:
            try:
                # A cancelled handler may not await for long, but this send only queues.
                if not live.ended:
                    await asyncio.shield(self._engine.send(Abort(identity)))
            finally:
                del self._live[identity]

    async def abort(self, request_id: str) -> None:
        """End a live request; its choices finish as aborted. Raises ServiceError if unknown."""
        live = self._live.get(request_id)
        if live is None:
            raise ServiceError(
                Reason.REQUEST_NOT_FOUND, "no live request has this request_id", field="request_id"
            )
        for choice in live.choices:
            if not choice.finished:
                aborted = ChoiceDelta(request_id, choice.index, [], finish="aborted")
                live.take_in(aborted)
                await self._engine.send(Abort(request_id, choice.index))

    async def forget_prefixes(self) -> None:
        """No request that is submitted from now on finds KV of an earlier one. Raises
        ServiceError without an engine."""
        if self._over:
            raise self._lost()
        await self._engine.send(ForgetPrefixes())

    async def _output(self, output: Output) -> None:
        self._owed_since = self._clock()
        if output.load is not None:
            self.load = output.load
            self.snapshots += 1
            self._metrics.engine.load = output.load
        if output.counters is not None:
            self.counters = self._metrics.engine.counters = output.counters
        for logprobs in output.prompt_logprobs:
            if live := self._live.get(logprobs.request_id):
                live.take_prompt_logprobs(logprobs)
        for delta in output.deltas:
            live = self._live.get(delta.request_id)
            if live is not None and live.take_in(delta):
                await self._engine.send(Abort(delta.request_id, delta.index))
        for usage in output.usages:
            if live := self._live.get(usage.request_id):
                live.end(usage)
        for refusal in output.refusals:
            if live := self._live.get(refusal.request_id):
                live.fail(_refused(refusal))

    def _lost(self) -> ServiceError:
        return ServiceError(Reason.ENGINE_LOST, "the engine core has ended", retry_after=5.0)


_FIELDS = {Reason.NEVER_FITS: "sampling.max_tokens", Reason.INVALID_ARGUMENT: "prompt"}
"""What is wrong with a request that the scheduler refuses."""


def _refused(refusal: Refusal) -> ServiceError:
    reason = Reason(refusal.reason)
    return ServiceError(
        reason,
        refusal.message,
        field=_FIELDS.get(reason),
        retry_after=refusal.retry_after_seconds,
    )
