"""The next tokens of a batch, on the device: nothing waits for the host, shapes are static.

    logits -> penalties, edits -> temperature -> kept tokens -> draw
                                                 top-k, top-p, min-p

The same rule and the same draws as `gpu_service.model.sampling`, which says it in torch and is the
oracle. No sorting: what is kept is bounded below by one value, found by cutting the range in four
until only that value is left, among the tokens above a threshold that is known to lie below it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton

from kernels.gpu.draw_kernels import _draw_kernel
from kernels.gpu.logprob_kernels import _logprob_kernel, _top_kernel
from kernels.gpu.sampling_inputs import History, SamplingInputs
from kernels.gpu.sampling_kernels import _best_kernel, _gather_kernel, _weigh_kernel
from kernels.gpu.tensors import FLOATS, check


@dataclass(frozen=True)
class Logprobs:
    """Of the logits as they were. Rows that did not ask, or have no token, are left as they were.

    logprob: fp32 `[rows]`. rank: int32 `[rows]`, 1 is best, equals share the better one. top_ids,
    top_logprobs: int32 and fp32 `[rows, most]`, best first, of equals the lower id first; as many
    as the row asked for are valid.
    """

    logprob: torch.Tensor
    rank: torch.Tensor
    top_ids: torch.Tensor
    top_logprobs: torch.Tensor


class Sampler:
    """Owns the workspace for `rows` rows of `vocabulary` logits: 4 bytes a logit."""

    def __init__(
        self,
        rows: int,
        vocabulary: int,
        device: torch.device | str,
        *,
        logprobs: int = 20,
        tile: int = 4096,
        chunk: int = 2048,
        room: int = 8192,
    ) -> None:
        """tile: logits of a program while all are looked at; chunk: at a time, while few are; room:
        tokens of a row that may be gathered. Rows that keep more are drawn slowly."""
        self.rows = rows
        self.vocabulary = vocabulary
        self._tile = min(tile, triton.next_power_of_2(vocabulary))
        self._chunk = min(chunk, triton.next_power_of_2(vocabulary))
        self._room = room
        self._tiles = triton.cdiv(vocabulary, self._tile)
        self._most = logprobs
        # Unused arguments must point at something, too.
        self._no_history = History(1, 1, device)
        self._no_inputs = SamplingInputs(1, 1, device)

        def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        tiles = self._tiles
        self._work = empty(rows, vocabulary)
        self._values = empty(rows, room)
        self._ids = empty(rows, room, dtype=torch.int32)
        self._weights = empty(rows, tiles, dtype=torch.float64)
        self._counts = empty(rows, tiles, 8, dtype=torch.int32)
        self._masses = empty(rows, tiles, 8)
        self._best = empty(rows, tiles)
        self._where = empty(rows, tiles, dtype=torch.int32)
        self._top_values = empty(rows, tiles, max(1, logprobs))
        self._top_ids = empty(rows, tiles, max(1, logprobs), dtype=torch.int32)
        self._sums = empty(rows, tiles, 2)
        self._ranks = empty(rows, tiles, dtype=torch.int32)
        self._logprobs = Logprobs(
            empty(rows),
            empty(rows, dtype=torch.int32),
            empty(rows, max(1, logprobs), dtype=torch.int32),
            empty(rows, max(1, logprobs)),
        )

    def greedy(self, logits: torch.Tensor, out: torch.Tensor) -> None:
        """The largest logit of each row, the first of equals; -1 where one is NaN or +inf, or all
        are -inf.

        logits: `[rows, vocabulary]`. out: int64 `[rows]`.
        """
        self._check(logits, out)
        self._launch(logits, out, self._no_inputs, self._no_history, adjust=False)

    def sample(
        self,
        logits: torch.Tensor,
        inputs: SamplingInputs,
        out: torch.Tensor,
        history: History | None = None,
    ) -> None:
        """One token for each row of `logits` `[rows, vocabulary]`, by the wishes sent before; -1
        where no token can be drawn. out: int64 `[rows]`. `logits` are left as they are.
        """
        self._check(logits, out)
        if logits.shape[0] > inputs.rows:
            raise ValueError(f"{logits.shape[0]} rows are more than the inputs' {inputs.rows}")
        history = history or self._no_history
        if history is not self._no_history:
            check("history", history.table, (-1, self.vocabulary), torch.int32)
        self._launch(logits, out, inputs, history, adjust=True)

    def _launch(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        inputs: SamplingInputs,
        history: History,
        *,
        adjust: bool,
    ) -> None:
        grid = (logits.shape[0], self._tiles)
        sizes = {
            "VOCAB": self.vocabulary,
            "TILE": self._tile,
            "TILES_PAD": triton.next_power_of_2(self._tiles),
        }
        filters = (inputs.numbers, inputs.top_ps, inputs.top_ks)
        weights = (self._weights, self._counts, self._masses)
        gathered = (self._values, self._ids)
        said = (inputs.positions, inputs.slots, history.table, history.recent)
        _best_kernel[grid](
            logits, self._work, self._best, self._where, inputs.numbers, *said,
            inputs.first_edits, inputs.edit_pairs, inputs.rows,
            VOCAB=self.vocabulary, TILE=self._tile, ADJUST=adjust, num_warps=8,
            # As torch does it: a fused multiply-add would round penalties otherwise.
            enable_fp_fusion=False,
        )  # fmt: skip
        if adjust:
            _weigh_kernel[grid](
                self._work, self._best, *filters, *weights, inputs.rows, **sizes, num_warps=16
            )
            _gather_kernel[grid](
                self._work, *gathered, self._best, *filters, *weights, inputs.rows,
                **sizes, ROOM=self._room, num_warps=8,
            )  # fmt: skip
        _draw_kernel[(logits.shape[0],)](
            self._work, *gathered, self._best, self._where, *weights, *filters,
            inputs.seeds, *said, out, inputs.rows, self._tiles,
            **sizes, ROOM=self._room, CHUNK=self._chunk, ADJUST=adjust,
            num_warps=8 if adjust else 1,
        )  # fmt: skip

    def logprobs(
        self, logits: torch.Tensor, inputs: SamplingInputs, tokens: torch.Tensor
    ) -> Logprobs:
        """Of `tokens` (int64 `[rows]`) and of as many best ones as each row asked for, up to the
        number given at construction. The next call overwrites the result."""
        self._check(logits, tokens)
        rows, found = logits.shape[0], self._logprobs
        _top_kernel[(rows, self._tiles)](
            logits,
            tokens,
            inputs.tops,
            self._top_values,
            self._top_ids,
            self._sums,
            self._ranks,
            VOCAB=self.vocabulary,
            TILE=self._tile,
            MOST=max(1, self._most),
            num_warps=8,
        )
        _logprob_kernel[(rows,)](
            logits,
            tokens,
            inputs.tops,
            self._top_values,
            self._top_ids,
            self._sums,
            self._ranks,
            found.logprob,
            found.rank,
            found.top_ids,
            found.top_logprobs,
            self._tiles,
            VOCAB=self.vocabulary,
            TILES_PAD=triton.next_power_of_2(self._tiles),
            MOST=max(1, self._most),
            MOST_PAD=triton.next_power_of_2(max(1, self._most)),
            num_warps=4,
        )
        return Logprobs(
            found.logprob[:rows], found.rank[:rows], found.top_ids[:rows], found.top_logprobs[:rows]
        )

    def _check(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        rows = logits.shape[0]
        check("logits", logits, (-1, self.vocabulary), *FLOATS)
        check("tokens", tokens, (rows,), torch.int64)
        if rows > self.rows:
            raise ValueError(f"{rows} rows are more than the {self.rows} prepared for")
