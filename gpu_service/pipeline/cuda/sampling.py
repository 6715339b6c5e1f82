"""The draws of a CUDA sweep's rows that want more than the largest logit: on the device, behind the
sweep, without waiting for it."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import NamedTuple

import torch

from gpu_service.model.adjust import SamplingRow, is_penalised
from gpu_service.model.sampling_limits import MOST_EDITS
from gpu_service.pipeline.cuda.history import HistorySlots
from gpu_service.pipeline.cuda.logprobs import LandingLogprobs
from gpu_service.pipeline.results import PROMPT_LOGPROB_ROWS
from kernels.gpu.sampling import Sampler
from kernels.gpu.sampling_inputs import NEVER, History, RowWish, SamplingInputs


class Draw(NamedTuple):
    """A row whose next token is drawn."""

    key: int
    """The choice."""
    row: SamplingRow
    position: int
    """Which token of the output it is, from 0. The host may not know the one before it yet."""
    place: int
    """Its row of the sweep's logits."""

    @property
    def is_greedy(self) -> bool:
        """The largest logit is what it wants, and nothing else."""
        spec = self.row.spec
        return (
            spec.temperature == 0
            and spec.logprobs is None
            and not is_penalised(spec)
            and not spec.logit_bias
            and not spec.grammar
            and self.position >= spec.min_tokens
        )


def row_wish(draw: Draw, slot: int, eos_token_ids: Sequence[int]) -> RowWish:
    """What the device's sampler is told of a row. `slot`: of the history; -1 without penalties."""
    spec = draw.row.spec
    edits = spec.logit_bias
    if draw.position < spec.min_tokens:
        edits = {**edits, **dict.fromkeys((*eos_token_ids, *spec.stop_token_ids), NEVER)}
    return RowWish(
        temperature=spec.temperature,
        top_k=spec.top_k,
        top_p=spec.top_p,
        min_p=spec.min_p,
        seed=spec.seed + draw.row.choice_index,
        position=draw.position,
        edits=edits,
        history=slot,
        repetition=spec.repetition_penalty,
        frequency=spec.frequency_penalty,
        presence=spec.presence_penalty,
        logprobs=-1 if spec.logprobs is None else spec.logprobs,
    )


class DeviceDraws:
    """Owns the history of choices with penalties (2 bytes a row and token of the vocabulary), and
    what the sampler is told; the sampler itself is the sweep's."""

    def __init__(
        self, sampler: Sampler, eos_token_ids: Sequence[int], device: torch.device
    ) -> None:
        rows = sampler.draws
        self._sampler = sampler
        self._eos = tuple(eos_token_ids)
        self._device = device
        self._inputs = SamplingInputs(rows, rows * (MOST_EDITS + len(self._eos)), device)
        self._history = History(rows, sampler.vocabulary, device)
        self._slots = HistorySlots(rows)

    def warm_up(self, logits: torch.Tensor, drawn: torch.Tensor, fp32: torch.Tensor) -> None:
        """Compile everything, for logits of a sweep, and for fp32 ones of a prompt."""
        self._inputs.send([RowWish(temperature=1.0, logprobs=1)])
        self._sampler.sample(logits, self._inputs, drawn, self._history)
        self._sampler.logprobs(logits, drawn, self._inputs.tops[:1], self._inputs.places[:1])
        self.prompt_logprobs(0, fp32, [0] * len(fp32), 1)

    def draw(
        self,
        draws: Sequence[Draw],
        logits: torch.Tensor,
        drawn: torch.Tensor,
        running: Container[int],
    ) -> LandingLogprobs | None:
        """Put the draws' tokens at their places of `drawn` (int64 `[rows]`; -1 where logits are not
        finite), from `logits` `[rows, vocabulary]`. Returns the log probabilities, if any row asks.

        running: the choices that may draw again, no more than the sampler has rows for.
        """
        wishes = [row_wish(draw, self._slot(draw, running), self._eos) for draw in draws]
        inputs, count = self._inputs, len(wishes)
        inputs.send(wishes, [draw.place for draw in draws])
        self._sampler.sample(logits, inputs, drawn, self._history)
        tops = [wish.logprobs for wish in wishes]
        if max(tops) < 0:
            return None
        found = self._sampler.logprobs(logits, drawn, inputs.tops[:count], inputs.places[:count])
        return LandingLogprobs.send([draw.key for draw in draws], tops, found)

    @property
    def prompt_rows(self) -> int:
        """Prompt positions that `prompt_logprobs` takes at once."""
        return min(PROMPT_LOGPROB_ROWS, self._sampler.draws)

    def prompt_logprobs(
        self, key: int, logits: torch.Tensor, targets: Sequence[int], top: int
    ) -> LandingLogprobs:
        """Of a prompt's tokens `targets`, which `logits` `[targets, vocabulary]` predicted."""
        count = len(targets)
        tokens = torch.tensor(targets, pin_memory=self._device.type == "cuda")
        tops = torch.full((count,), top, dtype=torch.int32, device=self._device)
        found = self._sampler.logprobs(logits, tokens.to(self._device, non_blocking=True), tops)
        return LandingLogprobs.send([key] * count, [top] * count, found)

    def forget(self) -> None:
        """Others have drawn tokens, or draws have not been made: read outputs anew."""
        self._slots.forget()

    def _slot(self, draw: Draw, running: Container[int]) -> int:
        row = draw.row
        if not is_penalised(row.spec):
            return -1
        slot, is_new = self._slots.take(draw.key, draw.position, running)
        if is_new:
            assert draw.position <= len(row.output_token_ids), (
                "an unknown token was drawn elsewhere"
            )
            self._history.start(slot, row.prompt_token_ids, row.output_token_ids[: draw.position])
        return slot
