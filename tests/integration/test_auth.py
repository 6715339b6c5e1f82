"""Who may call what: a real router with keys and tokens, a backend that trusts the router alone."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import message_factory
from grpc_health.v1 import health_pb2, health_pb2_grpc

from neo_common.errors import ErrorDetails
from neo_common.grpc.auth import needed
from neo_common.grpc.principal import Role
from neo_common.grpc.settings import ListenSettings
from neo_common.grpc.tls import TlsFiles, channel_credentials
from protos.neo.v1 import (
    engine_pb2,
    engine_pb2_grpc,
    inference_pb2_grpc,
    router_pb2,
    router_pb2_grpc,
)
from protos.neo.v1 import inference_pb2 as pb
from router import compat
from router.app import ROUTER_SERVICE, Router, running
from router.config import RouterConfig
from router.forward import SERVICE
from router.relay import EOF
from tests.support.credentials import AUDIENCE, ISSUER, Authority, Signer, jwks, write_keys
from tests.support.fake_backend import FakeBackend
from tests.support.secured import FAST, backend, usable

ASK = pb.GenerateRequest(text="hi")
Metadata = tuple[tuple[str, str], ...]


@dataclass
class System:
    """A router and a backend with authentication, and the keys of callers by their role."""

    router: Router
    backend: FakeBackend
    channel: grpc.aio.Channel
    admin: grpc.aio.Channel
    keys: dict[str, str]
    signer: Signer
    key_file: Path
    stub: Any = field(init=False)

    def __post_init__(self) -> None:
        self.stub = inference_pb2_grpc.InferenceServiceStub(self.channel)


def bearer(credentials: str) -> Metadata:
    return (("authorization", f"Bearer {credentials}"),)


@contextmanager
def served(data: bytes) -> Iterator[str]:
    """A URL that answers with `data`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/keys" else 302)
            self.send_header("location", "/keys")
            self.end_headers()
            self.wfile.write(data if self.path == "/keys" else b"")

        def log_message(self, format: str, *args: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@asynccontextmanager
async def system(directory: Path, **named: Any) -> AsyncIterator[System]:
    authority, signer = Authority(directory), Signer.make("ES256", "k1")
    certificate, private = authority.issue("backend", "127.0.0.1")
    inside, outside = directory / "inside.yaml", directory / "outside.yaml"
    own_key = directory / "router.key"
    own_key.write_text(write_keys(inside, router=["service"])["router"] + "\n")
    keys = write_keys(outside, user=["inference"], ops=["admin"], watcher=["service"])
    listening = ListenSettings(tls_cert=certificate, tls_key=private, api_keys=str(inside))
    with served(jwks(signer)) as issuer:
        async with backend(listening, **named) as fake:
            config = RouterConfig(
                backends=(fake.address,), **FAST, admin_listen="127.0.0.1:0",
                api_keys=str(outside), jwt_keys=f"{issuer}/keys", jwt_issuer=ISSUER,
                jwt_audience=AUDIENCE, peer_tls_ca=authority.file, peer_api_key=str(own_key),
            )  # fmt: skip
            async with (
                running(config) as router,
                grpc.aio.insecure_channel(router.server.address) as channel,
                grpc.aio.insecure_channel(router.server.admin_address) as admin,
            ):
                await usable(router)
                yield System(router, fake, channel, admin, keys, signer, outside)


async def refusal(call: Any) -> tuple[str, str]:
    """(status, reason) of a call, unary or not."""

    async def finish() -> None:
        if hasattr(call, "__await__"):
            await call
            return
        while await call.read() is not EOF:
            pass

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await finish()
    return caught.value.code().name, ErrorDetails(caught.value).reason


UNAUTHENTICATED = ("UNAUTHENTICATED", "UNAUTHENTICATED")
DENIED = ("PERMISSION_DENIED", "PERMISSION_DENIED")


async def test_keys_and_tokens_open_calls_and_streams(tmp_path: Path) -> None:
    async with system(tmp_path) as it:
        for credentials in (it.keys["user"], it.signer.token(tenant="from-token")):
            answer = await it.stub.Generate(ASK, metadata=bearer(credentials), timeout=30)
            assert answer.model == "a"
            call = it.stub.GenerateStream(ASK, metadata=bearer(credentials), timeout=30)
            assert len([message async for message in call]) == 4
        wrong = bearer(it.signer.token(aud="other"))
        for metadata in ((), wrong, bearer("neo_nonsense"), (("authorization", "Basic x"),)):
            named = {"metadata": metadata, "timeout": 30}
            assert await refusal(it.stub.Generate(ASK, **named)) == UNAUTHENTICATED
            assert await refusal(it.stub.GenerateStream(ASK, **named)) == UNAUTHENTICATED
        assert len(it.backend.requests) == 4, "nobody refused may reach a backend"
        health: Any = health_pb2_grpc.HealthStub(it.channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=30)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


async def test_backends_learn_the_tenant_and_never_the_credentials(tmp_path: Path) -> None:
    async with system(tmp_path) as it:
        mine = bearer(it.keys["user"])
        await it.stub.Generate(
            ASK, metadata=(*mine, ("x-neo-tenant", "rich"), ("x-mine", "1")), timeout=30
        )
        token = it.signer.token(tenant="from-token")
        await it.stub.Generate(ASK, metadata=bearer(token), timeout=30)
        service = (*bearer(it.keys["watcher"]), ("x-neo-tenant", "rich"))
        await it.stub.Generate(ASK, metadata=service, timeout=30)
        tenants = [seen.get("x-neo-tenant") for seen in it.backend.metadata]
        assert tenants == ["user-tenant", "from-token", "rich"]
        assert it.backend.metadata[0]["x-mine"] == "1"
        sent = str(it.backend.metadata)
        assert it.keys["user"] not in sent
        assert token not in sent


async def test_every_method_refuses_strangers_and_the_wrong_role(tmp_path: Path) -> None:
    """By the services' descriptors, so that no method is forgotten."""
    async with system(tmp_path) as it:
        on = [(it.channel, s) for s in (SERVICE, *compat.SERVICES)] + [(it.admin, ROUTER_SERVICE)]
        tried = 0
        for channel, service in on:
            for method in service.methods:
                path = f"/{service.full_name}/{method.name}"
                if not needed(path):
                    continue
                request = message_factory.GetMessageClass(method.input_type)()
                kinds = "stream" if method.client_streaming else "unary"
                kinds += "_stream" if method.server_streaming else "_unary"
                call: Any = getattr(channel, kinds)(
                    path, request_serializer=lambda message: message.SerializeToString()
                )
                argument = iter([request]) if method.client_streaming else request
                assert await refusal(call(argument, timeout=30)) == UNAUTHENTICATED, path
                wrong = "user" if Role.INFERENCE not in needed(path) else None
                if wrong:
                    argument = iter([request]) if method.client_streaming else request
                    named = {"metadata": bearer(it.keys[wrong]), "timeout": 30}
                    assert await refusal(call(argument, **named)) == DENIED, path
                tried += 1
        assert tried > 20
        assert not it.backend.requests


async def test_operators_are_served_on_their_own_port_alone(tmp_path: Path) -> None:
    async with system(tmp_path) as it:
        ops = bearer(it.keys["ops"])
        operator: Any = router_pb2_grpc.RouterServiceStub(it.admin)
        (known,) = (
            await operator.ListBackends(router_pb2.ListBackendsRequest(), metadata=ops, timeout=30)
        ).backends
        request = router_pb2.DrainBackendRequest(address=known.address)
        await operator.DrainBackend(request, metadata=ops, timeout=30)
        assert it.backend.drained == 1
        public: Any = router_pb2_grpc.RouterServiceStub(it.channel)
        status, _ = await refusal(public.DrainBackend(request, metadata=ops, timeout=30))
        assert status == "UNIMPLEMENTED"
        inference: Any = inference_pb2_grpc.InferenceServiceStub(it.admin)
        status, _ = await refusal(inference.Generate(ASK, metadata=ops, timeout=30))
        assert status == "UNIMPLEMENTED"


async def test_a_backend_takes_calls_of_its_router_alone(tmp_path: Path) -> None:
    async with system(tmp_path) as it:
        credentials = channel_credentials(TlsFiles("", "", it.router.config.peer_tls_ca, "tls"))
        async with grpc.aio.secure_channel(it.backend.address, credentials) as channel:
            inference: Any = inference_pb2_grpc.InferenceServiceStub(channel)
            engine: Any = engine_pb2_grpc.EngineServiceStub(channel)
            theirs = bearer(it.keys["user"])
            for metadata in ((), theirs, (("x-neo-tenant", "rich"),)):
                named = {"metadata": metadata, "timeout": 30}
                assert await refusal(inference.Generate(ASK, **named)) == UNAUTHENTICATED
                drain = engine_pb2.DrainRequest()
                assert await refusal(engine.Drain(drain, **named)) == UNAUTHENTICATED
        assert not it.backend.requests
        assert it.backend.drained == 0


async def test_keys_change_while_streams_run(tmp_path: Path) -> None:
    async with system(tmp_path, hold=asyncio.Event()) as it:
        old = bearer(it.keys["user"])
        call = it.stub.GenerateStream(ASK, metadata=old, timeout=60)
        assert (await call.read()).deltas
        new = write_keys(it.key_file, user=["inference"])["user"]
        assert await refusal(it.stub.Generate(ASK, metadata=old, timeout=30)) == UNAUTHENTICATED
        assert await it.stub.Generate(ASK, metadata=bearer(new), timeout=30)
        assert it.backend.hold is not None
        it.backend.hold.set()
        while (message := await call.read()) is not EOF:
            last = message
        assert last.usage.completion_tokens == 3, "a stream that was let in goes on"


async def test_refusals_say_nothing_that_helps_a_stranger(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with system(tmp_path) as it:
        token = it.signer.token(exp=1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await it.stub.Generate(ASK, metadata=bearer(token), timeout=30)
        assert "expired" in (caught.value.details() or "")
        assert token not in str(caught.value)
        assert token not in caplog.text
        assert json.dumps(it.keys)[2:60] not in caplog.text
