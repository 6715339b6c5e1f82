"""Refusals of this service."""

from __future__ import annotations

import enum

import grpc


class Reason(enum.StrEnum):
    INVALID_ARGUMENT = "INVALID_ARGUMENT"
    FAILED_PRECONDITION = "FAILED_PRECONDITION"
    LAYOUT_MISMATCH = "LAYOUT_MISMATCH"
    NOT_COLOCATED = "NOT_COLOCATED"
    STALE_EPOCH = "STALE_EPOCH"
    SESSION_EXISTS = "SESSION_EXISTS"
    TOO_MANY_SESSIONS = "TOO_MANY_SESSIONS"
    OUT_OF_HOST_MEMORY = "OUT_OF_HOST_MEMORY"
    DRAINING = "DRAINING"


_STATUS = {
    Reason.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.FAILED_PRECONDITION: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.LAYOUT_MISMATCH: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.NOT_COLOCATED: grpc.StatusCode.FAILED_PRECONDITION,
    Reason.STALE_EPOCH: grpc.StatusCode.ABORTED,
    Reason.SESSION_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    Reason.TOO_MANY_SESSIONS: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.OUT_OF_HOST_MEMORY: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.DRAINING: grpc.StatusCode.UNAVAILABLE,
}


class ServiceError(Exception):
    def __init__(self, reason: Reason, message: str, *, field: str | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.field = field
        self.code = _STATUS[reason]
