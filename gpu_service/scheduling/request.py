"""Requests and their choices, as the scheduler sees them."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from gpu_service.engine.messages import Submit
from gpu_service.kv.keys import BlockKeys, Key
from gpu_service.kv.table import BlockTable
from gpu_service.model.sampling_limits import draws_on_device
from gpu_service.scheduling.plan import PENDING_TOKEN, Flight, Tier


class ChoiceState(enum.Enum):
    """
    HELD ---------> WAITING <--------> RUNNING ---> FINISHED
    n > 1: until    in the queue,      holds        from every state, by abort,
    the prompt is   holds no blocks    blocks on    deadline or error
    computed                           one tier
    """

    HELD = "held"
    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


class Choice:
    """One of a request's n continuations: the unit that is scheduled.

    Its tokens are the prompt's and then `output`; KV of the first `computed` of them is in `table`
    on `tier`. Between iterations a decoding choice has `computed == length - 1`: the last token has
    been drawn but has not been through the model.

    `schedule` may run ahead of results: `pending` tokens have been drawn by sweeps that were
    launched, and count in `length`, but nobody knows them yet.
    """

    __slots__ = (
        "__weakref__",
        "_block_keys",
        "computed",
        "confirmed",
        "discarded",
        "flight",
        "forgotten",
        "index",
        "key",
        "last_planned",
        "lossy",
        "moved",
        "order",
        "output",
        "pending",
        "published",
        "request",
        "state",
        "table",
        "tier",
    )

    def __init__(self, request: Request, index: int, key: int) -> None:
        self.request = request
        self.index = index
        self.key = key
        """Unique over the life of the engine core; plans name choices by it."""
        self.output: list[int] = []
        self.computed = 0
        self.confirmed = 0
        """Of these, as many as results have come of."""
        self.discarded = 0
        """Of these, as many as it had when it was preempted last, until it starts again."""
        self.published = 0
        """Full blocks of its table that can be found by their contents."""
        self.moved = 0
        """Number of the plan that copies its KV to where it is now."""
        self.lossy = False
        """Its KV has been on a host tier that keeps it in fewer bits."""
        self._block_keys: BlockKeys | None = None
        self.state = ChoiceState.HELD if index else ChoiceState.WAITING
        self.tier: Tier | None = None
        """None unless RUNNING."""
        self.table = BlockTable()
        self.order = (-request.submit.priority, request.submit.arrival, key)
        """Smaller goes first: priority, then first come, first served."""
        self.pending = 0
        """Tokens drawn by sweeps whose results have not come yet."""
        self.forgotten = 0
        """Results of sweeps up to this number do not count: its KV was thrown away after them."""
        self.flight: Flight | None = None
        """Deferred mode: its newest token is on its way through the layers, and pending. It stays
        where it is until that has come."""
        self.last_planned = 0
        """Number of the last iteration that took this choice along."""

    @property
    def length(self) -> int:
        return len(self.request.prompt) + len(self.output) + self.pending

    @property
    def final_length(self) -> int:
        """Tokens when it ends by length, the last one (which is never computed) included."""
        return len(self.request.prompt) + self.request.max_tokens

    @property
    def is_decoding(self) -> bool:
        return self.computed == self.length - 1

    @property
    def is_ending(self) -> bool:
        """The last token it may have is pending."""
        return len(self.output) + self.pending >= self.request.max_tokens

    def token_ids(self, start: int, end: int) -> tuple[int, ...]:
        prompt = self.request.prompt
        split = len(prompt)
        if end <= split:
            return tuple(prompt[start:end])
        return (*prompt[start:split], *self.output[max(0, start - split) : end - split])

    def block_keys(self, blocks: int) -> list[Key]:
        """Names of the contents of its first `blocks` blocks, whose tokens are known."""
        if self._block_keys is None:
            self._block_keys = self.request.prompt_keys().copy()
        return self._block_keys.of(self.token_ids, blocks)

    def last_token_id(self) -> int:
        if self.pending:
            return PENDING_TOKEN
        return self.output[-1] if self.output else self.request.prompt[-1]

    def length_after(self, tokens: int) -> int:
        """Known tokens that need a place after `tokens` more, or at its end if that is nearer.

        The final token is sampled but never computed, so it needs none."""
        return min(self.length + tokens, max(self.length, self.final_length - 1))

    def accept(self, token_id: int, eos_token_ids: frozenset[int]) -> tuple[str | None, int | None]:
        """Append a sampled token; returns (finish, stop_token_id) as in `ChoiceDelta`."""
        sampling = self.request.submit.sampling
        self.output.append(token_id)
        self.pending -= 1
        if len(self.output) >= sampling.min_tokens:
            if token_id in self.request.stop_token_ids:
                return "stop", token_id
            if token_id in eos_token_ids and not sampling.ignore_eos:
                return "stop", None
        if len(self.output) >= self.request.max_tokens:
            return "length", None
        return None, None


class Request:
    """A client's request: its choices, and what will be told about it at the end."""

    def __init__(
        self,
        submit: Submit,
        tiers: tuple[Tier, ...],
        max_context_tokens: int,
        first_key: int,
        keys: BlockKeys | None = None,
    ) -> None:
        """`keys`: for the contents of its blocks, of none yet; None if nobody looks for them."""
        self.submit = submit
        self.tiers = tiers
        """Where it may be, the preferred tier first. Settled once, so that what was admitted stays
        possible."""
        self.prompt = submit.prompt_token_ids
        room = max_context_tokens - len(self.prompt)
        self.max_tokens = min(submit.sampling.max_tokens, room)
        self.stop_token_ids = frozenset(submit.sampling.stop_token_ids)
        self.choices = [Choice(self, i, first_key + i) for i in range(submit.sampling.n)]
        self.first_planned: float | None = None
        self.first_token: float | None = None
        self.tokens = dict.fromkeys(Tier, 0)
        """Tokens sampled, by the tier whose attention they came from."""
        self.migrations = dict.fromkeys(Tier, 0)
        """Moves, by the tier they went to."""
        self.recomputations = 0
        self.cached_prompt_tokens = 0
        """Prompt tokens whose KV was there already, over all choices;"""
        self.cached_host_tokens = 0
        """of these, on the host tier."""
        self.prefix_hit_tokens = 0
        """Prompt tokens whose KV was there when its first choice started."""
        self._keys = keys
        self.follows_output = not draws_on_device(submit.sampling)
        """Its next draw needs to know its output on the host."""
        self.wants_prompt_logprobs = submit.sampling.prompt_logprobs is not None
        """Turns False once they have been told."""

    def prompt_keys(self) -> BlockKeys:
        """With those of the prompt's full blocks, which its choices share."""
        assert self._keys is not None
        blocks = len(self.prompt) // self._keys.block_tokens
        self._keys.of(lambda start, end: self.prompt[start:end], blocks)
        return self._keys

    @property
    def request_id(self) -> str:
        return self.submit.request_id

    @property
    def is_finished(self) -> bool:
        return all(choice.state is ChoiceState.FINISHED for choice in self.choices)


@dataclass
class PrefixTokens:
    """Since the engine started; of choices as they started for the first time."""

    queried: int = 0
    """Prompt tokens that were looked up,"""
    found: int = 0
    """whose KV was there,"""
    found_on_host: int = 0
    """and on the host tier."""
