"""What a sweep costs on this machine: taken at start, corrected by every sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_NEWEST = 0.05
"""Weight of the newest measurement."""
_PAUSE = 4
"""What takes so many times longer than expected is the machine's doing, and not the sweep's."""


class SweepCosts:
    """Milliseconds of GPU-only sweeps by their padded size.

    decode: rows -> ms of a sweep of decode rows alone. mixed: rows -> ms of a sweep of decode rows
    and prompt chunks together. Both without the attention over decode rows' context, which costs
    `context_ms` a token.
    """

    def __init__(
        self,
        decode: Mapping[int, float],
        mixed: Mapping[int, float],
        context_ms: float,
        beside_chunks: Sequence[int] = (),
    ) -> None:
        """`beside_chunks`: padded numbers of decode rows in sweeps with chunks; empty: any."""
        assert decode
        assert mixed
        self._decode = dict(sorted(decode.items()))
        self._mixed = dict(sorted(mixed.items()))
        self.context_ms = context_ms
        self._seen_decode: set[int] = set()
        self._seen_mixed: set[int] = set()
        self._beside_chunks = sorted(beside_chunks)

    def padded_decode(self, rows: int) -> int:
        """How many rows `rows` decode rows take beside chunks."""
        return next((size for size in self._beside_chunks if size >= rows), rows)

    @property
    def mixed_sizes(self) -> list[int]:
        """Ascending."""
        return list(self._mixed)

    def decode_ms(self, rows: int, context: int) -> float:
        """A sweep of `rows` decode rows (at least one) that attend to `context` tokens together."""
        return self._decode[_padded(self._decode, rows)] + context * self.context_ms

    def mixed_ms(self, rows: int, context: int) -> float:
        """A sweep of `rows` rows, prompt chunks among them; `context` of its decode rows alone."""
        return self._mixed[_padded(self._mixed, rows)] + context * self.context_ms

    def chunks_for(self, decode: int, rows: float, most: int = 0) -> list[tuple[float, int]]:
        """Shares of sweeps and the rows of their chunks, so that beside `decode` decode rows
        `rows` prompt rows are computed a sweep on average: by two sizes that are next to it. More
        than the largest takes (a share above 1) is that size so many times. `most`: rows of the
        largest; 0: any."""
        padded = self.padded_decode(decode)
        larger = [size for size in self._mixed if size > padded]
        if most:
            larger = [size for size in larger if size <= most] or larger[:1]
        sizes = [0, *(size - padded for size in larger)]
        if len(sizes) == 1 or rows <= 0:
            return [(1.0, 0)]
        if rows >= sizes[-1]:
            return [(rows / sizes[-1], sizes[-1])]
        right = next(place for place, size in enumerate(sizes) if size > rows)
        low, high = sizes[right - 1], sizes[right]
        part = (rows - low) / (high - low)
        return [(1 - part, low), (part, high)]

    def observe(self, rows: int, has_chunks: bool, context: int, milliseconds: float) -> None:
        """A sweep took that long on the device."""
        table = self._mixed if has_chunks else self._decode
        size = _padded(table, rows)
        if rows > size:
            return  # larger than what was measured
        expected = table[size] + context * self.context_ms
        if milliseconds > _PAUSE * expected:
            return
        error = milliseconds - expected
        seen = self._seen_mixed if has_chunks else self._seen_decode
        seen.add(size)
        # Each part by its share: what it would be off by if both were wrong by the same factor.
        share = table[size] / expected if context and not has_chunks else 1.0
        table[size] += _NEWEST * share * error
        if share < 1:
            self.context_ms += _NEWEST * (1 - share) * error / context
        # Sizes that nobody has seen are wrong as this one was, as far as anybody knows.
        factor = 1 + _NEWEST * error / expected
        for other in table.keys() - seen:
            table[other] *= factor


def _padded(table: Mapping[int, float], rows: int) -> int:
    """The smallest size that holds `rows`, or the largest there is."""
    return next((size for size in table if size >= rows), max(table))
