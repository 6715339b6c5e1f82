"""What a CUDA device's own sampler can do. Free of torch, for the scheduler asks, too."""

from __future__ import annotations

from gpu_service.engine.messages import SamplingSpec

MOST_EDITS = 2048
"""Tokens of one row with a bias, or muted until `min_tokens`, beside the model's own end tokens."""
MOST_LISTED = 20
"""Best tokens listed beside a token's log probability."""


def draws_on_device(spec: SamplingSpec) -> bool:
    """Whether the device draws for it, and the next sweep need not wait for this one's tokens;
    otherwise `gpu_service.model.sampling` draws, from the output that the host has heard of."""
    listed = max(spec.logprobs or 0, spec.prompt_logprobs or 0)
    if spec.grammar:  # what may come next follows from what came
        return False
    return len(spec.logit_bias) + len(spec.stop_token_ids) <= MOST_EDITS and listed <= MOST_LISTED
