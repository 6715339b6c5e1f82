"""Least predicted wait, over everything that a request may have to wait for:

    the queue's prompts    prompt tokens ahead / prompt tokens per second
    KV of the GPU tier     KV that those ahead and this one lack / KV given back per second
    KV of the host tier    the same there, and a token of the tier: what the CPU still has to attend

A request waits for the prompts ahead *and* for KV on one of the tiers, so the longer of the two
counts, and of the tiers the one with less. What happened since the snapshot is known in part: calls
of this router that are younger count as ahead, and the backend has worked on for as long as the
snapshot is old.
"""

from __future__ import annotations

from collections.abc import Sequence

from router.calls import OwnCalls
from router.policies.pressure import UNKNOWN_REQUEST_TOKENS, pressure
from router.views import BackendView, CallView, LoadView, TierView

UNKNOWN_PROMPT_RATE = 10_000.0
"""Tokens per second, of a backend that has computed no prompt yet."""
UNKNOWN_RELEASE_SECONDS = 10.0
"""In which a full pool is given back, where nobody has ended yet."""
UNKNOWN_TOKEN_SECONDS = 0.1
ALIKE_SECONDS = 0.01
"""Predictions that differ by less are alike: they are not better than that."""
FOREVER_SECONDS = 1e6
OWN_SHARE = 0.3
"""Of the time that a backend takes for a call's own prompt: what it costs those behind it. 0 would
give long prompts to slow backends that happen to be idle; see docs/perf-log.md."""
GROWTH = 1.2
"""KV that a request takes for each token of its prompt, output included, where that is more than
the mean."""
MARGIN = 0.5
"""Of a mean request: room to spare."""


def least_wait(backends: Sequence[BackendView], call: CallView) -> BackendView:
    """Where this is alike (nobody waits where there is room), the least KV pressure."""

    def cost(backend: BackendView) -> tuple[int, float, int]:
        tokens = call.prompt_tokens or UNKNOWN_REQUEST_TOKENS
        later = OWN_SHARE * tokens / _prompt_rate(backend)
        seconds = min(predicted_wait(backend, call) + later, FOREVER_SECONDS)
        return round(seconds / ALIKE_SECONDS), pressure(backend), backend.own.open

    return min(backends, key=cost)


def predicted_wait(backend: BackendView, call: CallView) -> float:
    """Seconds from now until the backend would start the call."""
    load = backend.load
    if load is None:
        return float(backend.own.open)
    own, age = backend.own, backend.age_seconds
    kv = _kv_wait(load, own, age, call.prompt_tokens)
    rate = _prompt_rate(backend)
    # Of those that the snapshot knows ours are still ahead if they have not begun to answer; what
    # the backend was busy with then counts, too. Others' were worked off meanwhile, if any.
    ours = min(own.waiting_tokens, load.waiting_prompt_tokens + mean_tokens(load))
    others = max(0.0, load.waiting_prompt_tokens - own.waited_tokens - age * rate)
    under_way = 0.0 if kv else min(own.oldest_tokens, own.oldest_seconds * rate)
    prompts = max(0.0, own.unseen_waiting_tokens + ours + others - under_way)
    return max(prompts / rate, kv)


def _kv_wait(load: LoadView, own: OwnCalls, age: float, prompt_tokens: int) -> float:
    """Seconds until there is KV for what was not running at the snapshot, and for one call more."""
    mean = mean_tokens(load)
    before = load.waiting_requests + own.unseen
    prompts = load.waiting_prompt_tokens + own.unseen_waiting_tokens
    # The call must find room for certain: others' ends are not known, nor how long it will be.
    mine = max(mean, GROWTH * prompt_tokens) + MARGIN * mean
    wanted = max(before * mean, GROWTH * prompts) + mine
    return min(
        _lacking(load.gpu, wanted, age, 0.0),
        _lacking(load.host, wanted, age, load.host.token_seconds or UNKNOWN_TOKEN_SECONDS),
    )


def _prompt_rate(backend: BackendView) -> float:
    known = backend.load.prompt_tokens_per_second if backend.load is not None else 0.0
    return known or UNKNOWN_PROMPT_RATE


def mean_tokens(load: LoadView) -> float:
    """KV of a request, as far as those that run tell."""
    if load.running_requests:
        return load.used_tokens / load.running_requests
    return UNKNOWN_REQUEST_TOKENS


def _lacking(tier: TierView, wanted: float, age: float, backlog_seconds: float) -> float:
    """Seconds until that much KV is free; for ever where there is no such tier."""
    if not tier.total_tokens:
        return float("inf")
    lacking = wanted - tier.free_tokens
    if lacking <= 0:
        return backlog_seconds
    rate = tier.freed_tokens_per_second or tier.total_tokens / UNKNOWN_RELEASE_SECONDS
    return max(0.0, lacking / rate - age) + backlog_seconds
