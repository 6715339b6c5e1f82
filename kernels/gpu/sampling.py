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
    """Owns the workspace for `draws` rows of `vocabulary` logits, 4 bytes a logit; the largest ones
    are found in up to `rows` rows, which take next to none."""

    def __init__(
        self,
        rows: int,
        vocabulary: int,
        device: torch.device | str,
        *,
        draws: int = 0,
        logprobs: int = 20,
        tile: int = 4096,
        chunk: int = 4096,
        room: int = 8192,
    ) -> None:
        """draws: 0 means `rows`. tile: logits of a program while all are looked at; chunk: at a
        time, while few are; room: tokens of a row that may be gathered. Rows that keep more are
        drawn slowly."""
        self.rows = rows
        self.draws = draws or rows
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
        self._best = empty(rows, tiles)
        self._where = empty(rows, tiles, dtype=torch.int32)
        rows = self.draws
        self._all = torch.arange(rows, dtype=torch.int32, device=device)
        self._work = empty(rows, vocabulary)
        self._values = empty(rows, room)
        self._ids = empty(rows, room, dtype=torch.int32)
        self._weights = empty(rows, tiles, dtype=torch.float64)
        self._counts = empty(rows, tiles, 8, dtype=torch.int32)
        self._masses = empty(rows, tiles, 8)
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
        if logits.shape[0] > self.rows:
            raise ValueError(f"{logits.shape[0]} rows are more than the {self.rows} prepared for")
        self._launch(logits, out, self._no_inputs, self._no_history, logits.shape[0], adjust=False)

    def sample(
        self,
        logits: torch.Tensor,
        inputs: SamplingInputs,
        out: torch.Tensor,
        history: History | None = None,
    ) -> None:
        """One token for each row of `logits` `[rows, vocabulary]` that wishes were sent for; -1
        where no token can be drawn. out: int64 `[rows]`, its other rows are left as they are, as
        `logits` are.
        """
        self._check(logits, out)
        self._check_rows(logits, inputs.count, inputs.reach)
        history = history or self._no_history
        if history is not self._no_history:
            check("history", history.table, (-1, self.vocabulary), torch.int16)
        if inputs.count:
            self._launch(logits, out, inputs, history, inputs.count, adjust=True)

    def _launch(
        self,
        logits: torch.Tensor,
        out: torch.Tensor,
        inputs: SamplingInputs,
        history: History,
        rows: int,
        *,
        adjust: bool,
    ) -> None:
        grid = (rows, self._tiles)
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
            logits, inputs.places, self._work, self._best, self._where, inputs.numbers, *said,
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
        _draw_kernel[(rows,)](
            self._work, *gathered, self._best, self._where, *weights, *filters,
            inputs.seeds, *said, inputs.places, out, inputs.rows, self._tiles,
            **sizes, ROOM=self._room, CHUNK=self._chunk, ADJUST=adjust,
            num_warps=8 if adjust else 1,
        )  # fmt: skip

    def logprobs(
        self,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        tops: torch.Tensor,
        places: torch.Tensor | None = None,
    ) -> Logprobs:
        """Of `tokens`, and of as many best ones as each row asked for, up to the number given at
        construction. The next call overwrites the result.

        logits: `[all, vocabulary]`. tokens: int64 `[all]`. tops: int32 `[rows]`, see `RowWish`.
        places: int32 `[rows]`, which of `all` are meant; None means the first ones.
        """
        self._check(logits, tokens)
        rows, found, most = tops.shape[0], self._logprobs, max(1, self._most)
        check("tops", tops, (-1,), torch.int32)
        self._check_rows(logits, rows, rows if places is None else 0)
        places = self._all if places is None else places
        check("places", places, (-1,), torch.int32)
        workspace = (self._top_values, self._top_ids, self._sums, self._ranks)
        _top_kernel[(rows, self._tiles)](
            logits, places, tokens, tops, *workspace,
            VOCAB=self.vocabulary, TILE=self._tile, MOST=most, num_warps=8,
        )  # fmt: skip
        _logprob_kernel[(rows,)](
            logits, places, tokens, tops, *workspace,
            found.logprob, found.rank, found.top_ids, found.top_logprobs, self._tiles,
            VOCAB=self.vocabulary, TILES_PAD=triton.next_power_of_2(self._tiles),
            MOST=most, MOST_PAD=triton.next_power_of_2(most), num_warps=4,
        )  # fmt: skip
        return Logprobs(
            found.logprob[:rows], found.rank[:rows], found.top_ids[:rows], found.top_logprobs[:rows]
        )

    def _check(self, logits: torch.Tensor, tokens: torch.Tensor) -> None:
        check("logits", logits, (-1, self.vocabulary), *FLOATS)
        check("tokens", tokens, (logits.shape[0],), torch.int64)

    def _check_rows(self, logits: torch.Tensor, rows: int, reach: int) -> None:
        if rows > self.draws:
            raise ValueError(f"{rows} rows are more than the {self.draws} prepared for")
        if reach > logits.shape[0]:
            raise ValueError(f"wishes reach to row {reach - 1}, logits have {logits.shape[0]} rows")
