"""What a sweep will take on this machine: from a profile at first, then from what sweeps took.

gpu_only     the device's part alone: dense layers, attention, migrations before it
deferred     max(device + exchange, the host's attention of a sweep, what the link brings)
inline       dense layers + max(device's attention, host's) + exchange
asymmetric   max(dense(0) + device's attention, host's(1)) + max(dense(1), host's(0)) + exchange
streamed     rows of any of these: max(..., what the link brings)

Copies beside a sweep are no part of its time, nor of the next one's, which begins behind them.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

import msgspec

from gpu_service.scheduling.costs import SweepCosts
from gpu_service.scheduling.plan import SubBatch
from gpu_service.scheduling.rates import HostRates
from gpu_service.scheduling.work import ASYMMETRIC, DEFERRED, GPU_ONLY, INLINE, SweepWork

_NEWEST = 0.05
"""Weight of the newest sweep."""
_NEWEST_REPORT = 0.3
"""Weight of the host's newest report, which covers about a second of its work; the first one
counts as much as all that was believed before."""
_PAUSE = 4
"""What takes so many times longer than expected is the machine's doing, and not the sweep's."""
_REMEMBERED = 64
"""Sweeps that tell how unequal sweeps are, and iterations what they take beside them."""
_FEW = 8
"""Fewer iterations tell nothing yet."""
_REPORT_SECONDS = 2e-3
"""The host's reports on less work than that are collected first."""


@dataclass(frozen=True)
class Phases:
    """Milliseconds."""

    gpu: float
    """The device computes."""
    cpu: float
    """The host computes."""
    link: float
    """Copies over the link, those before the sweep and beside it included."""
    total: float
    """From the sweep's begin to its end: copies beside it may take longer."""


class Predictor:
    """Not thread-safe. `LayerCosts` for `balance.split`, too."""

    def __init__(self, costs: SweepCosts, rates: HostRates) -> None:
        rates.validate()
        self.costs = costs
        self.rates = rates
        self.error = 0.0
        """Moving average of |predicted - actual| / the larger, of sweeps with host rows."""
        self._beside_ms: dict[bool, deque[float]] = {
            offloads: deque(maxlen=_REMEMBERED) for offloads in (False, True)
        }
        self._device_ms: deque[float] = deque(maxlen=_REMEMBERED)
        self._reports = 0
        self._unused = (0.0, 0.0, 0)

    # -- questions ---------------------------------------------------------------------------

    def phases(self, work: SweepWork) -> Phases:
        rates = self.rates
        moved = work.moved_tokens * rates.link_token_ms + work.moves * rates.move_ms
        copied = work.copied_tokens * rates.link_token_ms + work.copies * rates.move_ms
        link = work.link_tokens * rates.streamed_token_ms
        on_link = moved + link + copied
        attention = work.context * self.costs.context_ms
        streamed = rates.streamed_ms if work.streamed else 0.0
        # Deferred rows are padded by themselves: the exchange's cost has theirs.
        beside = 0.0 if work.way == DEFERRED else work.host_rows - work.second_rows
        rows = work.decode + beside
        dense = self.dense_ms(rows, work.chunk_rows)
        cpu = self.cpu_ms(work.host_tokens)
        if work.way == DEFERRED:
            gpu = dense + attention + rates.deferred_ms + streamed
            return Phases(moved + gpu, cpu, on_link, moved + max(gpu, cpu, link))
        if work.way == INLINE:
            gpu = dense + attention
            total = dense + max(attention, cpu, link) + rates.inline_ms
            return Phases(moved + gpu, cpu, on_link, moved + total)
        if work.way == ASYMMETRIC:
            behind = self.dense_ms(work.second_rows, 0)
            second = self.cpu_ms(work.second_tokens)
            total = max(dense + max(attention, link), second) + max(behind, cpu - second)
            total += 2 * rates.inline_ms
            gpu = dense + attention + behind
            return Phases(moved + gpu, cpu, on_link, moved + total)
        gpu = dense + attention + streamed
        return Phases(moved + gpu, 0.0, on_link, moved + max(gpu, link))

    def dense_ms(self, rows: float, chunk_rows: int) -> float:
        """Without attention over decode rows' context."""
        count = max(1, round(rows))
        if chunk_rows:
            return self.costs.mixed_ms(self.costs.padded_decode(count) + chunk_rows, 0)
        return self.costs.decode_ms(count, 0)

    def hidden_ms(self, device_ms: float, other_ms: float) -> float:
        """A sweep on average, where the device takes `device_ms` on average and something else
        `other_ms` in each: sweeps are as unequal as the last ones were, and what hides behind a
        long one does not behind a short one."""
        known = sorted(self._device_ms)
        total = sum(known)
        if len(known) < _REMEMBERED or not total:
            return max(device_ms, other_ms)
        scale = device_ms * len(known) / total
        few = known[_REMEMBERED // 16 :: _REMEMBERED // 8]
        return device_ms + sum(max(0.0, other_ms - scale * ms) for ms in few) / len(few)

    def cpu_ms(self, tokens: float) -> float:
        return tokens * self.rates.cpu_token_ms + self.rates.cpu_sweep_ms if tokens else 0.0

    # LayerCosts, of all layers together: only their proportions count.

    def linear_ms(self, rows: int) -> float:
        return self.dense_ms(rows, 0)

    def gpu_attention_ms(self, batch: SubBatch) -> float:
        context = sum(row.length for row in (*batch.gpu_decode, *batch.streamed))
        return context * self.costs.context_ms

    def host_attention_ms(self, tokens: int) -> float:
        return self.cpu_ms(tokens)

    # -- corrections -------------------------------------------------------------------------

    def observe(self, work: SweepWork, predicted: Phases, milliseconds: float) -> None:
        """A sweep of that work took that long."""
        if milliseconds > _PAUSE * predicted.total:
            return
        self._device_ms.append(predicted.gpu)
        if work.is_plain:
            rows = self.costs.padded_decode(round(work.decode)) if work.chunk_rows else work.decode
            self.costs.observe(
                round(rows) + work.chunk_rows,
                bool(work.chunk_rows),
                round(work.context),
                milliseconds,
            )
            return
        off = abs(predicted.total - milliseconds) / max(predicted.total, milliseconds)
        self.error += _NEWEST * (off - self.error)
        self._correct(work, predicted, milliseconds - predicted.total)

    def _correct(self, work: SweepWork, predicted: Phases, error: float) -> None:
        """What is left over belongs to whatever bounds the sweep; what the host reports itself, and
        what sweeps of the device alone tell, is known better from there."""
        name = ""
        if work.moves or predicted.link >= predicted.total:
            # How much of the link copies beside it took from the sweep, nobody knows; nor whose
            # error it is where rows follow migrations on it.
            if work.moved_tokens and not (work.copies or work.link_tokens):
                self._add("link_token_ms", error / work.moved_tokens)
            # A host that comes late looks like a slow link: the more it seemed to cost the sooner
            # it would be blamed again. On a card it doubled within 20 s.
            if work.link_tokens and work.way == GPU_ONLY and not (work.copies or work.moves):
                self._add("streamed_token_ms", error / work.link_tokens)
            return
        if predicted.cpu >= predicted.total and error > 0:
            return
        if work.way == DEFERRED and work.chunk_rows:
            return  # the device's own part varies more with prompts than the exchange does
        # Never the costs of sweeps with chunks: a size that once seemed dear is not chosen, and so
        # not corrected again. On a card chunks of 24 rows were all that was left after 30 sweeps.
        if work.way == DEFERRED:
            name = "deferred_ms"
        elif work.way in (INLINE, ASYMMETRIC):
            name = "inline_ms"
        elif work.streamed:
            name = "streamed_ms"
        if name:
            self._add(name, error / 2 if work.way == ASYMMETRIC else error)

    def _add(self, name: str, error: float) -> None:
        value = max(0.0, getattr(self.rates, name) + _NEWEST * error)
        self.rates = msgspec.structs.replace(self.rates, **{name: value})

    def observe_host(self, tokens: float, busy_ms: float, sweeps: int) -> None:
        """The host has read so many KV tokens since it last told, in so much time and so many
        sweeps."""
        tokens += self._unused[0]
        busy_ms += self._unused[1]
        sweeps += self._unused[2]
        if busy_ms < 1e3 * _REPORT_SECONDS or tokens <= 0:
            self._unused = (tokens, busy_ms, sweeps)
            return
        self._unused = (0.0, 0.0, 0)
        # A sweep's own cost is known from the profile alone: the rest is the tokens'.
        own = max(busy_ms - sweeps * self.rates.cpu_sweep_ms, 0.1 * busy_ms)
        self._reports += 1
        weight = max(_NEWEST_REPORT, 1 / (1 + self._reports))
        value = self.rates.cpu_token_ms
        value += weight * (own / tokens - value)
        self.rates = msgspec.structs.replace(self.rates, cpu_token_ms=value)

    def beside_ms(self, offloads: bool) -> float:
        """What an iteration takes beside its sweep: what the engine's own thread costs, as far as
        no sweep hides it. Of those with host rows, or of the device alone; as long as too few of
        one of the two have been seen, the other's.

        A median: the first iterations compile and load kernels, and those of the device alone may
        end with them."""
        for kind in (offloads, not offloads):
            if len(self._beside_ms[kind]) >= _FEW:
                return statistics.median(self._beside_ms[kind])
        return 0.0

    def observe_iteration(self, offloads: bool, seconds: float, device_seconds: float) -> None:
        """One with or without host rows took so long, of which the device so much."""
        self._beside_ms[offloads].append(max(0.0, 1e3 * (seconds - device_seconds)))
