"""Admission as handlers call it:

async with admission.admit(principal.current(), priority, cost, seconds_left) as permit:
    ...
    permit.settle(tokens)
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from neo_common.errors import Reason, ServiceError
from neo_common.grpc.principal import Principal
from neo_common.watched import Watched
from router.admission.core import AdmissionCore
from router.admission.cost import Cost
from router.admission.metrics import AdmissionMetrics
from router.admission.policy import Policy, PriorityClass, load_policy
from router.admission.tickets import Refusal, State, Ticket


class Permit:
    """To run one request."""

    def __init__(self) -> None:
        self.used: float | None = None

    def settle(self, tokens: float | None) -> None:
        """What the request took, prompt and output; None: not known. Unsettled, it counts for what
        was reserved."""
        self.used = tokens


class Admission:
    """Used by one event loop. Off when `path`, the tenants file, is "": then everybody is admitted,
    at once and uncounted.

    room(waiting): how many requests the backends would take now if each may have `waiting` in its
    own queue.
    """

    def __init__(
        self,
        path: str,
        room: Callable[[int], float],
        metrics: AdmissionMetrics,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Raises ValueError when the file cannot be used."""
        self.on = bool(path)
        self._source = Watched([path], lambda: load_policy(path)) if path else None
        self._core = AdmissionCore(self._source.get() if self._source else Policy())
        self._backends_room = room
        self._metrics = metrics
        self._clock = clock
        self._waiters: dict[Ticket, asyncio.Future[None]] = {}
        self._starting: set[Ticket] = set()
        self._timer: asyncio.TimerHandle | None = None
        metrics.watch(lambda: self._core.waiting)

    @property
    def policy(self) -> Policy:
        return self._core.policy

    @property
    def waiting(self) -> int:
        return self._core.waiting

    @property
    def running(self) -> int:
        return self._core.running

    @asynccontextmanager
    async def admit(
        self,
        who: Principal,
        priority: int = 0,
        cost: Cost = Cost(),  # noqa: B008 -- frozen
        seconds_left: float | None = None,
        size_bytes: int = 0,
    ) -> AsyncIterator[Permit]:
        """Waits until the request may run; it is counted as running until the block ends. Raises
        ServiceError: RESOURCE_EXHAUSTED with a retry delay, or INVALID_ARGUMENT for a message that
        is larger than the tenant may send.

        cost: what it will take at most. seconds_left: until its client gives up."""
        permit = Permit()
        if not self.on:
            yield permit
            return
        ticket = self._submit(
            who.tenant, PriorityClass.of(priority), cost, seconds_left, size_bytes
        )
        try:
            if ticket.state is not State.RUNNING:
                await self._started(ticket)
            yield permit
        finally:
            self._core.end(ticket, self._clock(), permit.used)
            self._metrics.ended(self._label(ticket), ticket, permit.used)
            self.turn()

    def turn(self) -> None:
        """See who may start now. To be called when backends have news."""
        self._refresh()
        for ticket in self._core.turn(self._clock(), self._room()):
            waiter = self._waiters.get(ticket)
            if waiter is None:
                continue
            if ticket.state is State.RUNNING:
                self._starting.add(ticket)
            if not waiter.done():
                waiter.set_result(None)
        self._arm()

    def _submit(
        self, tenant: str, rank: PriorityClass, cost: Cost, left: float | None, size_bytes: int
    ) -> Ticket:
        self._refresh()
        policy = self._core.policy
        most = policy.of(tenant).max_request_kib << 10
        if most and size_bytes > most:
            raise ServiceError(
                Reason.INVALID_ARGUMENT,
                f"the request has {size_bytes} bytes; this tenant's may have {most}",
            )
        try:
            ticket = self._core.submit(
                tenant, rank, cost.total(policy.shared), self._clock(),
                seconds_left=math.inf if left is None else left, room=self._room(),
            )  # fmt: skip
        except Refusal as refusal:
            raise self._refused(policy.label(tenant), refusal) from None
        if ticket.state is State.WAITING:
            self._waiters[ticket] = asyncio.get_running_loop().create_future()
        return ticket

    async def _started(self, ticket: Ticket) -> None:
        """Raises ServiceError when it is refused after all."""
        try:
            self.turn()  # somebody may have been pushed out for it
            await self._waiters[ticket]
        finally:
            del self._waiters[ticket]
            self._starting.discard(ticket)
        if ticket.refusal is not None:
            raise self._refused(self._label(ticket), ticket.refusal)
        self._metrics.waited(ticket)

    def _refused(self, label: str, refusal: Refusal) -> ServiceError:
        self._metrics.refused(label, refusal.reason)
        return ServiceError(refusal.reason, str(refusal), retry_after=refusal.retry_after)

    def _label(self, ticket: Ticket) -> str:
        return self._core.policy.label(ticket.tenant.name)

    def _refresh(self) -> None:
        if self._source is not None and (policy := self._source.get()) is not self._core.policy:
            self._core.configure(policy, self._clock())

    def _room(self) -> float:
        """Those that were started and did not get to their backend yet count as on it."""
        waiting = self._core.policy.shared.max_backend_waiting
        return self._backends_room(waiting) - len(self._starting) if waiting else math.inf

    def _arm(self) -> None:
        """Wake up when the next one's time is up."""
        expiry = self._core.next_expiry()
        if math.isinf(expiry):
            return
        loop = asyncio.get_running_loop()
        at = loop.time() + max(0.0, expiry - self._clock())
        if self._timer is not None:
            if self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = loop.call_at(at, self._expired)

    def _expired(self) -> None:
        self._timer = None
        self.turn()
