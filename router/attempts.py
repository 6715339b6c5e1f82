"""Makes a call: on one backend, on others in turn while none has begun to answer, or on a second
one beside a slow first.

    hedging        A ─────────────────────── first message ──> passed on
                   │<─ hedge_after ─>│
                                     B ── cancelled

Only what has not begun to answer is hedged, so nothing reaches the client twice; the price is work
that is thrown away, which is why it is off unless configured, and counts as a retry.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import grpc

from router.backend import Backend
from router.calls import OpenCall
from router.keys import CallKeys, keys_of
from router.metrics import Measured, RouterMetrics
from router.registry import Registry
from router.relay import Attempt, Context, Failure, Send
from router.retry import RetryBudget, pause_seconds

RETRIED = frozenset({grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED})
"""Says that this backend cannot take the call now; another one may."""


@dataclass(frozen=True)
class RetryLimits:
    max_attempts: int
    """Backends tried for one call."""
    ratio: float
    """Retries allowed for each call, over all calls; see router.retry."""
    base_seconds: float
    """Bound of the pause before a call's first retry; doubles."""
    max_seconds: float
    hedge_seconds: float = 0.0
    """After which a second backend is asked; 0: never."""


class Try:
    """An attempt on `backend`, counted as open there from `__enter__` to `__exit__`."""

    def __init__(
        self,
        backend: Backend,
        clock: Callable[[], float],
        prompt_tokens: int,
        open_attempt: Callable[[Any], Attempt],
    ) -> None:
        self.backend = backend
        self._clock = clock
        self._call = backend.call(clock(), prompt_tokens)
        self._open_attempt = open_attempt
        self._opened: OpenCall | None = None
        self._attempt: Attempt | None = None

    def __enter__(self) -> Try:
        self._opened = self._call.__enter__()
        try:
            self._attempt = self._open_attempt(self.backend.channel)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._attempt is not None:
            self._attempt.end()
        self._call.__exit__(kind, error, trace)

    async def first(self) -> Failure | None:
        """See Attempt.first. What it says of the backend is noted."""
        assert self._attempt is not None
        assert self._opened is not None
        failure = await self._attempt.first()
        if failure is None:
            self._opened.answered(self._clock())
        self.note(failure)
        return failure

    async def rest(self, send: Callable[[bytes], Awaitable[None]]) -> Failure | None:
        """See Attempt.rest."""
        assert self._attempt is not None
        failure = await self._attempt.rest(send)
        if failure is not None:
            self.note(failure)
        return failure

    def note(self, failure: Failure | None) -> None:
        now = self._clock()
        if failure is not None and failure.unreachable:
            self.backend.call_failed(now)
        elif failure is not None and failure.is_the_backends:
            self.backend.call_went_wrong(now)
        else:
            self.backend.call_answered(now)
            if failure is not None and failure.declined:
                self.backend.call_declined(now)


class Race:
    """Tries side by side; `first` says which one has begun to answer. All are ended at the end."""

    def __init__(self) -> None:
        self._stack = AsyncExitStack()
        self._running: dict[asyncio.Task[Failure | None], Try] = {}

    async def __aenter__(self) -> Race:
        return self

    async def __aexit__(self, *error: Any) -> None:
        for task in self._running:
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._stack.aclose()

    def start(self, one: Try) -> None:
        self._stack.enter_context(one)
        self._running[asyncio.create_task(one.first())] = one

    async def first(self, seconds: float | None) -> tuple[Try | None, Failure | None] | None:
        """The one that answers, and None; or None and the failure of the last one, when all have
        failed; None alone when nobody has said anything for that long."""
        failure: Failure | None = None
        while self._running:
            done, _ = await asyncio.wait(
                self._running, timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                return None
            for task in done:
                one = self._running.pop(task)
                failure = task.result()
                if failure is None:
                    return one, None
        return None, failure


class Tries:
    """The calls of one router; used by one event loop."""

    def __init__(
        self,
        registry: Registry,
        metrics: RouterMetrics,
        limits: RetryLimits,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._metrics = metrics
        self._limits = limits
        self._clock = clock
        self._budget = RetryBudget(limits.ratio)

    async def run(
        self,
        path: str,
        request: bytes,
        context: Context,
        send: Send,
        measured: Measured,
        *,
        unary: bool,
    ) -> tuple[bool, Failure | None]:
        """Whether the call ended well; if not, how the last backend failed it, None where there was
        none to try. Raises ServiceError when no backend has the call's model."""
        keys = keys_of(path, request, context.invocation_metadata())

        def open_on(backend: Backend) -> Try:
            return Try(
                backend, self._clock, keys.prompt_tokens,
                lambda channel: Attempt(channel, path, request, context, unary=unary),
            )  # fmt: skip

        once = self._hedged if self._limits.hedge_seconds else self._alone
        tried: list[str] = []
        failure: Failure | None = None
        self._budget.began(self._clock())
        try:
            while backend := await self._next(keys, tried, failure, measured):
                tried.append(backend.address)
                answered, failure = await once(backend, open_on, keys, tried, send, measured)
                if failure is not None and (failure.unreachable or failure.is_the_backends):
                    for address in self._registry.check_outliers():
                        self._metrics.ejections.labels(address).inc()
                if answered or failure is None:
                    return failure is None, failure
            return False, failure
        finally:
            self._budget.ended()

    async def _next(
        self, keys: CallKeys, tried: list[str], failure: Failure | None, measured: Measured
    ) -> Backend | None:
        """The backend for the call's next attempt, None when there is to be none. failure: of the
        attempt before, whose answer had not begun."""
        limits = self._limits
        if failure is not None:
            if failure.code not in RETRIED or len(tried) >= limits.max_attempts:
                return None
            if not self._budget.take(self._clock()):
                self._metrics.over_budget.inc()
                return None
            await asyncio.sleep(pause_seconds(len(tried), limits.base_seconds, limits.max_seconds))
        # Where all queues are full, trying the others would only add to the load.
        full = failure is not None and failure.code is grpc.StatusCode.RESOURCE_EXHAUSTED
        backend = self._registry.choose(keys, tried, with_room=full)
        if backend is not None:
            measured.attempt(backend.address)
        return backend

    async def _alone(
        self,
        backend: Backend,
        open_on: Callable[[Backend], Try],
        keys: CallKeys,
        tried: list[str],
        send: Send,
        measured: Measured,
    ) -> tuple[bool, Failure | None]:
        """Whether the answer has begun, and how it failed."""
        with open_on(backend) as one:
            failure = await one.first()
            if failure is not None:
                return False, failure
            return True, await one.rest(send)

    async def _hedged(
        self,
        backend: Backend,
        open_on: Callable[[Backend], Try],
        keys: CallKeys,
        tried: list[str],
        send: Send,
        measured: Measured,
    ) -> tuple[bool, Failure | None]:
        """The same; those asked beside `backend` are added to `tried`."""
        async with Race() as race:
            race.start(open_on(backend))
            outcome = await race.first(self._limits.hedge_seconds)
            if outcome is None and (other := self._second(keys, tried, measured)) is not None:
                race.start(open_on(other))
            if outcome is None:
                outcome = await race.first(None)
            assert outcome is not None, "without a limit somebody says something"
            winner, failure = outcome
            if winner is None:
                return False, failure
            if winner.backend is not backend:
                self._metrics.hedges_won.inc()
            return True, await winner.rest(send)

    def _second(self, keys: CallKeys, tried: list[str], measured: Measured) -> Backend | None:
        """A backend to ask beside a slow one: one with room, as long as the budget allows it."""
        other = self._registry.choose(keys, tried, with_room=True)
        if other is None or not self._budget.take(self._clock()):
            return None
        tried.append(other.address)
        measured.hedge(other.address)
        return other
