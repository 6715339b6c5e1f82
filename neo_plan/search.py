"""The fewest replicas of each kind of machine that hold the targets, and the cheapest of all.

    kind   fits? -> capacity: N is at least rate / it -> dearer than the best? stop
           -> double N until the targets hold -> halve between the last that did not and the first
              that did

One simulated replica stands for all of them; see `neo_plan.demand`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from neo_client.prices import MachinePrice
from neo_client.workloads import Lengths
from neo_plan.demand import Demand
from neo_plan.node import Node
from neo_plan.trial import Trial, capacity, run

MAX_REPLICAS = 10_000
FULL_SHARE = 0.95
"""Of its capacity that a replica may be asked for. Beyond, its queue grows for ever, which a trial
of a minute would not show."""
CAPACITY_REQUESTS = (120, 600)
"""Least and most of the run that finds the capacity: enough to fill the machine four times."""
ALONE_REQUESTS = 12
"""Of the trial that asks whether an idle machine is quick enough."""
ALONE_SECONDS = 120.0
"""Between two of them."""


@dataclass(frozen=True)
class Goal:
    """What must hold."""

    targets: Mapping[str, float]
    """Milliseconds by name of `neo_plan.trial.TARGETS`."""
    share: float = 0.95
    """Of requests that must meet all of them."""
    requests: int = 300
    """Simulated per trial."""
    zones: int = 1
    """With one of them lost the others hold the targets."""


@dataclass(frozen=True)
class Kind:
    """A machine of the price file, with or without offloading."""

    name: str
    price: MachinePrice
    node: Node

    @property
    def offloads(self) -> bool:
        return self.node.host_blocks > 0

    def is_as_good_as(self, other: Kind) -> bool:
        """Without offloading cores and memory of the host make no difference."""
        if self.offloads or other.offloads:
            return self is other
        return self.node.profile.gpu == other.node.profile.gpu

    @property
    def label(self) -> str:
        return f"{self.name}{' + offload' if self.offloads else ''}"


def with_spares(replicas: int, zones: int) -> int:
    """So many that `replicas` are left, in whole zones of equal size, when one zone is lost."""
    if zones == 1:
        return replicas
    return zones * math.ceil(replicas / (zones - 1))


@dataclass
class Found:
    """What came of one kind."""

    kind: Kind
    zones: int = 1
    replicas: int = 0
    """0: none hold the targets, or it was not worth finding out."""
    trial: Trial | None = None
    """With `replicas`."""
    before: Trial | None = None
    """With the most replicas that did not hold the targets."""
    reason: str = ""
    """Why it is not the answer."""
    least: int = 1
    """Replicas that its capacity asks for."""
    capacity: float = 0.0
    """Requests a second of one replica that is never idle."""
    trials: int = 0

    @property
    def at_least(self) -> float:
        """Price an hour below which it cannot be had."""
        return with_spares(self.least, self.zones) * self.kind.price.per_hour

    @property
    def per_hour(self) -> float:
        return self.total * self.kind.price.per_hour

    @property
    def total(self) -> int:
        """Replicas and spares."""
        return with_spares(self.replicas, self.zones)


@dataclass
class Search:
    """Goes through kinds; `say` hears of each."""

    demand: Demand
    goal: Goal
    say: Callable[[str], None] = field(default=lambda _: None)

    def run(self, kinds: list[Kind]) -> list[Found]:
        """The answer first, then the others by price; those that cannot do it last."""
        found = [self._bound(kind, kinds) for kind in kinds]
        best: Found | None = None
        for each in sorted(found, key=lambda f: f.at_least):
            if each.reason:
                continue
            if best is not None and each.at_least >= best.per_hour:
                each.reason = (
                    f"its capacity alone, {each.capacity:.3g} req/s each, asks for "
                    f"{each.at_least:g} an hour or more"
                )
                continue
            self._fewest(each)
            if each.replicas and (best is None or each.per_hour < best.per_hour):
                best = each
            self.say(f"{each.kind.label}: {each.reason or f'{each.replicas} replicas'}")
        if best is not None:
            self._explain(found, best)
        return sorted(
            found, key=lambda f: (f is not best, not f.replicas, f.per_hour or f.at_least)
        )

    def _bound(self, kind: Kind, kinds: list[Kind]) -> Found:
        """What can be said without a load: whether it fits, and the least it can cost."""
        found = Found(kind, self.goal.zones)
        node = kind.node
        same = [k for k in kinds if k.is_as_good_as(kind)]
        cheapest = min(same, key=lambda k: k.price.per_hour)
        if cheapest.price.per_hour < kind.price.per_hour:
            found.reason = f"as quick as {cheapest.label}, which costs less"
            return found
        if not node.gpu_blocks:
            found.reason = "the model does not fit into its GPU"
            return found
        if node.longest < self.demand.longest:
            found.reason = (
                f"holds requests of {node.longest} tokens, and some have {self.demand.longest}"
            )
            return found
        found.capacity = capacity(node, self._enough(node))
        if not found.capacity:
            found.reason = "cannot serve every request"
            return found
        rate = self.demand.rate * self.demand.scale
        least = max(math.ceil(rate / (FULL_SHARE * found.capacity)), 1)
        found.least = least
        self.say(f"{kind.label}: {found.capacity:.3g} req/s each, {least} or more")
        return found

    def _enough(self, node: Node) -> list[Lengths]:
        least, most = CAPACITY_REQUESTS
        sample = self.demand.sample(least)
        tokens = sum(each.prompt + each.output for each in sample) / len(sample)
        room = (node.gpu_blocks + node.host_blocks) * node.sizes.block_tokens / tokens
        slots = min(room, node.sizes.max_running_requests)
        return self.demand.sample(int(min(max(4 * slots, least), most)))

    def _fewest(self, found: Found) -> None:
        kind = found.kind
        alone = self._alone(kind.node)
        if alone.share < self.goal.share:
            found.reason = f"misses {_miss(alone, self.goal)} on an idle machine"
            return
        low, high = found.least - 1, found.least
        while not self._holds(found, high):
            low, high = high, 2 * high
            if high > MAX_REPLICAS:
                found.reason = f"misses {_miss(found.before, self.goal)} with {low} replicas"
                return
        while high - low > max(1, high // 50):  # a fiftieth more is near enough
            middle = (low + high) // 2
            if self._holds(found, middle):
                high = middle
            else:
                low = middle
        found.replicas = high

    def _holds(self, found: Found, replicas: int) -> bool:
        part = self.demand.part(replicas, self.goal.requests)
        trial = run(found.kind.node, part, self.goal.targets)
        found.trials += 1
        if trial.share < self.goal.share:
            found.before = trial
            return False
        found.trial = trial
        return True

    def _alone(self, node: Node) -> Trial:
        part = self.demand.part(1, ALONE_REQUESTS)
        times = [ALONE_SECONDS * number for number in range(len(part.lengths))]
        return run(node, replace(part, arrivals=times), self.goal.targets)

    def _explain(self, found: list[Found], best: Found) -> None:
        for each in found:
            if each is best or each.reason:
                continue
            more = each.per_hour / best.per_hour - 1 if best.per_hour else 0.0
            why = f"; one less misses {_miss(each.before, self.goal)}" if each.before else ""
            each.reason = f"{more:.0%} dearer{why}" if more else f"as dear as the first{why}"

    def most(self, found: Found) -> tuple[float, Trial]:
        """Requests a second that one replica holds, within 5%, and that trial. `found` has an
        answer."""
        assert found.trial is not None
        rate = self.demand.rate * self.demand.scale / found.replicas
        low, best = rate, found.trial
        high = max(FULL_SHARE * found.capacity, rate)
        for _ in range(6):
            if high / low < 1.05:
                break
            middle = math.sqrt(low * high)
            replicas = self.demand.rate * self.demand.scale / middle
            part = self.demand.part(replicas, self.goal.requests)
            trial = run(found.kind.node, part, self.goal.targets)
            if trial.share >= self.goal.share:
                low, best = middle, trial
            else:
                high = middle
        return low, best


def _miss(trial: Trial | None, goal: Goal) -> str:
    assert trial is not None
    name = trial.missed or "its targets"
    limit = goal.targets.get(name)
    if limit is None:
        return name
    p95 = trial.latencies[name]["p95"]
    return f"{name} {limit:g} ms (p95 {p95:,.0f}, {trial.share:.0%} of requests hold)"
