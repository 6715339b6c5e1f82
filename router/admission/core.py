"""Admission without I/O: tickets come, start, wait, are refused, end.

Every time is an argument, of one monotonic clock. A ticket is always in exactly one state:

    submit ──> RUNNING ─────────────> ENDED
       │          ^ turn                ^ end
       └────> WAITING ──> REFUSED       │   (pushed out, or its time is up; `turn` reports both)
       │         └──────────────────────┘   (its client went away)
       └─raises Refusal
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import OrderedDict

from neo_common.errors import Reason
from router.admission.flows import FairOrder, Flow
from router.admission.policy import Policy, PriorityClass
from router.admission.rates import Bucket, Pace
from router.admission.tickets import Refusal, State, Tenant, Ticket

MAX_IDLE_TENANTS = 4096
"""Of those that have nothing here; who is forgotten begins again with a full bucket."""


class AdmissionCore:
    """Memory is bounded by what waits and runs, and MAX_IDLE_TENANTS."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.running = 0
        self.waiting = 0
        self._tenants: dict[str, Tenant] = {}
        self._idle: OrderedDict[str, None] = OrderedDict()
        self._orders = {rank: FairOrder[Ticket]() for rank in PriorityClass}
        self._classes = FairOrder[PriorityClass]()
        self._class_flows: dict[PriorityClass, Flow[PriorityClass]] = {}
        self._backlogged: dict[Flow[Ticket], PriorityClass] = {}
        self._queued_load = 0.0
        self._queued_weight = dict.fromkeys(PriorityClass, 0.0)
        self._expiries: list[tuple[float, int, Ticket]] = []
        self._numbers = itertools.count()
        self._pace = Pace()
        self._pushed_out: list[Ticket] = []
        self._weigh_classes()

    # What handlers do ---------------------------------------------------------------------------

    def submit(
        self,
        name: str,
        rank: PriorityClass,
        cost: float,
        now: float,
        *,
        seconds_left: float = math.inf,
        room: float = math.inf,
    ) -> Ticket:
        """A ticket that is RUNNING or WAITING. Raises Refusal. room: how many more the backends
        take. Call `turn` afterwards: another one may have been pushed out."""
        tenant = self._tenant(name, now)
        rank = min(rank, tenant.limits.highest)
        patience = min(seconds_left, self.policy.shared.max_wait_seconds)
        load = cost * tenant.used_part
        ticket = Ticket(tenant, rank, cost, load, arrived=now, expires=now + patience)
        self._check_rates(tenant, cost, now)
        if tenant.has_room and self._room(room) >= 1 and self._next() is None:
            self._busy(tenant)
            self._charge(ticket, now)
            self._start(ticket, now)
            return ticket
        self._check_queue(ticket, patience, now)
        self._busy(tenant)
        self._charge(ticket, now)
        self._enqueue(ticket, now)
        return ticket

    def turn(self, now: float, room: float = math.inf) -> list[Ticket]:
        """Start what may start, refuse whose time is up. Returns the tickets that waited and do not
        any more, each one once."""
        changed, self._pushed_out = self._pushed_out, []
        changed += self._expire(now)
        room = self._room(room)
        while room >= 1 and (flow := self._next()) is not None:
            ticket = flow.head()
            self._start(ticket, now)
            changed.append(ticket)
            room -= 1
        return changed

    def end(self, ticket: Ticket, now: float, used: float | None = None) -> None:
        """Its call is over, or its client left. used: the tokens that it took; None: not known,
        what was reserved stays counted. Call `turn` afterwards."""
        tenant = ticket.tenant
        if ticket.state is State.WAITING:
            self._dequeue(ticket, now)
            used = 0.0
            if tenant.requests is not None:
                tenant.requests.take(-1.0, now)
        elif ticket.state is State.RUNNING:
            tenant.running -= 1
            self.running -= 1
            if used:
                tenant.learn(used, ticket.cost)
        else:
            return
        ticket.state = State.ENDED
        if used is not None and tenant.tokens is not None:
            tenant.tokens.take(used - ticket.cost, now)
        self._offer_all(tenant)
        self._maybe_idle(tenant)

    def next_expiry(self) -> float:
        """When `turn` should be called at the latest; infinite when nothing waits."""
        while self._expiries and self._expiries[0][2].state is not State.WAITING:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else math.inf

    def configure(self, policy: Policy, now: float) -> None:
        """Take a new policy over. What runs and waits goes on under it. Call `turn` afterwards."""
        self.policy = policy
        self._weigh_classes()
        for tenant in self._tenants.values():
            tenant.limits = policy.of(tenant.name)
            for flow in tenant.flows.values():
                flow.weight = tenant.limits.weight
            self._set_buckets(tenant, now)
            self._offer_all(tenant)
        self._queued_weight = dict.fromkeys(PriorityClass, 0.0)
        for flow, rank in self._backlogged.items():
            self._queued_weight[rank] += flow.weight

    def expected_wait(self, ticket: Ticket, now: float) -> float:
        """Seconds until it would start, queued now; 0 when nothing is known yet.

        What is ahead of it in its own flow takes its share of the pace, and all that waits takes
        the whole pace: the smaller one holds. A tenant at its own limit goes at its own pace."""
        mine = ticket.flow.cost + ticket.load
        share = self._share(ticket)
        everything = self._queued_load + ticket.load
        wait = self._pace.seconds_for(min(everything, mine / share), now)
        if not ticket.tenant.has_room:
            wait = max(wait, ticket.tenant.pace.seconds_for(mine, now))
        return wait

    # Tenants ------------------------------------------------------------------------------------

    def _tenant(self, name: str, now: float) -> Tenant:
        tenant = self._tenants.get(name)
        if tenant is None:
            limits = self.policy.of(name)
            flows = {rank: Flow[Ticket](limits.weight) for rank in PriorityClass}
            tenant = self._tenants[name] = Tenant(name, limits, flows)
            self._set_buckets(tenant, now)
        if not tenant.running and not tenant.waiting:
            self._idle.pop(name, None)
            self._maybe_idle(tenant)
        return tenant

    def _busy(self, tenant: Tenant) -> None:
        self._idle.pop(tenant.name, None)

    def _maybe_idle(self, tenant: Tenant) -> None:
        if tenant.running or tenant.waiting:
            return
        self._idle[tenant.name] = None
        if len(self._idle) > MAX_IDLE_TENANTS:
            del self._tenants[self._idle.popitem(last=False)[0]]

    def _set_buckets(self, tenant: Tenant, now: float) -> None:
        limits = tenant.limits
        burst = limits.burst_tokens or limits.tokens_per_minute
        tenant.tokens = _bucket(tenant.tokens, limits.tokens_per_minute, burst, now)
        per_minute = limits.requests_per_minute
        tenant.requests = _bucket(tenant.requests, per_minute, per_minute, now)

    def _check_rates(self, tenant: Tenant, cost: float, now: float) -> None:
        wait = tenant.requests.wait(1.0, now) if tenant.requests else 0.0
        if tenant.tokens:
            wait = max(wait, tenant.tokens.wait(cost, now))
        if wait > 0:
            raise Refusal(Reason.RATE_LIMITED, "the tenant's rate limit is used up", wait)

    def _charge(self, ticket: Ticket, now: float) -> None:
        if ticket.tenant.tokens is not None:
            ticket.tenant.tokens.take(ticket.cost, now)
        if ticket.tenant.requests is not None:
            ticket.tenant.requests.take(1.0, now)

    # The queue ----------------------------------------------------------------------------------

    def _check_queue(self, ticket: Ticket, patience: float, now: float) -> None:
        """Raises Refusal; otherwise there is a place, if need be somebody else's."""
        tenant, wait = ticket.tenant, self.expected_wait(ticket, now)
        if tenant.limits.max_queued and tenant.waiting >= tenant.limits.max_queued:
            raise Refusal(Reason.QUEUE_FULL, "the tenant's queue is full", wait)
        if wait > patience or patience <= 0:
            raise Refusal(
                Reason.WAIT_TOO_LONG, f"the wait would be about {wait:.1f} s, too long", wait
            )
        if self.waiting < self.policy.shared.max_queued:
            return
        fattest = max(self._backlogged, key=self._fatness, default=None)
        if fattest is None or self._fatness(fattest) <= self._fatness(ticket.flow, ticket):
            raise Refusal(Reason.QUEUE_FULL, "the router's queue is full", wait)
        out = fattest.newest()
        self._refuse(out, Refusal(Reason.QUEUE_FULL, "the router's queue is full", wait), now)
        self._pushed_out.append(out)

    def _fatness(self, flow: Flow[Ticket], plus: Ticket | None = None) -> float:
        """How much waits for its share."""
        rank = plus.rank if plus else self._backlogged[flow]
        cost = flow.cost + (plus.load if plus else 0.0)
        return cost / (flow.weight * self.policy.shared.class_weight(rank))

    def _enqueue(self, ticket: Ticket, now: float) -> None:
        flow, tenant = ticket.flow, ticket.tenant
        if not flow.waiting:
            self._backlogged[flow] = ticket.rank
            self._queued_weight[ticket.rank] += flow.weight
        flow.push(ticket, ticket.load)
        self._queued_load += ticket.load
        tenant.waiting += 1
        self.waiting += 1
        self._pace.waits(now)
        tenant.pace.waits(now)
        heapq.heappush(self._expiries, (ticket.expires, next(self._numbers), ticket))
        if len(self._expiries) > 2 * self.waiting + 64:
            self._expiries = [entry for entry in self._expiries if entry[2].state is State.WAITING]
            heapq.heapify(self._expiries)
        self._offer(ticket.tenant, ticket.rank)

    def _dequeue(self, ticket: Ticket, now: float) -> None:
        flow, tenant = ticket.flow, ticket.tenant
        flow.remove(ticket)
        self._queued_load -= ticket.load
        if not flow.waiting:
            del self._backlogged[flow]
            self._queued_weight[ticket.rank] -= flow.weight
            if self._queued_weight[ticket.rank] < 1e-6:  # less than the least weight: rounding
                self._queued_weight[ticket.rank] = 0.0
        tenant.waiting -= 1
        self.waiting -= 1
        if not self.waiting:
            self._queued_load = 0.0  # what rounding left of it
        if not tenant.waiting:
            tenant.pace.nothing_waits(now)
        if not self.waiting:
            self._pace.nothing_waits(now)

    def _refuse(self, ticket: Ticket, refusal: Refusal, now: float) -> None:
        """Ends a waiting ticket against its client's will."""
        self.end(ticket, now)
        ticket.state = State.REFUSED
        ticket.refusal = refusal

    def _expire(self, now: float) -> list[Ticket]:
        expired = []
        while self.next_expiry() <= now:
            ticket = heapq.heappop(self._expiries)[2]
            wait = self.expected_wait(ticket, now)
            self._refuse(ticket, Refusal(Reason.WAIT_TOO_LONG, "it waited too long", wait), now)
            expired.append(ticket)
        return expired

    # The order ----------------------------------------------------------------------------------

    def _room(self, room: float) -> float:
        bound = self.policy.shared.max_running
        return min(room, bound - self.running) if bound else room

    def _offer(self, tenant: Tenant, rank: PriorityClass) -> None:
        flow = tenant.flows[rank]
        if flow.waiting and tenant.has_room:
            self._orders[rank].offer(flow)
            self._classes.offer(self._class_flows[rank])

    def _offer_all(self, tenant: Tenant) -> None:
        for rank in reversed(PriorityClass):
            self._offer(tenant, rank)

    def _next(self) -> Flow[Ticket] | None:
        """Whose head goes next; None when none may."""
        while (chosen := self._classes.first()) is not None:
            order = self._orders[chosen.head()]
            while (flow := order.first()) is not None:
                if flow.head().tenant.has_room:
                    return flow
                order.withdraw()  # offered again when one of the tenant's ends
            self._classes.withdraw()
        return None

    def _start(self, ticket: Ticket, now: float) -> None:
        tenant, rank, flow = ticket.tenant, ticket.rank, ticket.flow
        order, class_flow = self._orders[rank], self._class_flows[rank]
        load = ticket.cost * tenant.used_part  # by what is known now
        order.charge(flow, load)
        self._classes.charge(class_flow, load)
        if ticket in flow.waiting:
            order.withdraw()
            self._classes.withdraw()
            self._pace.started(ticket.load, now)
            tenant.pace.started(ticket.load, now)
            self._dequeue(ticket, now)
        ticket.state, ticket.started = State.RUNNING, now
        tenant.running += 1
        self.running += 1
        self._offer(tenant, rank)
        if order.first() is not None:
            self._classes.offer(class_flow)

    def _weigh_classes(self) -> None:
        for rank in PriorityClass:
            weight = self.policy.shared.class_weight(rank)
            if rank in self._class_flows:
                self._class_flows[rank].weight = weight
                continue
            self._class_flows[rank] = Flow(weight)
            self._class_flows[rank].push(rank, 0.0)  # for ever: what a class has is in its order

    def _share(self, ticket: Ticket) -> float:
        """The part of all starts that its flow gets while all that waits waits."""
        flow, rank = ticket.flow, ticket.rank
        weight = self.policy.shared.class_weight
        classes = sum(weight(r) for r in PriorityClass if r is rank or self._queued_weight[r] > 0)
        beside = self._queued_weight[rank] + (0.0 if flow.waiting else flow.weight)
        return weight(rank) / classes * flow.weight / beside


def _bucket(old: Bucket | None, per_minute: float, burst: float, now: float) -> Bucket | None:
    if not per_minute:
        return None
    if old is None:
        return Bucket(per_minute / 60, burst, now)
    old.change(per_minute / 60, burst, now)
    return old
