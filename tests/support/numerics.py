"""The numerical contract in 16 bits: how far an engine may be from fp32, and which tokens it must
choose."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gpu_service.engine.messages import TokenLogprob
from tests.support.models import reference_logits


def check_teacher_forced(
    exact_model: Any,
    rounded_model: Any,
    prompts: Sequence[list[int]],
    outputs: Sequence[list[int]],
    logprobs: Sequence[list[TokenLogprob]],
) -> None:
    """Force the oracles along what the engine said, greedily, and compare at each position.

    The bound calibrates itself: against the fp32 oracle we may be at most twice as wrong as
    `transformers` in the same 16-bit type is. Where fp32's best token leads by more than that
    type's usual error, the engine must have chosen it.
    """
    ours, theirs, clear_total = [], [], 0
    for prompt, output, listed in zip(prompts, outputs, logprobs, strict=True):
        first = len(prompt) - 1
        exact = reference_logits(exact_model, prompt + output)[first:-1].log_softmax(-1)
        rounded = reference_logits(rounded_model, prompt + output)[first:-1].log_softmax(-1)
        said = torch.tensor(output)[:, None]
        mine = torch.tensor([entry.logprob for entry in listed])
        ours.append((mine - exact.gather(1, said)[:, 0]).abs())
        theirs.append((rounded - exact).abs())
        best = exact.topk(2, dim=-1).values
        clear = best[:, 0] - best[:, 1] > 2 * theirs[-1].amax(dim=-1).mean()
        clear_total += int(clear.sum())
        assert torch.equal(said[:, 0][clear], exact.argmax(-1)[clear]), "a clear choice was missed"
    our_error, their_error = torch.cat(ours), torch.cat(theirs)
    assert clear_total, "no position with a clear choice: the check says nothing"
    assert our_error.max() <= 2 * their_error.max(), (our_error.max(), their_error.max())
    assert our_error.mean() <= 2 * their_error.mean() + 1e-3, (our_error.mean(), their_error.mean())
