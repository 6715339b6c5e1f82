"""A failed call in one sentence for a person."""

from __future__ import annotations

from typing import Any

import grpc

from neo_common.errors import ErrorDetails


def explain(error: grpc.RpcError) -> str:
    """What failed, why in the server's words, and when to try again if it said so."""
    call: Any = error
    details = ErrorDetails(error)
    code: grpc.StatusCode = call.code()
    message = call.details() or "no details"
    if not details.reason and code is grpc.StatusCode.UNAVAILABLE:
        message = f"the server cannot be reached ({message})"
    names = dict.fromkeys((code.name, details.reason or code.name))
    text = f"{message} [{', '.join(names)}]"
    if details.retry_after is not None:
        text += f"; try again in {details.retry_after:g} s"
    return text
