"""TLS between real clients, a router and backends, while certificates change."""

from __future__ import annotations

import asyncio
import socket
import ssl
import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from neo_common.grpc.server import ServiceServer
from neo_common.grpc.settings import ListenSettings
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import inference_pb2_grpc
from router.app import running
from router.config import RouterConfig
from router.relay import EOF
from tests.support.credentials import Authority
from tests.support.secured import FAST, backend, usable

HOSTS = ("localhost", "127.0.0.1")
ASK = pb.GenerateRequest(text="hi")
OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1),)


def tls(authority: Authority, name: str, **more: Any) -> dict[str, Any]:
    certificate, key = authority.issue(name, *HOSTS)
    return {"tls_cert": certificate, "tls_key": key, **more}


def half_a_rotation(settings: ListenSettings) -> None:
    """A key that is not yet, or no longer, the certificate's."""
    Path(settings.tls_key).write_text("half a rotation")


def trusting(authority: Authority, shown: tuple[str, str] | None = None) -> Any:
    key = Path(shown[1]).read_bytes() if shown else None
    certificate = Path(shown[0]).read_bytes() if shown else None
    return grpc.ssl_channel_credentials(authority.ca.cert_pem.bytes(), key, certificate)


@asynccontextmanager
async def stub(address: str, credentials: Any) -> AsyncIterator[Any]:
    async with grpc.aio.secure_channel(address, credentials, options=OWN_CONNECTION) as channel:
        yield inference_pb2_grpc.InferenceServiceStub(channel)


def handshake(address: str, authority: Authority, **limits: Any) -> tuple[str, str]:
    """(serial number of the certificate that the server shows, TLS version). Raises OSError."""
    context = ssl.create_default_context(cadata=authority.ca.cert_pem.bytes().decode())
    context.set_alpn_protocols(["h2"])
    for name, value in limits.items():
        setattr(context, name, value)
    host, _, port = address.rpartition(":")
    with (
        socket.create_connection((host, int(port)), timeout=10) as plain,
        context.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        shown: Any = secure.getpeercert()
        return str(shown["serialNumber"]), str(secure.version())


async def test_client_router_and_backend_speak_tls_to_each_other(tmp_path: Path) -> None:
    outside, inside = Authority(tmp_path), Authority(tmp_path)
    own = inside.issue("router-at-backends", "router.neo")
    listening = ListenSettings(**tls(inside, "backend"), tls_ca=inside.file)
    async with backend(listening) as fake:
        config = RouterConfig(
            backends=(fake.address,), **FAST, **tls(outside, "router"), peer_tls_ca=inside.file,
            peer_tls_cert=own[0], peer_tls_key=own[1], peer_tls_name="localhost",
        )  # fmt: skip
        async with running(config) as router:
            await usable(router)
            async with stub(router.server.address, trusting(outside)) as client:
                assert (await client.Generate(ASK, timeout=30)).model == "a"
            for wrong in (trusting(inside), grpc.local_channel_credentials()):
                async with stub(router.server.address, wrong) as client:
                    with pytest.raises(grpc.aio.AioRpcError) as caught:
                        await client.Generate(ASK, timeout=30)
                    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        # The backend's port takes none but those that its authority has signed.
        async with stub(fake.address, trusting(inside)) as client:
            with pytest.raises(grpc.aio.AioRpcError):
                await client.Generate(ASK, timeout=30)
        stranger = outside.issue("stranger", "router.neo")
        async with stub(fake.address, trusting(inside, stranger)) as client:
            with pytest.raises(grpc.aio.AioRpcError):
                await client.Generate(ASK, timeout=30)
        assert len(fake.requests) == 1


async def test_new_certificates_serve_new_connections_and_old_streams_go_on(
    tmp_path: Path,
) -> None:
    authority = Authority(tmp_path)
    settings = ListenSettings(**tls(authority, "server"))
    async with backend(settings, hold=asyncio.Event()) as fake:
        first, _ = await asyncio.to_thread(handshake, fake.address, authority)
        async with stub(fake.address, trusting(authority)) as client:
            call = client.GenerateStream(ASK, timeout=60)
            assert (await call.read()).deltas
            half_a_rotation(settings)
            kept, _ = await asyncio.to_thread(handshake, fake.address, authority)
            assert kept == first, "files that do not fit together are not taken"
            replacement = Authority(tmp_path)
            replacement.issue("server", *HOSTS)
            second, _ = await asyncio.to_thread(handshake, fake.address, replacement)
            assert second != first
            assert fake.hold is not None
            fake.hold.set()
            while (message := await call.read()) is not EOF:
                last = message
            assert last.usage.completion_tokens == 3
        async with stub(fake.address, trusting(replacement)) as client:
            assert await client.Generate(ASK, timeout=30)


async def test_the_authority_of_clients_may_change_too(tmp_path: Path) -> None:
    authority, old, new = Authority(tmp_path), Authority(tmp_path), Authority(tmp_path)
    trusted = tmp_path / "clients.pem"
    trusted.write_bytes(old.ca.cert_pem.bytes())
    settings = ListenSettings(**tls(authority, "server"), tls_ca=str(trusted))
    async with backend(settings) as fake:
        by_old, by_new = old.issue("old", "client"), new.issue("new", "client")

        async def may_call(shown: tuple[str, str]) -> bool:
            async with stub(fake.address, trusting(authority, shown)) as client:
                try:
                    await client.Generate(ASK, timeout=30)
                except grpc.aio.AioRpcError:
                    return False
                return True

        assert [await may_call(by_old), await may_call(by_new)] == [True, False]
        trusted.write_bytes(new.ca.cert_pem.bytes())
        assert [await may_call(by_old), await may_call(by_new)] == [False, True]


async def test_nothing_older_than_tls_1_2(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with backend(ListenSettings(**tls(authority, "server"))) as fake:

        def at_most(version: ssl.TLSVersion) -> str:
            return handshake(fake.address, authority, maximum_version=version)[1]

        assert await asyncio.to_thread(at_most, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        assert await asyncio.to_thread(at_most, ssl.TLSVersion.TLSv1_2) == "TLSv1.2"

        def old() -> None:
            context = ssl.create_default_context(cadata=authority.ca.cert_pem.bytes().decode())
            # OpenSSL's own reluctance out of the way: it must be the server that refuses.
            context.set_ciphers("ALL:@SECLEVEL=0")
            with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
                context.minimum_version = ssl.TLSVersion.TLSv1
                context.maximum_version = ssl.TLSVersion.TLSv1_1
            host, _, port = fake.address.rpartition(":")
            with (
                socket.create_connection((host, int(port)), timeout=10) as plain,
                context.wrap_socket(plain, server_hostname="localhost"),
            ):
                raise AssertionError("the server took TLS 1.1")

        with pytest.raises(ssl.SSLError, match=r"EOF|ALERT"):
            await asyncio.to_thread(old)


async def test_files_that_cannot_be_used_are_named_at_the_start(tmp_path: Path) -> None:
    authority, other = Authority(tmp_path), Authority(tmp_path)
    good = tls(authority, "server")
    _, foreign_key = other.issue("other", *HOSTS)
    no_pem = tmp_path / "no.pem"
    no_pem.write_text("hello")
    for change, problem in (
        ({"tls_cert": str(tmp_path / "absent")}, "tls_cert: cannot read .*absent"),
        ({"tls_key": foreign_key}, "tls_cert, tls_key: .* must be a PEM certificate and its"),
        ({"tls_cert": str(no_pem)}, "tls_cert, tls_key: .*no.pem"),
        ({"tls_ca": str(no_pem)}, "tls_ca: .*no.pem must hold PEM certificates"),
    ):
        server = ServiceServer("127.0.0.1:0", [], settings=ListenSettings(**{**good, **change}))
        with pytest.raises(ValueError, match=problem):
            await server.start()
