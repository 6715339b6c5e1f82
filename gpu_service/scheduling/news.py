"""What the front end has to be told, collected between two sends."""

from __future__ import annotations

from dataclasses import dataclass, field

from gpu_service.engine.messages import (
    ChoiceDelta,
    PromptLogprobs,
    Refusal,
    RequestUsage,
    TokenLogprob,
)
from gpu_service.scheduling.plan import Failure, SampledToken, Tier
from gpu_service.scheduling.request import Choice, Request


@dataclass
class News:
    """Bounded by the live requests: one delta per choice and iteration, and one end per request."""

    deltas: list[ChoiceDelta] = field(default_factory=list)
    prompt_logprobs: list[PromptLogprobs] = field(default_factory=list)
    usages: list[RequestUsage] = field(default_factory=list)
    refusals: list[Refusal] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.deltas or self.prompt_logprobs or self.usages or self.refusals)

    def token(
        self, choice: Choice, token: SampledToken, finish: str | None, stop_token_id: int | None
    ) -> None:
        wanted = choice.request.submit.sampling.logprobs is not None
        self.deltas.append(
            ChoiceDelta(
                request_id=choice.request.request_id,
                index=choice.index,
                token_ids=[token.token_id],
                logprobs=[token.logprob] if wanted and token.logprob is not None else None,
                finish=finish,
                stop_token_id=stop_token_id,
            )
        )

    def prompt(self, request: Request, logprobs: list[TokenLogprob]) -> None:
        self.prompt_logprobs.append(PromptLogprobs(request.request_id, logprobs))

    def refuse(self, request_id: str, failure: Failure, retry_after: float | None = None) -> None:
        self.refusals.append(
            Refusal(
                request_id=request_id,
                reason=failure.reason,
                message=failure.message,
                retry_after_seconds=retry_after,
            )
        )

    def usage(self, request: Request, now: float) -> None:
        arrival = request.submit.arrival
        # Without a token the request has spent all its life in the queue or in its prefill.
        planned = now if request.first_planned is None else request.first_planned
        first_token = now if request.first_token is None else request.first_token
        self.usages.append(
            RequestUsage(
                request_id=request.request_id,
                completion_tokens=sum(request.tokens.values()),
                gpu_tokens=request.tokens[Tier.GPU],
                host_tokens=request.tokens[Tier.HOST],
                demotions=request.migrations[Tier.HOST],
                promotions=request.migrations[Tier.GPU],
                recomputations=request.recomputations,
                queue_seconds=planned - arrival,
                ttft_seconds=first_token - arrival,
                cached_prompt_tokens=request.cached_prompt_tokens,
                cached_host_tokens=request.cached_host_tokens,
                prefix_hit_tokens=request.prefix_hit_tokens,
            )
        )
