"""What the guard makes of a client that goes while it is told how its call ended."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import grpc.aio
import pytest

from neo_common.errors import Reason, ServiceError
from neo_common.grpc.auth import Access
from neo_common.grpc.guard import Guard


class Gone:
    """A call whose status cannot be sent any more, of which gRPC has not told us yet."""

    def invocation_metadata(self) -> tuple[()]:
        return ()

    def cancelled(self) -> bool:
        return False

    async def abort_with_status(self, status: Any) -> None:
        raise grpc.aio.InternalError("Failed execute_batch")


@pytest.mark.parametrize(
    "error",
    [
        ServiceError(Reason.QUEUE_FULL, "full"),
        RuntimeError("a bug"),
        grpc.aio.InternalError("Failed execute_batch"),
    ],
)
async def test_a_client_that_has_gone_is_no_failure_of_ours(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    async def fails(request: Any, context: Any) -> Any:
        raise error

    guard = Guard(lambda method: True, Access(None, private=True))
    handler = SimpleNamespace(
        unary_unary=fails, request_streaming=False, response_streaming=False,
        request_deserializer=None, response_serializer=None,
    )  # fmt: skip

    async def found(details: Any) -> Any:
        return handler

    wrapped = await guard.intercept_service(found, SimpleNamespace(method="/a/B"))
    with caplog.at_level(logging.ERROR), pytest.raises(asyncio.CancelledError):
        await wrapped.unary_unary(b"", Gone())
    bug = isinstance(error, RuntimeError)
    assert len(caplog.records) == bug, "a bug of ours is logged, whoever is left to hear of it"
    assert guard.live == 0
