"""The router's InferenceService: every call is relayed as raw bytes; see docs/adr/0003.

    client ──bytes──> relay ──bytes──> backend          request, custom metadata, the time left
    client <──bytes── relay <──bytes── backend          messages, metadata, status and its details

What the router may add is an error of its own (no backend, too many calls) and a second try on
another backend, as long as no message of an answer has come and the backend was UNAVAILABLE.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import ServiceDescriptor

from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import inference_pb2
from router.admission.calls import admitted
from router.admission.gate import Admission
from router.attempts import RetryLimits, Tries
from router.backend import Backend
from router.joining import JOINABLE, Joined, Pace
from router.limits import Gate
from router.metrics import Measured, RouterMetrics
from router.registry import Registry
from router.relay import Context, Failure, Send, outgoing

LISTING = frozenset({"ListModels", "RepositoryIndex"})
"""Methods that ask for all models, where each backend knows its own."""
SERVICE = inference_pb2.DESCRIPTOR.services_by_name["InferenceService"]


@dataclass(frozen=True)
class RelayLimits:
    retry: RetryLimits
    abort_seconds: float
    """How long an Abort waits for each backend's answer."""
    retry_after_seconds: float
    """What clients are told to wait when there is no backend."""


class Forwarder:
    """The handlers of InferenceService on the router; used by one event loop."""

    def __init__(
        self,
        registry: Registry,
        gate: Gate,
        metrics: RouterMetrics,
        limits: RelayLimits,
        admission: Admission,
        pace: Pace,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._registry = registry
        self._gate = gate
        self._metrics = metrics
        self._limits = limits
        self._admission = admission
        self._pace = pace
        self._unary_paths: set[str] = set()
        self._tries = Tries(registry, metrics, limits.retry, clock=clock)

    def handler(
        self,
        service: ServiceDescriptor = SERVICE,
        own: Mapping[str, grpc.RpcMethodHandler[Any, Any]] | None = None,
    ) -> grpc.GenericRpcHandler[Any, Any]:
        """A handler without serialisers for each method that `service` names. own: methods that
        the router answers in another way than by passing them on to one backend."""
        methods: dict[str, grpc.RpcMethodHandler[Any, Any]] = dict(own or {})
        for method in service.methods:
            path = f"/{service.full_name}/{method.name}"
            if method.name in methods:
                continue
            if method.name == "Abort":
                methods[method.name] = grpc.unary_unary_rpc_method_handler(self._abort(path))
                continue
            if method.name in LISTING:
                methods[method.name] = grpc.unary_unary_rpc_method_handler(self.listed(path))
                continue
            self._metrics.expect(path)
            if method.server_streaming:
                methods[method.name] = grpc.unary_stream_rpc_method_handler(self._stream(path))
            else:
                self._unary_paths.add(path)
                methods[method.name] = grpc.unary_unary_rpc_method_handler(self._unary(path))
        return grpc.method_handlers_generic_handler(service.full_name, methods)

    def _unary(self, path: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
        async def handle(request: bytes, context: Context) -> bytes:
            answers: list[bytes] = []

            async def keep(message: bytes) -> None:
                answers.append(message)

            await self._relay(path, request, context, keep)
            if len(answers) != 1:
                raise ServiceError(Reason.BACKEND_LOST, "the backend answered without a message")
            return answers[0]

        return handle

    def _stream(self, path: str) -> Callable[[bytes, Context], Awaitable[None]]:
        # A coroutine that writes, not an async generator: were the client to go away while a write
        # waits, a generator would be closed by the garbage collector, and the backend told late.
        async def handle(request: bytes, context: Context) -> None:
            await self._relay(path, request, context, context.write)

        async def handle_joined(request: bytes, context: Context) -> None:
            async with Joined(context.write, self._pace) as joined:
                failure = await self.relay(path, request, context, joined.put)
            if failure is not None:
                await failure.refuse(context)

        return handle_joined if path in JOINABLE else handle

    async def _relay(self, path: str, request: bytes, context: Context, send: Send) -> None:
        failure = await self.relay(path, request, context, send)
        if failure is not None:
            await failure.refuse(context)

    async def relay(
        self, path: str, request: bytes, context: Context, send: Send
    ) -> Failure | None:
        """Make the call on a backend, or several in turn. Returns how the backend refused it, None
        when it ended well; raises ServiceError for what is the router's own to say."""
        with self._gate.enter(), self._measure(path, context) as measured:

            async def attempts(send: Send) -> Failure | None:
                return await self._attempts(path, request, context, send, measured)

            return await admitted(self._admission, path, request, context, send, attempts)

    async def _attempts(
        self, path: str, request: bytes, context: Context, send: Send, measured: Measured
    ) -> Failure | None:
        async def pass_on(message: bytes) -> None:
            measured.message()
            await send(message)

        unary = path in self._unary_paths
        good, failure = await self._tries.run(
            path, request, context, pass_on, measured, unary=unary
        )
        if good:
            return None
        measured.code = failure.code.name if failure else "UNAVAILABLE"
        return self._told(failure)

    def _measure(self, path: str, context: Context) -> AbstractContextManager[Measured]:
        return self._metrics.measure(path, context.invocation_metadata())

    def _told(self, failure: Failure | None) -> Failure:
        """The backend's own words where there are any, else the router's, raised: what a broken
        connection leaves behind names addresses that are no client's business."""
        if failure is not None and not failure.unreachable:
            return failure
        reason, message = (
            (Reason.NO_BACKEND, "no backend can take calls now")
            if failure is None
            else (Reason.BACKEND_LOST, "the backend of this call went away")
        )
        raise ServiceError(reason, message, retry_after=self._limits.retry_after_seconds)

    def _abort(self, path: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """Request ids are not known here: every backend that may hold requests is asked."""

        async def handle(request: bytes, context: Context) -> bytes:
            with self._gate.enter(), self._measure(path, context) as measured:
                failures: list[Failure] = []
                for answer in await self.ask_all(path, request, context):
                    if isinstance(answer, bytes):
                        return answer
                    failures.append(answer)
                # A backend that did not answer may hold the request: NOT_FOUND might be a lie.
                failures.sort(key=lambda failure: failure.code is grpc.StatusCode.NOT_FOUND)
                measured.code = failures[0].code.name if failures else "UNAVAILABLE"
                return await self._told(failures[0] if failures else None).refuse(context)

        return handle

    def listed(self, path: str) -> Callable[[bytes, Context], Awaitable[bytes]]:
        """Messages of which all that matters is a repeated field: their bytes in a row are the
        message that holds the elements of all."""

        async def handle(request: bytes, context: Context) -> bytes:
            with self._gate.enter(), self._measure(path, context) as measured:
                asked = self._registry.per_model()
                answers = await self.ask_all(path, request, context, asked)
                listed = [answer for answer in answers if isinstance(answer, bytes)]
                if listed:
                    return b"".join(listed)
                failure = next((a for a in answers if isinstance(a, Failure)), None)
                measured.code = failure.code.name if failure else "UNAVAILABLE"
                return await self._told(failure).refuse(context)

        return handle

    async def ask_all(
        self,
        path: str,
        request: bytes,
        context: Context,
        backends: Sequence[Backend] | None = None,
    ) -> list[bytes | Failure]:
        """What each of them answers to a unary call of a few seconds at most; None: each that can
        be reached."""

        async def ask(backend: Backend) -> bytes | Failure:
            left = context.time_remaining()
            limit = self._limits.abort_seconds
            try:
                channel: Any = backend.channel
                answer: bytes = await channel.unary_unary(path)(
                    request,
                    timeout=limit if left is None else min(limit, left),
                    metadata=outgoing(context.invocation_metadata()),
                )
                return answer
            except grpc.aio.AioRpcError as error:
                return Failure.of(error)

        asked = self._registry.reachable() if backends is None else backends
        return await asyncio.gather(*(ask(backend) for backend in asked))
