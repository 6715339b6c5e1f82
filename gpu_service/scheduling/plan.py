"""Where scheduling and execution meet: what one iteration is to do, and what came of it.

One iteration is a sweep of one or two sub-batches over all layers. Dense layers see the rows of a
sub-batch in this order:

    | prefill chunks (either tier) ... | GPU decode ... | streamed ... | host decode ... |

Host rows come last, so that the rows before them can go on when their results are not there yet.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from gpu_service.engine.messages import TokenLogprob


class Tier(enum.Enum):
    """Where a choice's KV lives, and so where its decode attention runs."""

    GPU = "gpu"
    HOST = "host"

    @property
    def other(self) -> Tier:
        return Tier.HOST if self is Tier.GPU else Tier.GPU


class Mode(enum.Enum):
    """How a sweep is laid out in time; one pipeline module for each.

    INLINE: one sub-batch; every layer waits for its own host rows (none of them: a plain GPU-only
    sweep).
    ASYMMETRIC: two sub-batches, the second of host rows alone; while one is in the dense layers,
    the host attends for the other.
    DEFERRED: one sub-batch; host rows go on by one layer a sweep, and their attention has until the
    next one. The plan's host rows are those that start."""

    INLINE = "inline"
    ASYMMETRIC = "asymmetric"
    DEFERRED = "deferred"


PENDING_TOKEN = -1
"""Stands for a token that has been drawn on the device and not been heard of yet."""


class Flight(NamedTuple):
    """A host row on its way through the layers, in deferred mode."""

    key: int
    """The choice."""
    started: int
    """Number of the plan that it started with: a choice may start anew while an earlier row of it,
    whose result nobody wants any more, is still under way."""


@dataclass(frozen=True, slots=True)
class Migration:
    """Copy one choice's KV to the other tier, before the sweep starts or beside it.

    Migrations run in the plan's order: blocks that one of them gives up may be the target of a
    later one.
    """

    key: int
    """The choice."""
    target: Tier
    tokens: int
    """Tokens to copy; 0 when nothing had been computed yet."""
    source_blocks: npt.NDArray[np.int32]
    """`[ceil(tokens / block_tokens)]` on the tier it leaves."""
    target_blocks: npt.NDArray[np.int32]
    """As many blocks on `target`."""
    reuse: bool = False
    """What a choice that starts has found on the other tier, and stays there: no move of its."""
    beside: bool = False
    """The plan has no row of the choice and gives its blocks to nobody: all that has to wait for
    the copy is the next sweep."""


@dataclass(frozen=True, slots=True)
class DecodeRow:
    """Compute the last known token of a choice, and sample the next one."""

    key: int
    token_id: int
    """`PENDING_TOKEN` if the sweep before this one draws it and its result is not known yet."""
    length: int
    """Tokens attended, this one included; its position is `length - 1`."""
    blocks: npt.NDArray[np.int32]
    """The choice's whole table on its tier; at least ceil(length / block_tokens) entries."""


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """Compute a chunk of known tokens of a choice."""

    key: int
    tier: Tier
    """Where the chunk's KV goes, and where that of earlier chunks is."""
    start: int
    """Position of the chunk's first token; KV of all earlier ones is in `blocks`."""
    token_ids: tuple[int, ...]
    """Not empty."""
    blocks: npt.NDArray[np.int32]
    """The choice's whole table on `tier`."""
    samples: bool
    """The chunk ends with the last known token: sample the next one."""
    logprob_targets: tuple[int, ...] = ()
    """With prompt logprobs: the tokens that follow the chunk's first tokens, one after the other;
    else empty."""


@dataclass(frozen=True, slots=True)
class SubBatch:
    """The rows of one lane. At least one of the four is not empty."""

    prefill: tuple[PrefillRow, ...] = ()
    gpu_decode: tuple[DecodeRow, ...] = ()
    host_decode: tuple[DecodeRow, ...] = ()
    streamed: tuple[DecodeRow, ...] = ()
    """Rows whose KV is in the host pool and stays there, but that attend on the device: their
    blocks are read over the link, one layer ahead. ASYMMETRIC: of the first sub-batch alone."""

    @property
    def tokens(self) -> int:
        """Rows of the dense layers."""
        chunks = sum(len(row.token_ids) for row in self.prefill)
        return chunks + len(self.gpu_decode) + len(self.streamed) + len(self.host_decode)

    @property
    def sampled_keys(self) -> Iterator[int]:
        """Choices that get a token if all goes well, in the order of their rows."""
        yield from (row.key for row in self.prefill if row.samples)
        yield from (row.key for row in self.gpu_decode)
        yield from (row.key for row in self.streamed)
        yield from (row.key for row in self.host_decode)


@dataclass(frozen=True, slots=True)
class IterationPlan:
    """One iteration. Empty (no batches) when nothing can run; migrations may still be there."""

    number: int
    """Counts up from 1."""
    mode: Mode
    migrations: tuple[Migration, ...]
    batches: tuple[SubBatch, ...]
    """Lane i of the host tier serves `batches[i]`. ASYMMETRIC has two, others at most one."""

    @property
    def is_empty(self) -> bool:
        """A deferred sweep without rows of its own moves those on that are under way."""
        return not self.migrations and not self.batches and self.mode is not Mode.DEFERRED

    @property
    def copies_beside(self) -> bool:
        """No migration is waited for before the sweep."""
        return all(migration.beside for migration in self.migrations)


@dataclass(frozen=True, slots=True)
class SampledToken:
    token_id: int
    logprob: TokenLogprob | None = None
    """Set if the request asked for logprobs."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request has to end with an error."""

    reason: str
    """A reason of neo_common.errors."""
    message: str


@dataclass(frozen=True, slots=True)
class SweepResult:
    """What became of a plan. A row that is in none of `void`, `lost` and `failed` did all it was
    asked to do."""

    tokens: Mapping[int, SampledToken] = field(default_factory=dict)
    """Choice -> its next token."""
    void: frozenset[int] = frozenset()
    """Choices whose rows do not count and are to be repeated (the host tier stalled, memory ran
    out)."""
    lost: frozenset[int] = frozenset()
    """Choices whose migration failed half-way: their KV is gone."""
    failed: Mapping[int, Failure] = field(default_factory=dict)
    """Choices whose request ends."""
    landed: tuple[Flight, ...] = ()
    """Deferred mode: rows of this plan or of earlier ones that are under way no more. Those without
    a token or a failure have come to nothing, and are to be repeated."""
    prompt_logprobs: Mapping[int, list[TokenLogprob]] = field(default_factory=dict)
    """Choice -> one for each of the row's `logprob_targets`."""
    device_seconds: float = 0.0
    """The device's time for the sweep, where it is known."""
    waited_seconds: float = 0.0
    """How long the engine's thread waited for the device."""
    host_wait_seconds: float = 0.0
    """How long it waited for the host tier; on a device that waits itself, 0."""
