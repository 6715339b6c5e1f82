"""Who may call over HTTP: keys, tokens and certificates are those of the gRPC listener."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.support.credentials import AUDIENCE, ISSUER, Authority, Signer, jwks, write_keys
from tests.support.fake_backend import fake_backends
from tests.support.http import COMPLETION, http_front

HOSTS = ("localhost", "127.0.0.1")


def bearer(credentials: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credentials}"}


def trusting(authority: Authority, shown: tuple[str, str] | None = None) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.ca.cert_pem.bytes().decode())
    if shown is not None:
        context.load_cert_chain(*shown)
    return context


def listening(authority: Authority, **more: Any) -> dict[str, Any]:
    certificate, key = authority.issue("router", *HOSTS)
    return {"tls_cert": certificate, "tls_key": key, **more}


def half_a_rotation(key: str) -> None:
    Path(key).write_text("half a rotation")


async def test_keys_and_tokens(tmp_path: Path) -> None:
    keys = write_keys(tmp_path / "keys.yaml", user=["inference"])
    signer = Signer.make("ES256", "k1")
    (tmp_path / "jwks.json").write_bytes(jwks(signer))
    settings = {
        "api_keys": str(tmp_path / "keys.yaml"), "jwt_keys": str(tmp_path / "jwks.json"),
        "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE,
    }  # fmt: skip
    async with fake_backends(1) as (a,), http_front([a], **settings) as http:

        async def ask(**headers: str) -> Any:
            return await http.post("/v1/completions", COMPLETION, headers=headers)

        for headers in ({}, bearer("sk-other"), bearer(keys["user"][:-1]), {"Authorization": "x"}):
            reply = await ask(**headers)
            assert (reply.status, reply.error["code"]) == (401, "UNAUTHENTICATED")
            assert reply.error["type"] == "authentication_error"
            assert reply.headers["WWW-Authenticate"] == "Bearer"
        assert (await http.get("/v1/models")).status == 401
        assert (await http.get("/health")).status == 200, "for anybody"
        # Refused before the body is looked at.
        assert (await http.post("/v1/completions", b"not json")).status == 401
        assert a.requests == []

        assert (await ask(**bearer(keys["user"]))).status == 200
        assert a.metadata[-1]["x-neo-tenant"] == "user-tenant"
        assert "authorization" not in a.metadata[-1]
        # Only services may speak for others.
        await ask(**bearer(keys["user"]), **{"x-neo-tenant": "somebody"})
        assert a.metadata[-1]["x-neo-tenant"] == "user-tenant"
        assert (await ask(**bearer(signer.token(sub="me", roles=["inference"])))).status == 200
        reply = await ask(**bearer(signer.token(sub="me", roles=["nothing"])))
        assert (reply.status, reply.error["code"]) == (403, "PERMISSION_DENIED")


async def test_without_authentication_callers_may_name_a_tenant() -> None:
    async with fake_backends(1) as (a,), http_front([a]) as http:
        headers = {"x-neo-tenant": "t", "traceparent": "00-1-2-01", "x-other": "y"}
        await http.post("/v1/completions", COMPLETION, headers=headers)
        assert a.metadata[-1]["x-neo-tenant"] == "t"
        assert a.metadata[-1]["traceparent"] == "00-1-2-01"
        assert "x-other" not in a.metadata[-1]
        await http.post("/v1/completions", {**COMPLETION, "prompt_cache_key": "chat \u00e9"})
        session = str(a.metadata[-1]["x-neo-session-id"])
        await http.post("/v1/completions", COMPLETION, headers={"x-neo-session-id": session})
        assert a.metadata[-1]["x-neo-session-id"] == session
        reply = await http.post("/v1/completions", COMPLETION, headers={"x-neo-tenant": "t" * 1000})
        assert (reply.status, reply.error["code"]) == (400, "INVALID_ARGUMENT")


async def test_tls_and_a_certificate_that_changes(tmp_path: Path) -> None:
    authority = Authority(tmp_path)
    async with (
        fake_backends(1) as (a,),
        http_front([a], ssl=trusting(authority), **listening(authority)) as http,
    ):

        async def serial() -> Any:
            """Of the certificate that a new connection is shown."""
            host, _, port = http.url.removeprefix("https://").rpartition(":")
            _, writer = await asyncio.open_connection(host, int(port), ssl=trusting(authority))
            writer.close()
            return writer.get_extra_info("peercert")["serialNumber"]

        assert (await http.post("/v1/completions", COMPLETION)).status == 200
        first = await serial()
        assert await serial() == first
        _, key = authority.issue("router", *HOSTS)
        assert await serial() != first
        second = await serial()
        half_a_rotation(key)
        assert await serial() == second
        with pytest.raises(aiohttp.ClientError):
            async with http.session.get(http.url.replace("https", "http") + "/health"):
                pass


async def test_certificates_of_clients(tmp_path: Path) -> None:
    authority, stranger = Authority(tmp_path), Authority(tmp_path)
    known = authority.issue("app", "app.example", common_name="app")
    settings = listening(authority, tls_ca=authority.file, tls_client_roles=("app=inference",))
    async with (
        fake_backends(1) as (a,),
        http_front([a], ssl=trusting(authority, known), **settings) as http,
    ):
        assert (await http.post("/v1/completions", COMPLETION)).status == 200
        assert a.metadata[-1]["x-neo-tenant"] == "app"
        for shown, status in (
            (authority.issue("other", "other.example", common_name="other"), 401),
            (stranger.issue("app2", "app.example", common_name="app"), None),
            (None, None),
        ):
            connector = aiohttp.TCPConnector(ssl=trusting(authority, shown))
            async with aiohttp.ClientSession(connector=connector) as session:
                asking = session.post(http.url + "/v1/completions", json=COMPLETION)
                if status is None:
                    with pytest.raises(aiohttp.ClientError):
                        await asking
                else:
                    assert (await asking).status == status


async def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("no certificate")
    where = str(tmp_path / "x.pem")
    with pytest.raises(ValueError, match="tls_cert"):
        async with http_front([], tls_cert=where, tls_key=where):
            pass
