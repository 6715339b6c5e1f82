"""Which of the host tier's decode rows attend on the device in this sweep: their KV is read over
the link, one layer ahead, and stays where it is."""

from __future__ import annotations

from collections.abc import Sequence

from gpu_service.kv.table import blocks_for
from gpu_service.scheduling.request import Choice


def streamed(
    ready: Sequence[Choice], blocks: int, block_tokens: int, host_ms: float | None
) -> set[Choice]:
    """Those of `ready`, choices on the host tier with nothing under way, that at most `blocks` host
    blocks hold together: first whoever was promised what the host does not keep, then the oldest.

    host_ms: of the host's own tokens; None if nobody knows. One that is too long for what is left
    holds back nobody behind it: it is the host's, and its turn comes as others end.
    """
    found: set[Choice] = set()
    for choice in sorted(ready, key=lambda choice: (not _hurries(choice, host_ms), choice.order)):
        needed = blocks_for(choice.length, block_tokens)
        if needed <= blocks:
            found.add(choice)
            blocks -= needed
    return found


def _hurries(choice: Choice, host_ms: float | None) -> bool:
    target = choice.request.submit.tpot_ms
    return target is not None and (host_ms is None or host_ms > target)
