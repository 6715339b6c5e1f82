"""Tokens: what is accepted, and the ways in that must be closed."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from neo_common.errors import Reason, ServiceError
from neo_common.grpc import tokens
from neo_common.grpc.principal import Role
from neo_common.grpc.tokens import Claims, FileKeys, Keys, Tokens, UrlKeys, parse_keys
from tests.support.credentials import AUDIENCE, ISSUER, Signer, jwks

CLAIMS = Claims(ISSUER, AUDIENCE, leeway_seconds=5)
RSA = Signer.make("RS256", "rsa")
EC = Signer.make("ES256", "ec")
ED = Signer.make("EdDSA", "ed")


class Fixed:
    """Keys that can be exchanged."""

    def __init__(self, *signers: Signer) -> None:
        self.known = parse_keys(jwks(*signers), "test")

    async def keys(self) -> Keys:
        return self.known

    async def look_again(self) -> Keys:
        return self.known


def checker(*signers: Signer, **named: Any) -> Tokens:
    return Tokens(Fixed(*signers), CLAIMS, **named)


async def why_refused(token: str, *signers: Signer) -> str:
    with pytest.raises(ServiceError) as caught:
        await checker(*signers).check(token)
    assert caught.value.reason is Reason.UNAUTHENTICATED
    assert token not in caught.value.message
    return caught.value.message


def forged(header: dict[str, Any], secret: bytes | None, **claims: Any) -> str:
    """A token put together by hand: signed with HMAC, or not at all."""
    said = {"iss": ISSUER, "aud": AUDIENCE, "sub": "mallory", "exp": time.time() + 60, **claims}
    body = b".".join(
        base64.urlsafe_b64encode(json.dumps(part).encode()).rstrip(b"=") for part in (header, said)
    )
    mac = b"" if secret is None else hmac.digest(secret, body, hashlib.sha256)
    return (body + b"." + base64.urlsafe_b64encode(mac).rstrip(b"=")).decode()


@pytest.mark.parametrize("signer", [RSA, EC, ED], ids=lambda signer: signer.algorithm)
async def test_each_algorithm_is_taken_from_its_own_kind_of_key(signer: Signer) -> None:
    principal = await checker(RSA, EC, ED).check(signer.token(tenant="t1", roles=["admin", "x"]))
    assert principal.name == "somebody"
    assert principal.tenant == "t1"
    assert principal.roles == {Role.ADMIN}
    assert (await checker(signer).check(signer.token(headers={}))).name == "somebody", "without kid"


async def test_without_roles_and_tenant_it_is_the_subject_who_may_generate() -> None:
    principal = await checker(ED).check(ED.token())
    assert (principal.tenant, principal.roles) == ("somebody", {Role.INFERENCE})
    assert (await checker(ED).check(ED.token(roles=[]))).roles == frozenset()


@pytest.mark.parametrize(
    ("claims", "why"),
    [
        ({"exp": time.time() - 60}, "expired"),
        ({"exp": None}, "lacks `exp`"),
        # Counted from when tests are collected, which may be long before this one.
        ({"nbf": time.time() + 86_400}, "not valid yet"),
        ({"aud": "another"}, "audience"),
        ({"aud": None}, "lacks `aud`"),
        ({"iss": "https://other.example"}, "issuer"),
        ({"iss": None}, "lacks `iss`"),
        ({"sub": None}, "lacks `sub`"),
        ({"roles": "admin"}, "`roles` must be a list"),
        ({"tenant": "a\nb"}, "`tenant`"),
        ({"tenant": "x" * 200}, "`tenant`"),
    ],
)
async def test_claims_that_do_not_hold(claims: dict[str, Any], why: str) -> None:
    assert why in await why_refused(ED.token(**claims), ED)


async def test_clocks_may_differ_by_the_leeway() -> None:
    now = time.time()
    assert await checker(ED).check(ED.token(exp=now - 2, nbf=now + 2))


async def test_no_signature_and_a_public_key_as_secret_are_no_ways_in() -> None:
    public = RSA.private.public_key()
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    for header in ({"alg": "none"}, {"alg": "none", "kid": "rsa"}, {"alg": "None", "typ": "JWT"}):
        assert "no key" in await why_refused(forged(header, None), RSA)
    for secret in (pem, b""):
        for kid in ({}, {"kid": "rsa"}):
            assert "no key" in await why_refused(forged({"alg": "HS256", **kid}, secret), RSA)
    # The header's word for the algorithm with a signature of nothing.
    assert "signature" in await why_refused(forged({"alg": "RS256", "kid": "rsa"}, pem), RSA)


async def test_wrong_keys_and_garbage() -> None:
    stranger = Signer.make("EdDSA", "ed")
    assert "signature" in await why_refused(stranger.token(), ED)
    assert "no key" in await why_refused(Signer.make("EdDSA", "new").token(), ED)
    good = ED.token()
    head, body, signature = good.split(".")
    other = ED.token(sub="root").split(".")[1]
    assert "signature" in await why_refused(f"{head}.{other}.{signature}", ED)
    for garbage in ("x", "a.b.c", f"{head}.{body}", "é.é.é", "." * 9):
        assert await why_refused(garbage, ED)
    assert "characters" in await why_refused("x" * 9000, ED)


async def test_a_known_token_is_not_verified_again_until_it_expires(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = time.time()
    calls = []
    real = tokens.jwt.decode
    monkeypatch.setattr(tokens.jwt, "decode", lambda *a, **n: calls.append(1) or real(*a, **n))
    source = Fixed(ED)
    clock = [now]
    check = Tokens(source, CLAIMS, clock=lambda: clock[0])
    token = ED.token(exp=now + 60)
    for _ in range(3):
        await check.check(token)
    assert len(calls) == 1
    clock[0] = now + 66
    await check.check(token)
    assert len(calls) == 2, "past expiry and leeway it must be looked at again"
    clock[0] = now
    source.known = parse_keys(jwks(RSA), "test")
    with pytest.raises(ServiceError):
        await check.check(token)


def test_keys_that_are_not_taken() -> None:
    weak = Signer.make("RS256", "weak", bits=1024)
    with pytest.raises(ValueError, match="holds no key"):
        parse_keys(jwks(weak), "f")
    secret = {"kty": "oct", "k": "c2VjcmV0", "alg": "HS256"}
    for unfit in (secret, {**RSA.jwk(), "use": "enc"}, {**RSA.jwk(), "alg": "PS256"}):
        with pytest.raises(ValueError, match="holds no key"):
            parse_keys(json.dumps({"keys": [unfit]}).encode(), "f")
        both = json.dumps({"keys": [unfit, EC.jwk()]}).encode()
        assert [key.algorithm for key in parse_keys(both, "f")] == ["ES256"]
    for data in (b"", b"{}", b"[]", b'{"keys": [1]}', b"-----BEGIN PUBLIC KEY-----\n", b"\xff"):
        with pytest.raises(ValueError, match="f must hold PEM public keys or a JWKS"):
            parse_keys(data, "f")


async def test_a_file_of_pem_keys_may_change(tmp_path: Path) -> None:
    def pem(signer: Signer) -> bytes:
        key: Any = signer.private.public_key()
        return bytes(key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    path = tmp_path / "issuer.pem"
    path.write_bytes(pem(RSA) + pem(ED))
    check = Tokens(FileKeys(str(path)), CLAIMS)
    await check.check(RSA.token())
    await check.check(ED.token())
    path.write_bytes(b"half a fil")
    assert await check.check(ED.token()), "a broken file changes nothing"
    path.write_bytes(pem(EC))
    await check.check(EC.token())
    with pytest.raises(ServiceError, match="no key"):
        await check.check(ED.token())
    with pytest.raises(ValueError, match="jwt_keys: cannot read"):
        FileKeys(str(tmp_path / "absent"))


class Issuer:
    """Stands for the URL: answers with what it is told, and counts."""

    def __init__(self, *signers: Signer) -> None:
        self.signers = signers
        self.asked = 0
        self.down = False

    def fetch(self, url: str) -> Keys:
        self.asked += 1
        if self.down:
            raise ValueError("jwt_keys: the URL cannot be fetched")
        return parse_keys(jwks(*self.signers), url)


async def test_a_url_is_asked_again_for_new_keys_but_not_at_strangers_will() -> None:
    issuer, clock = Issuer(ED), [0.0]
    check = Tokens(UrlKeys("https://u", issuer.fetch, lambda: clock[0]), CLAIMS)
    await asyncio.gather(*(check.check(ED.token(sub=f"s{n}")) for n in range(5)))
    assert issuer.asked == 1
    issuer.signers = (ED, EC)
    for _ in range(3):
        with pytest.raises(ServiceError, match="no key"):
            await check.check(EC.token())
    assert issuer.asked == 1, "asked a moment ago"
    clock[0] += tokens.COOL_DOWN_SECONDS
    await check.check(EC.token())
    assert issuer.asked == 2


async def test_an_old_answer_serves_while_a_new_one_is_fetched_and_when_there_is_none() -> None:
    issuer, clock = Issuer(ED), [0.0]
    source = UrlKeys("https://u", issuer.fetch, lambda: clock[0])
    check = Tokens(source, CLAIMS)
    issuer.down = True
    with pytest.raises(ServiceError) as caught:
        await check.check(ED.token())
    assert caught.value.reason is Reason.NOT_READY
    issuer.down = False
    clock[0] += tokens.COOL_DOWN_SECONDS
    await check.check(ED.token())
    issuer.down = True
    clock[0] += tokens.REFRESH_SECONDS
    await check.check(ED.token(sub="other"))
    assert source._fetching is not None
    await source._fetching
    assert issuer.asked == 3
    await check.check(ED.token(sub="third"))
