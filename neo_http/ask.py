"""Unary calls of neo.v1.InferenceService, as messages; several calls side by side."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

from google.protobuf.message import Message

from neo_common.errors import Reason, ServiceError
from neo_http.call import HttpCall, Inference

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Asker:
    """The calls of one HTTP request."""

    def __init__(self, inference: Inference, call: HttpCall) -> None:
        self.inference = inference
        self.call = call

    async def __call__(self, method: str, request: Message, answer: type[M]) -> M:
        """Raises ServiceError or CallFailed."""
        found: list[bytes] = []

        async def keep(message: bytes) -> None:
            found.append(message)

        await self.inference(method, request.SerializeToString(), self.call, keep)
        if len(found) != 1:
            raise ServiceError(Reason.BACKEND_LOST, "the backend answered without a message")
        return answer.FromString(found[0])


async def together(work: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """All results, in order. The first failure cancels the others and is raised by itself."""
    coroutines = list(work)
    if len(coroutines) == 1:
        return [await coroutines[0]]
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(each) for each in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
