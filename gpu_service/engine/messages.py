"""What the front end and the engine core tell each other (msgspec over ZeroMQ).

One batch goes each way per iteration.

Times are `time.monotonic()` seconds, which both processes share on one machine.
"""

from __future__ import annotations

import msgspec


class SamplingSpec(msgspec.Struct, frozen=True, kw_only=True):
    """`neo.v1.SamplingParams` with every default filled in and every value checked."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    """Always set: the front end draws one for an unseeded request. Choice i of n uses seed + i."""
    logit_bias: dict[int, float] = {}
    max_tokens: int
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    """Ids that end the request, without the model's own end-of-sequence ids."""
    ignore_eos: bool = False
    n: int = 1
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: str = ""
    """What the output must follow, in llguidance's form; see gpu_service.model.structured."""


class Submit(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A new request; its prompt has been checked against vocabulary and context length."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingSpec
    placement: str = "auto"
    """"auto", "gpu_only" or "cpu_preferred"."""
    priority: int = 0
    ttft_ms: float | None = None
    tpot_ms: float | None = None
    arrival: float
    deadline: float | None = None
    """The client's deadline; past it the engine drops the request."""
    cache_salt: str = ""
    """KV is shared among requests with the same one only."""
    traced: bool = False
    """Its usage is to bring marks."""


class Abort(msgspec.Struct, frozen=True, tag=True):
    """End a request (or, with `index`, one choice of it) without further output for it.

    When `index` was the last live choice, the request's usage still follows. Unknown ids are
    ignored."""

    request_id: str
    index: int | None = None


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Leave the loop once all live requests have ended."""


class ForgetPrefixes(msgspec.Struct, frozen=True, tag=True):
    """Let nobody find KV that was computed before."""


Command = Submit | Abort | ForgetPrefixes | Shutdown


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    token_id: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class ChoiceDelta(msgspec.Struct, frozen=True, array_like=True):
    """New tokens of one choice. `finish` is None, "stop", "length" or "aborted"."""

    request_id: str
    index: int
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    finish: str | None = None
    stop_token_id: int | None = None
    """The id of `stop_token_ids` that ended it; None for end-of-sequence."""


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """A part of a traced request: `prefill` chunk, stretch of `decode`, sampled `sweep`, `move` to
    the other tier."""

    name: str
    start: float
    end: float
    attributes: dict[str, str | float]


class RequestUsage(msgspec.Struct, frozen=True, kw_only=True):
    """Sent when the last choice of a request has ended; see neo.v1.Usage."""

    request_id: str
    completion_tokens: int
    gpu_tokens: int
    host_tokens: int
    demotions: int
    promotions: int
    recomputations: int
    queue_seconds: float
    ttft_seconds: float
    cached_prompt_tokens: int
    cached_host_tokens: int
    prefix_hit_tokens: int
    marks: list[Mark] = []
    """Of a traced request."""


class PromptLogprobs(msgspec.Struct, frozen=True):
    request_id: str
    logprobs: list[TokenLogprob]


class Refusal(msgspec.Struct, frozen=True, kw_only=True):
    """The request ends with an error; nothing else of it follows."""

    request_id: str
    reason: str
    """A reason of neo_common.errors, which fixes the status code."""
    message: str
    retry_after_seconds: float | None = None


class TierLoad(msgspec.Struct, frozen=True):
    total_blocks: int
    free_blocks: int
    running_requests: int
    tokens_total: int
    freed_tokens_per_second: float = 0.0
    token_seconds: float = 0.0
    cached_blocks: int = 0
    """Free ones whose KV can be found."""


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """See neo.v1.LoadSnapshot."""

    host_tier_state: str
    gpu: TierLoad
    host: TierLoad
    waiting_requests: int
    waiting_prompt_tokens: int
    block_tokens: int
    demotions_total: int
    promotions_total: int
    recomputations_total: int
    iterations_total: int
    iteration_seconds: float
    output_tokens_per_second: float
    prompt_tokens_per_second: float = 0.0
    prefix_query_tokens_total: int = 0
    prefix_hit_tokens_total: int = 0
    prefix_host_hit_tokens_total: int = 0


ITERATION_TOKEN_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
"""Upper bounds of the buckets of `EngineCounters.iteration_sizes`, which has one more."""


class Foresight(msgspec.Struct, frozen=True, kw_only=True):
    """What the scheduler predicted, what came of it, and what it has decided for now."""

    predicted_seconds: dict[str, float]
    """Sums since the start: `sweep`, and its parts `gpu`, `cpu`, `link`, which overlap."""
    actual_seconds: float
    """Of the same sweeps."""
    error: float
    """Moving average of |predicted - actual| / the larger, 0 to 1."""
    mode: str
    """That host rows are to run in; "" where a setting says so."""
    tokens_per_second: float
    """What `mode` promises."""
    gpu_only_tokens_per_second: float
    """What the device alone would."""
    why: str = ""
    """In words."""
    host_rows: float = 0.0
    """A sweep; in deferred mode those that start in it."""
    streamed_rows: float = 0.0
    resident_tokens: int = 0
    """KV that the host tier is to hold for that."""
    host_busy_seconds: float = 0.0
    """The cpu_service's attention was at work, as it told last."""


class EngineCounters(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine core has done since it started; only ever grows. Modes are `gpu_only` (the
    host tier has no part) and those of gpu_service.scheduling.plan."""

    iterations: dict[str, int]
    """By mode."""
    seconds: dict[str, float]
    """By mode: what the iterations took."""
    prefill_tokens: dict[str, int]
    """Prompt tokens computed, by the tier that their KV went to."""
    decode_rows: dict[str, int]
    """`gpu`; `host`: attended by the cpu_service; `streamed`: on the host tier, attended by the
    device."""
    moved_tokens: dict[str, int]
    """KV copied by `demote`, by `promote`, and by `reuse`: what requests that start on one tier
    have found on the other."""
    moved_blocks: dict[str, int]
    recomputed_tokens: int
    """Whose KV was thrown away and had to be computed again."""
    void_rows: int
    """Rows that were repeated, since the host tier stalled or memory ran out."""
    host_wait_seconds: float
    """The engine waited for the host tier."""
    device_wait_seconds: float
    """The engine waited for the device."""
    device_busy_seconds: float
    """As the device timed it; else what iterations took, without waits for the host tier."""
    iteration_sizes: list[int]
    """Iterations by their rows in the dense layers."""
    iteration_tokens: int
    """Sum of these rows."""
    foresight: Foresight | None = None
    """None where nothing is predicted."""


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """The core has loaded its model and can take requests."""

    max_context_tokens: int
    gpu_blocks: int
    host_blocks: int
    block_tokens: int
    device: str
    """"cpu" or "cuda"."""
    device_name: str
    dtype: str
    """Of weights and activations, such as "bfloat16"."""
    offload_transport: str
    """"" without a host tier."""
    gpu_block_bytes: int
    host_block_bytes: int
    """0 without a host tier."""


class Progress(msgspec.Struct, frozen=True, tag=True):
    """A long step of the start goes on, such as reading weights. Sent before Ready, a few times a
    second at most."""

    stage: str
    """What is being done, in words."""
    done_bytes: int
    total_bytes: int
    """0 while unknown."""


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The core cannot start or go on; `message` is one sentence that says what to do."""

    message: str


class Output(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Everything that one iteration has to say.

    Order within a request: prompt logprobs, deltas, usage."""

    deltas: list[ChoiceDelta] = []
    prompt_logprobs: list[PromptLogprobs] = []
    usages: list[RequestUsage] = []
    refusals: list[Refusal] = []
    load: Load | None = None
    counters: EngineCounters | None = None
    """A few times a second at most."""


Event = Ready | Progress | Failed | Output
