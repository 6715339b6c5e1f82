"""What tokens are in bytes: asked of a backend once for each token, then remembered."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from neo_http.ask import Asker
from neo_http.question import Texts
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import types_pb2 as types

MAX_MODELS = 8
MAX_AT_ONCE = 512
"""Tokens asked for in one call, which must not be more than a prompt may have."""


class Vocabulary:
    """Bounded by the size of the vocabularies of a few models. Used by one event loop."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, bytes]] = {}

    async def texts(self, model: str, tokens: Collection[int], ask: Asker) -> Texts:
        """Covers `tokens`. Raises ServiceError or CallFailed."""
        known = self._known.get(model, {})
        missing = sorted(token for token in tokens if token not in known)
        for start in range(0, len(missing), MAX_AT_ONCE):
            some = missing[start : start + MAX_AT_ONCE]
            request = pb.DetokenizeRequest(model=model, token_ids=some, token_bytes=True)
            answer = await ask("Detokenize", request, pb.DetokenizeResponse)
            known = self._room_for(model)
            known.update(zip(some, answer.token_bytes, strict=True))
        return known

    def _room_for(self, model: str) -> dict[int, bytes]:
        """Only models that a backend has answered for get here."""
        if model not in self._known and len(self._known) >= MAX_MODELS:
            del self._known[next(iter(self._known))]
        return self._known.setdefault(model, {})


def token_ids_of(entries: Iterable[types.TokenLogprobs]) -> set[int]:
    """All tokens that `entries` name."""
    found: set[int] = set()
    for entry in entries:
        found.add(entry.token_id)
        found.update(top.token_id for top in entry.top)
    return found
