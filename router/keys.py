"""What the choice of a backend may depend on, of one call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from router.peek import peek

SESSION_HEADER = "x-neo-session-id"
"""Metadata by which a client says which calls belong together."""
MODEL_HEADER = "x-neo-model"
"""Metadata that names the model where the request has no field for it."""
MAX_SESSION_BYTES = 256


@dataclass(frozen=True)
class CallKeys:
    model: str = ""
    """"" means the router's default model."""
    session: bytes = b""
    """Empty when the client did not say."""
    prompt: bytes = field(default=b"", repr=False)
    """How the prompt begins; see router.peek."""
    prompt_tokens: int = 0
    """How many it has, about; 0 when nothing is known."""


def keys_of(path: str, request: bytes, metadata: Any) -> CallKeys:
    """metadata: the client's."""
    peeked = peek(path, request)
    model, session = peeked.model, b""
    for key, value in metadata or ():
        if key == SESSION_HEADER:
            session = (value if isinstance(value, bytes) else value.encode())[:MAX_SESSION_BYTES]
        elif key == MODEL_HEADER and not model:
            model = value.decode(errors="replace") if isinstance(value, bytes) else value
    return CallKeys(model, session, peeked.prompt, peeked.prompt_tokens)
