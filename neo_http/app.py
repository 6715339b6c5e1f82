"""The routes of OpenAI's API, and what holds for all of them: who may call, what may be sent, how
errors are told."""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
from aiohttp import web

from neo_common.errors import Reason, ServiceError
from neo_common.grpc import principal
from neo_common.grpc.principal import Principal
from neo_http.ask import Asker
from neo_http.call import HttpCall, Inference
from neo_http.chat import read_chat
from neo_http.completions import read_completion
from neo_http.errors import CallFailed, Problem, problem_of
from neo_http.generate import Answerer
from neo_http.metrics import HttpMetrics
from neo_http.question import Question
from neo_http.settings import HttpSettings
from neo_http.sse import Events
from neo_http.vocabulary import Vocabulary
from protos.neo.v1 import inference_pb2 as pb

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
_log = logging.getLogger(__name__)
_SERVICE = "/neo.v1.InferenceService/"
CLIENT_GONE = 499
"""What metrics call it when the client hung up first."""


class Admission(Protocol):
    """Who may call; see neo_common.grpc.auth.Access."""

    async def admit(self, method: str, context: Any) -> Principal: ...


@dataclass(frozen=True)
class Parts:
    """What the service that listens plugs in."""

    inference: Inference
    access: Admission
    admitted: Callable[[], AbstractContextManager[None]]
    """Counts a request for drains, and refuses it while draining; see neo_common.grpc.guard."""
    healthy: Callable[[], bool]
    """Whether a request would find somebody to serve it."""
    settings: HttpSettings
    metrics: HttpMetrics


class BodyRoom:
    """At most so many bytes of bodies that are coming in or being answered."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @contextmanager
    def taking(self) -> Iterator[Callable[[int], None]]:
        """To be told of one body's bytes, which count until the block ends. Raises ServiceError
        when there is no room for more."""
        mine = 0

        def take(count: int) -> None:
            nonlocal mine
            if self._held + count > self._most:
                raise ServiceError(
                    Reason.OVERLOADED, "too many large requests are under way", retry_after=1.0
                )
            self._held += count
            mine += count

        try:
            yield take
        finally:
            self._held -= mine


class Api:
    """The handlers. Used by one event loop."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._vocabulary = Vocabulary()
        self._started = int(time.time())
        self._bodies = BodyRoom(parts.settings.http_bodies_mib << 20)
        self.busy: set[Any] = set()
        """Connections with a request under way, as aiohttp's protocols."""

    def application(self) -> web.Application:
        app = web.Application(
            middlewares=[self._guarded],
            client_max_size=self._parts.settings.http_max_body_mib << 20,
        )
        app.on_response_prepare.append(_name_server)
        app.router.add_get("/health", self._health)
        app.router.add_post("/v1/completions", self._generating(read_completion))
        app.router.add_post("/v1/chat/completions", self._generating(read_chat))
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/v1/models/{model:.+}", self._model)
        return app

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Every failure becomes an error in OpenAI's form; every request is counted."""
        resource = request.match_info.route.resource
        route = "other" if resource is None else resource.canonical
        status = CLIENT_GONE
        self.busy.add(request.protocol)
        try:
            response = await _answered(route, handler(request))
            status = response.status
        finally:
            self.busy.discard(request.protocol)
            self._parts.metrics.requests.labels(route, status).inc()
        return response

    async def _health(self, request: web.Request) -> web.StreamResponse:
        try:
            with self._parts.admitted():
                healthy = self._parts.healthy()
        except ServiceError:  # draining
            healthy = False
        return web.json_response(
            {"status": "ok" if healthy else "unavailable"}, status=200 if healthy else 503
        )

    async def _models(self, request: web.Request) -> web.StreamResponse:
        ask = await self._enter(request, "ListModels")
        answer = await ask("ListModels", pb.ListModelsRequest(), pb.ListModelsResponse)
        models = [self._describe(model) for model in answer.models]
        return _json({"object": "list", "data": models})

    async def _model(self, request: web.Request) -> web.StreamResponse:
        ask = await self._enter(request, "GetModel")
        wanted = pb.GetModelRequest(model=request.match_info["model"])
        answer = await ask("GetModel", wanted, pb.GetModelResponse)
        return _json(self._describe(answer.model))

    def _describe(self, model: pb.Model) -> dict[str, Any]:
        return {
            "id": model.name,
            "object": "model",
            "created": self._started,
            "owned_by": "neo",
            "root": model.name,
            "max_model_len": model.max_context_tokens,
        }

    async def _enter(self, request: web.Request, method: str) -> Asker:
        """Raises ServiceError when the caller may not call `method`."""
        call = HttpCall(request)
        principal.enter(await self._parts.access.admit(_SERVICE + method, call))
        return Asker(self._parts.inference, call)

    def _generating(self, read: Callable[[bytes], Question]) -> Handler:
        async def handle(request: web.Request) -> web.StreamResponse:
            ask = await self._enter(request, "GenerateStream")
            with self._parts.admitted(), self._bodies.taking() as take:
                question = read(await self._body(request, take))
                if question.timeout_seconds is not None:
                    ask.call.limit(question.timeout_seconds)
                if question.session:
                    ask.call.of_session(question.session)
                answerer = Answerer(question, ask, self._vocabulary)
                headers = {"x-request-id": question.identity}
                if question.stream:
                    return await _streamed(answerer, Events(request, headers))
                return _json(await answerer.whole(), headers)

        return handle

    async def _body(self, request: web.Request, take: Callable[[int], None]) -> bytes:
        """`take` is told of its bytes as they come. Raises ServiceError, or an HTTPException."""
        if request.content_type != "application/json":
            # Browsers ask before they send this type to other sites, and need not for others.
            raise web.HTTPUnsupportedMediaType(text="Content-Type must be application/json")
        if request.headers.get("Content-Encoding", "identity") != "identity":
            raise web.HTTPUnsupportedMediaType(text="Content-Encoding is not supported")
        size, most = request.content_length or 0, self._parts.settings.http_max_body_mib << 20
        body = bytearray()
        try:
            async with asyncio.timeout(self._parts.settings.http_body_seconds):
                while size <= most and (piece := await request.content.readany()):
                    take(len(piece))
                    body += piece
                    size = max(size, len(body))
        except TimeoutError:
            raise web.HTTPRequestTimeout(text="the body did not arrive in time") from None
        if size > most:
            raise web.HTTPRequestEntityTooLarge(most, size)
        return bytes(body)


async def _name_server(request: web.Request, response: web.StreamResponse) -> None:
    response.headers["Server"] = "neo"  # else aiohttp says its own version and Python's


async def _answered(route: str, work: Awaitable[web.StreamResponse]) -> web.StreamResponse:
    """What the client is sent, whatever happens. Raises only when it is gone."""
    try:
        return await work
    except web.HTTPException as error:
        return _refusal(_of_http(error), error)
    except ConnectionError:
        raise
    except Exception as error:
        problem = _problem(route, error)
        response = _refusal(problem)
        if problem.code == Reason.DRAINING.value:
            response.force_close()  # so that the client's next request finds another server
        return response


async def _streamed(answerer: Answerer, events: Events) -> web.StreamResponse:
    try:
        await answerer.stream(events.send)
    except ConnectionError:
        raise
    except Exception as error:
        if not events.begun:
            raise
        return await events.fail(_problem("a stream", error))
    return await events.finish()


def _json(value: Any, headers: dict[str, str] | None = None) -> web.Response:
    return web.Response(
        body=msgspec.json.encode(value), content_type="application/json", headers=headers
    )


def _refusal(problem: Problem, about: web.HTTPException | None = None) -> web.Response:
    headers = problem.headers()
    if about is not None and "Allow" in about.headers:
        headers["Allow"] = about.headers["Allow"]
    response = _json(problem.body(), headers)
    response.set_status(problem.status)
    return response


def _of_http(error: web.HTTPException) -> Problem:
    """Our own words for what aiohttp refuses, and a reason for programs."""
    said = {
        404: ("there is nothing at this path", "UNKNOWN_PATH"),
        405: ("this path does not take this method", "METHOD_NOT_ALLOWED"),
        408: (error.text or "", "BODY_TIMEOUT"),
        413: ("the body is larger than this server takes", "BODY_TOO_LARGE"),
        415: (error.text or "", "UNSUPPORTED_MEDIA_TYPE"),
    }
    message, code = said.get(error.status, (error.reason, Reason.INVALID_ARGUMENT.value))
    return Problem(error.status, message, code)


def _problem(where: str, error: Exception) -> Problem:
    """Our own bugs get a ticket, which is in the log beside the traceback."""
    if isinstance(error, ServiceError | CallFailed):
        return problem_of(error)
    ticket = uuid.uuid4().hex[:12]
    _log.error("%s failed, ticket %s", where, ticket, exc_info=error)
    return Problem(500, f"internal error, ticket {ticket}", Reason.INTERNAL_ERROR.value)
