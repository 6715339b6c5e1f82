"""What bounds the scheduler's decisions."""

from __future__ import annotations

from dataclasses import dataclass

OFFLOAD_POLICIES = ("never", "auto", "always")


@dataclass(frozen=True)
class SchedulerLimits:
    """Sizes and policies, fixed for the life of the engine core."""

    gpu_blocks: int
    host_blocks: int
    """0 without a host tier; then everything is planned as with `offload="never"`."""
    block_tokens: int
    max_context_tokens: int
    """Longest prompt plus output of one choice."""
    max_batch_tokens: int = 512
    """Tokens of one iteration."""
    max_running: int = 256
    """Choices that hold blocks at the same time."""
    max_waiting_requests: int = 1024
    """Requests that may wait for their first iteration."""
    offload: str = "auto"
    """"never", "auto" or "always"."""
    eos_token_ids: frozenset[int] = frozenset()
    lease_seconds: float = 30.0
    """How long choices whose KV is on a host tier that went away wait for it."""
    cohorts: int = 0
    """Sweeps that a host row takes in deferred mode; 0: it takes one, and deferred mode is off."""
    cohort_rows: int = 0
    """Host rows that may start in one sweep; 0: any number."""
    asymmetric: bool = False
    """Host decode rows may be split over two sub-batches, which take turns with the device; without
    `auto` they are."""
    inline: bool = True
    """Host rows may be waited for in every layer (`auto`)."""
    auto: bool = False
    """How host rows run, how many of them, and whether any do is decided by predicted throughput.
    Else it follows from `cohorts` and `asymmetric`, and `streamed_blocks` are always used."""
    streamed_blocks: int = 0
    """Most host blocks that one sweep reads over the link, for rows that attend on the device: so
    many has the device's staging room for. 0: none do."""
    host_prefill: bool = True
    """Prompts may be computed for the host tier. Else every choice starts on the GPU tier, and is
    demoted once it decodes."""
    staged_prompts: bool = False
    """Prompts for the host tier go through the device's staging, and count in `streamed_blocks`."""
    captured_rows: int = 0
    """Deferred: padded rows of the largest sweep that is one launch, if larger ones are not to have
    prompts while the host tier has choices: with its exchange they are launched kernel by kernel,
    which takes longer than the device does. 0: any."""
    captured_chunks: int = 0
    """Most prompts in those sweeps; 0: any."""
    copies_beside: bool = False
    """The device copies KV of choices that have no row in a sweep beside it."""
    prefix_caching: bool = False
    """KV of complete blocks stays to be found by whoever has the same tokens before it."""
    host_lossy: bool = False
    """The host tier keeps KV in fewer bits than the GPU tier."""
    force_migration_every: int = 0
    """Testing aid: every that many iterations some choice changes its tier; 0 means never."""

    @property
    def running_bound(self) -> int:
        """Choices that may hold blocks at once: with no more of them than tokens in an iteration,
        those that prefill always find a token left beside those that decode."""
        return min(self.max_running, self.max_batch_tokens)

    def validate(self) -> None:
        if self.offload not in OFFLOAD_POLICIES:
            raise ValueError(
                f"offload must be one of {', '.join(OFFLOAD_POLICIES)}, not {self.offload}"
            )
        for name in (
            "gpu_blocks",
            "host_blocks",
            "lease_seconds",
            "force_migration_every",
            "cohorts",
            "cohort_rows",
            "streamed_blocks",
            "captured_rows",
            "captured_chunks",
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        for name in ("block_tokens", "max_batch_tokens", "max_running", "max_context_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.max_waiting_requests < 0:
            raise ValueError("max_waiting_requests must not be negative")
        if self.gpu_blocks + self.host_blocks == 0:
            raise ValueError("there are no KV blocks on either tier")
