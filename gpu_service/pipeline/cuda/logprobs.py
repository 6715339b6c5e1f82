"""Log probabilities from the device, read when their sweep is done."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gpu_service.engine.messages import TokenLogprob
from kernels.gpu.sampling import Logprobs


@dataclass(frozen=True)
class LandingLogprobs:
    """Those of some rows, on their way to the host."""

    keys: Sequence[int]
    """The choices that the rows belong to."""
    tops: Sequence[int]
    """How many best tokens each row lists; -1: it did not ask."""
    found: Logprobs
    """In pinned memory."""

    @classmethod
    def send(cls, keys: Sequence[int], tops: Sequence[int], found: Logprobs) -> LandingLogprobs:
        """Copy `found`, on the device, without waiting for it."""
        logprob, rank, ids, values = (
            tensor.to("cpu", non_blocking=True, copy=True)
            for tensor in (found.logprob, found.rank, found.top_ids, found.top_logprobs)
        )
        return cls(keys, tops, Logprobs(logprob, rank, ids, values))

    def read(self, tokens: Sequence[int]) -> Iterator[tuple[int, TokenLogprob]]:
        """Choices and what became of their rows, whose tokens are given; nothing of rows that did
        not ask, or have no token (-1). Only once the sweep is done."""
        found = self.found
        rows = zip(
            self.keys,
            self.tops,
            tokens,
            found.logprob.tolist(),
            found.rank.tolist(),
            found.top_ids.tolist(),
            found.top_logprobs.tolist(),
            strict=True,
        )
        for key, top, token, logprob, rank, ids, values in rows:
            if top >= 0 and token >= 0:
                listed = list(zip(ids[:top], values[:top], strict=True))
                yield key, TokenLogprob(token, logprob, rank, listed)


@dataclass
class SweepLogprobs:
    """What rows of a sweep asked for, as far as it is there."""

    known: dict[int, TokenLogprob | None] = field(default_factory=dict)
    """Of rows that were waited for."""
    landing: LandingLogprobs | None = None
    """Of rows drawn on the device."""
    prompts: list[tuple[Sequence[int], LandingLogprobs]] = field(default_factory=list)
    """Of prompt tokens."""

    def of_tokens(self, tokens: Mapping[int, int]) -> dict[int, TokenLogprob | None]:
        """By choice, whose tokens are given. Only once the sweep is done."""
        found = dict(self.known)
        if self.landing is not None:
            found.update(self.landing.read([tokens[key] for key in self.landing.keys]))
        return found

    def of_prompts(self) -> dict[int, list[TokenLogprob]]:
        """By choice. Only once the sweep is done."""
        found: dict[int, list[TokenLogprob]] = {}
        for targets, landing in self.prompts:
            for key, logprob in landing.read(targets):
                found.setdefault(key, []).append(logprob)
        return found
