"""Errors as OpenAI's clients expect them.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "n", "code": "REASON"}}

`code` is the reason that gRPC clients read in ErrorInfo; the HTTP status follows from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import grpc

from neo_common.errors import ErrorDetails, Reason, ServiceError

_BY_CODE = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.FAILED_PRECONDITION: 400,
    grpc.StatusCode.OUT_OF_RANGE: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.PERMISSION_DENIED: 403,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.ALREADY_EXISTS: 409,
    grpc.StatusCode.ABORTED: 409,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNIMPLEMENTED: 501,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}
"""Others, such as INTERNAL, are 500."""
_BY_REASON = {Reason.UNKNOWN_MODEL.value: 404, Reason.OUT_OF_MEMORY.value: 503}
"""Where HTTP's clients expect another status than the gRPC code gives: OpenAI says 404 for a model
that is not there, and 429 is about the caller's own rate."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    503: "service_unavailable_error",
    504: "timeout_error",
}
_SECTIONS = ("sampling.", "scheduling.", "chat.")
"""Of a neo.v1.GenerateRequest; here these fields are the body's own."""

_RENAMED = {"text": "prompt", "token_ids": "prompt", "chat": "messages"}


class CallFailed(Exception):
    """The call was made and ended with another status than OK."""

    def __init__(self, code: grpc.StatusCode, message: str, trailing: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self._trailing = trailing

    def trailing_metadata(self) -> Any:
        return self._trailing


@dataclass(frozen=True)
class Problem:
    """What the client is told."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after: float | None = None
    """Seconds after which trying again may help."""

    def body(self) -> dict[str, Any]:
        fallback = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": self.message,
                "type": _TYPES.get(self.status, fallback),
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self) -> dict[str, str]:
        headers = {}
        if self.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(self.retry_after)))
            headers["Retry-After-Ms"] = str(math.ceil(self.retry_after * 1000))  # OpenAI's own
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return headers


def invalid(field: str, problem: str) -> ServiceError:
    return ServiceError(Reason.INVALID_ARGUMENT, f"{field} {problem}", field=field)


def problem_of(error: ServiceError | CallFailed) -> Problem:
    if isinstance(error, ServiceError):
        reason, retry_after, field = error.reason.value, error.retry_after, error.field
    else:
        details = ErrorDetails(error)
        reason, retry_after = details.reason or error.code.name, details.retry_after
        field = details.fields[0] if details.fields else None
    status = http_status(reason, error.code)
    param = None if field is None else param_of(field)
    message = error.message
    if field is not None and param is not None and message.startswith(field):
        message = param + message.removeprefix(field)
    return Problem(status, message, reason, param, retry_after)


def http_status(reason: str, code: grpc.StatusCode) -> int:
    """reason: "" where none was given."""
    return _BY_REASON.get(reason, _BY_CODE.get(code, 500))


def param_of(field: str) -> str:
    """The body's name of a field of neo.v1."""
    for section in _SECTIONS:
        field = field.removeprefix(section)
    return _RENAMED.get(field, field)
