"""Errors that a client can act on: a status code, a reason that programs read, a sentence.

On the wire an error is a gRPC status with `google.rpc.Status` details (AIP-193): ErrorInfo carries
the reason, BadRequest the field, RetryInfo when to try again.
"""

from __future__ import annotations

import contextlib
import enum
from typing import Any

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

DOMAIN = "neo.v1"
MAX_MESSAGE_BYTES = 768
MAX_FIELD_BYTES = 128
"""An error names what a client sent. gRPC's peers take 8 KiB of status with its details, where a
byte may count three times; a longer status arrives as RESOURCE_EXHAUSTED."""


class Reason(enum.StrEnum):
    """Why a call failed. A reason fixes the status code; see `status_code`."""

    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    UNAUTHENTICATED = "UNAUTHENTICATED"
    """No credentials, or such as are not accepted."""
    PERMISSION_DENIED = "PERMISSION_DENIED"
    """The caller is known, and may not do this."""
    UNKNOWN_MODEL = "UNKNOWN_MODEL"
    NEVER_FITS = "NEVER_FITS"
    """More KV than the pools hold: no waiting would help."""
    DUPLICATE_REQUEST_ID = "DUPLICATE_REQUEST_ID"
    REQUEST_NOT_FOUND = "REQUEST_NOT_FOUND"
    DEADLINE_EXCEEDED = "DEADLINE_EXCEEDED"
    QUEUE_FULL = "QUEUE_FULL"
    OVERLOADED = "OVERLOADED"
    RATE_LIMITED = "RATE_LIMITED"
    """The tenant has used up its tokens or requests per minute."""
    WAIT_TOO_LONG = "WAIT_TOO_LONG"
    """It would wait in the router beyond its deadline, or has waited as long as any may."""
    OUT_OF_MEMORY = "OUT_OF_MEMORY"
    """An allocation failed while the request ran; it may succeed when tried again."""
    DRAINING = "DRAINING"
    NOT_READY = "NOT_READY"
    ENGINE_LOST = "ENGINE_LOST"
    HOST_TIER_LOST = "HOST_TIER_LOST"
    """The cpu_service that held the request's KV did not come back within the lease."""
    NO_BACKEND = "NO_BACKEND"
    UNKNOWN_BACKEND = "UNKNOWN_BACKEND"
    """No backend of that address is configured on the router."""
    BACKEND_LOST = "BACKEND_LOST"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    NOT_COLOCATED = "NOT_COLOCATED"
    STALE_EPOCH = "STALE_EPOCH"
    SESSION_EXISTS = "SESSION_EXISTS"
    TOO_MANY_SESSIONS = "TOO_MANY_SESSIONS"
    OUT_OF_HOST_MEMORY = "OUT_OF_HOST_MEMORY"
    GRAMMAR_FAILED = "GRAMMAR_FAILED"
    """What the output must follow became too complex while it was generated."""
    NUMERICAL = "NUMERICAL"
    """The model produced NaN for this request."""
    INTERNAL_ERROR = "INTERNAL_ERROR"

    @property
    def status_code(self) -> grpc.StatusCode:
        return _STATUS[self]


_STATUS = {
    Reason.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.UNKNOWN_MODEL: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NEVER_FITS: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.DUPLICATE_REQUEST_ID: grpc.StatusCode.ALREADY_EXISTS,
    Reason.REQUEST_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    Reason.DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    Reason.QUEUE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.OVERLOADED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.RATE_LIMITED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.WAIT_TOO_LONG: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.OUT_OF_MEMORY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
    Reason.NOT_READY: grpc.StatusCode.UNAVAILABLE,
    Reason.ENGINE_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.HOST_TIER_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.UNKNOWN_BACKEND: grpc.StatusCode.NOT_FOUND,
    Reason.NO_BACKEND: grpc.StatusCode.UNAVAILABLE,
    Reason.BACKEND_LOST: grpc.StatusCode.UNAVAILABLE,
    Reason.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.LAYOUT_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_COLOCATED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STALE_EPOCH: grpc.StatusCode.ABORTED,
    Reason.SESSION_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Reason.TOO_MANY_SESSIONS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.OUT_OF_HOST_MEMORY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.GRAMMAR_FAILED: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.NUMERICAL: grpc.StatusCode.INTERNAL,
    Reason.INTERNAL_ERROR: grpc.StatusCode.INTERNAL,
}


SERVICE_FAULTS = frozenset({Reason.INTERNAL_ERROR, Reason.ENGINE_LOST})
"""The service is at fault, whatever it was asked."""
NO_CALLS_NOW = frozenset({Reason.DRAINING, Reason.NOT_READY})
"""The service takes none for the moment."""


class ServiceError(Exception):
    """A call's failure, as its client is to see it.

    message: one sentence, free of prompts and secrets. field: the request's field that is wrong.
    retry_after: seconds after which trying again may help.
    """

    def __init__(
        self,
        reason: Reason,
        message: str,
        *,
        field: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = sendable(message, MAX_MESSAGE_BYTES)
        self.field = None if field is None else sendable(field, MAX_FIELD_BYTES)
        self.retry_after = retry_after

    @property
    def code(self) -> grpc.StatusCode:
        return self.reason.status_code

    def to_status(self) -> grpc.Status:
        """For `context.abort_with_status`."""
        details: list[any_pb2.Any] = [_pack(self._error_info())]
        if self.field is not None:
            violation = error_details_pb2.BadRequest.FieldViolation(
                field=self.field, description=self.message
            )
            details.append(_pack(error_details_pb2.BadRequest(field_violations=[violation])))
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromNanoseconds(round(self.retry_after * 1e9))
            details.append(_pack(error_details_pb2.RetryInfo(retry_delay=delay)))
        code = self.code.value[0]
        status = status_pb2.Status(code=code, message=self.message, details=details)
        return rpc_status.to_status(status)

    def _error_info(self) -> error_details_pb2.ErrorInfo:
        return error_details_pb2.ErrorInfo(reason=self.reason.value, domain=DOMAIN)


def sendable(text: str, most: int) -> str:
    """`text` in at most so many bytes of UTF-8; lone surrogates, which JSON holds, become `?`."""
    data = text.encode(errors="replace")
    if len(data) > most:
        return data[: most - 3].decode(errors="ignore") + "..."
    return data.decode()


def _pack(message: object) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(message)  # type: ignore[arg-type]
    return packed


class ErrorDetails:
    """What a client reads from a failed call: `reason` ("" if the peer gave none), `fields` and
    `retry_after` seconds (None if not said)."""

    def __init__(self, error: Any) -> None:
        """error: what a call raised, or anything else with its `trailing_metadata()`."""
        self.reason = ""
        self.fields: list[str] = []
        self.retry_after: float | None = None
        status = _status_of(error)
        for detail in status.details if status is not None else ():
            with contextlib.suppress(DecodeError):  # a peer's garbage
                self._take(detail)

    def _take(self, detail: any_pb2.Any) -> None:
        info = error_details_pb2.ErrorInfo()
        bad = error_details_pb2.BadRequest()
        retry = error_details_pb2.RetryInfo()
        if detail.Unpack(info):
            self.reason = info.reason
        elif detail.Unpack(bad):
            self.fields += [violation.field for violation in bad.field_violations]
        elif detail.Unpack(retry):
            self.retry_after = retry.retry_delay.ToNanoseconds() / 1e9


def reason_of(details: bytes) -> str:
    """The reason in a serialised google.rpc.Status; "" where there is none."""
    status, info = status_pb2.Status(), error_details_pb2.ErrorInfo()
    try:
        status.ParseFromString(details)
        return next((info.reason for detail in status.details if detail.Unpack(info)), "")
    except DecodeError:  # a peer's garbage
        return ""


def _status_of(error: Any) -> status_pb2.Status | None:
    """The google.rpc.Status in the trailing metadata, of a sync or an aio call's error."""
    for key, value in error.trailing_metadata() or ():
        if key == "grpc-status-details-bin":
            status = status_pb2.Status()
            try:
                status.ParseFromString(value if isinstance(value, bytes) else value.encode())
            except Exception:  # a peer's garbage is no reason to fail differently
                return None
            return status
    return None
