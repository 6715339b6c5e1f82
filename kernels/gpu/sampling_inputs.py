"""What rows wish of the sampler, sent in one copy, and what they have said, kept on the device."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from kernels.gpu.sampling_kernels import MOST_OUTPUTS, OUTPUT, PROMPT

NEVER = float("-inf")
"""As an edit: the token cannot be drawn."""


_NO_EDITS: Mapping[int, float] = MappingProxyType({})


class RowWish(NamedTuple):
    """One row's sampling parameters; the defaults take the largest logit."""

    temperature: float = 0.0
    """0: the largest adjusted logit."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    """Taken modulo 2^64."""
    position: int = 0
    """Which token of the output this is, from 0; the draw depends on it and the seed alone."""
    edits: Mapping[int, float] = _NO_EDITS
    """Token -> what is added to its logit, after penalties; NEVER: it cannot be drawn."""
    history: int = -1
    """Slot of a `History`; -1: no penalties."""
    repetition: float = 1.0
    frequency: float = 0.0
    presence: float = 0.0
    logprobs: int = -1
    """How many best tokens to list beside the drawn one's log probability; -1: none at all."""


class SamplingInputs:
    """Device arrays for up to `rows` rows and `edits` edits, and two host copies used in turn.

    A host copy is written again two `send`s later; by then the sweep that it was for must have been
    waited for.
    """

    def __init__(self, rows: int, edits: int, device: torch.device | str) -> None:
        self.rows = rows
        self.edits = edits
        self.count = 0
        """Rows sent last."""
        self.reach = 0
        """One more than the largest of `places`."""
        sizes = {
            "seeds": 8 * rows,
            "top_ps": 8 * rows,
            "numbers": 4 * 5 * rows,
            "places": 4 * rows,
            "positions": 4 * rows,
            "slots": 4 * rows,
            "top_ks": 4 * rows,
            "tops": 4 * rows,
            "first_edits": 4 * (rows + 1),
            # Last, token beside value, so that only what is used of them is sent.
            "edits": 8 * edits,
        }
        self._places: dict[str, slice] = {}
        end = 0
        for name, size in sizes.items():
            self._places[name] = slice(end, end + size)
            end += -(-size // 16) * 16
        pin = torch.device(device).type == "cuda"
        self._staging = [torch.zeros(end, dtype=torch.uint8, pin_memory=pin) for _ in range(2)]
        self._memory = torch.zeros(end, dtype=torch.uint8, device=device)
        self._turn = 0

        def view(name: str, dtype: torch.dtype) -> torch.Tensor:
            return self._memory[self._places[name]].view(dtype)

        self.seeds = view("seeds", torch.int64)
        self.top_ps = view("top_ps", torch.float64)
        self.numbers = view("numbers", torch.float32)
        """fp32 `[5, rows]`: repetition, frequency, presence, temperature, logarithm of min_p."""
        self.places = view("places", torch.int32)
        """Rows of the logits that the wishes are for."""
        self.positions = view("positions", torch.int32)
        self.slots = view("slots", torch.int32)
        self.top_ks = view("top_ks", torch.int32)
        self.tops = view("tops", torch.int32)
        self.first_edits = view("first_edits", torch.int32)
        """int32 `[rows + 1]`"""
        self.edit_pairs = view("edits", torch.int32)
        """int32 `[edits, 2]`: the token, and the bits of the fp32 value."""

    def send(self, wishes: Sequence[RowWish], places: Sequence[int] | None = None) -> None:
        """Fill and copy. `places`: the row of the logits that each wish is for, where they are not
        simply the first ones. ValueError where rows or edits exceed the room."""
        edits = [len(wish.edits) for wish in wishes]
        if len(wishes) > self.rows:
            raise ValueError(f"{len(wishes)} rows are more than the {self.rows} prepared for")
        if sum(edits) > self.edits:
            raise ValueError(f"{sum(edits)} edited logits are more than {self.edits}")
        places = range(len(wishes)) if places is None else places
        self.count, self.reach = len(wishes), max(places, default=-1) + 1
        self._turn ^= 1
        host = self._staging[self._turn].numpy()

        def fill(name: str, dtype: type[np.generic], values: Sequence[float]) -> None:
            host[self._places[name]].view(dtype)[: len(values)] = values

        fill("seeds", np.uint64, [wish.seed % 2**64 for wish in wishes])
        fill("top_ps", np.float64, [wish.top_p for wish in wishes])
        numbers = host[self._places["numbers"]].view(np.float32).reshape(5, self.rows)
        numbers[:, : len(wishes)] = _numbers(wishes)
        fill("places", np.int32, places)
        fill("positions", np.int32, [wish.position for wish in wishes])
        fill("slots", np.int32, [wish.history for wish in wishes])
        fill("top_ks", np.int32, [min(wish.top_k, 2**31 - 1) for wish in wishes])
        fill("tops", np.int32, [wish.logprobs for wish in wishes])
        fill("first_edits", np.int32, np.cumsum([0, *edits]).tolist())
        pairs = host[self._places["edits"]].view(np.int32).reshape(-1, 2)
        place = 0
        for wish, count in zip(wishes, edits, strict=True):
            if count:
                pairs[place : place + count, 0] = list(wish.edits)
                values = np.fromiter(wish.edits.values(), np.float32, count)
                pairs[place : place + count, 1] = values.view(np.int32)
                place += count
        used = self._places["edits"].start + 8 * place
        self._memory[:used].copy_(self._staging[self._turn][:used], non_blocking=True)


def _numbers(wishes: Sequence[RowWish]) -> npt.NDArray[np.float64]:
    """`[5, rows]`"""
    rows = [
        (
            wish.repetition,
            wish.frequency,
            wish.presence,
            wish.temperature,
            math.log(wish.min_p) if wish.min_p > 0 else NEVER,
        )
        for wish in wishes
    ]
    return np.array(rows, np.float64).reshape(-1, 5).T


class History:
    """Which tokens prompts and outputs of penalised requests have, in `slots` rows of the
    vocabulary (256 KiB each for 128k tokens).

    The sampler counts what it draws by itself: the token of position p once the slot is sampled at
    p + 1. So a sweep may be repeated, and a last draw be dropped.
    """

    def __init__(self, slots: int, vocabulary: int, device: torch.device | str) -> None:
        self.table = torch.zeros((slots, vocabulary), dtype=torch.int16, device=device)
        self.recent = torch.zeros((slots, 2), dtype=torch.int32, device=device)
        self._pin = self.table.device.type == "cuda"

    def start(self, slot: int, prompt: Sequence[int], output: Sequence[int] = ()) -> None:
        """Give `slot` to a request that has said `output` so far. Does not wait for the device."""
        said, counts = np.unique(np.asarray(output, np.int64), return_counts=True)
        seen = np.union1d(np.asarray(prompt, np.int64), said)
        entries = np.zeros(len(seen), np.int16)
        entries[np.searchsorted(seen, said)] = OUTPUT * np.minimum(counts, MOST_OUTPUTS)
        entries[np.isin(seen, np.asarray(prompt, np.int64))] += PROMPT
        row = self.table[slot]
        row.zero_()
        row.index_copy_(0, self._sent(seen), self._sent(entries))
        # No position follows it: nothing is pending.
        self.recent[slot] = -2

    def _sent(self, values: npt.NDArray[np.generic]) -> torch.Tensor:
        host = torch.from_numpy(values)
        host = host.pin_memory() if self._pin else host
        return host.to(self.table.device, non_blocking=True)
