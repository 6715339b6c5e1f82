"""Tokens, the issuer's keys, API keys' files, and what a call's metadata says of its caller."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from neo_common.errors import ServiceError
from neo_common.grpc.auth import Access
from neo_common.grpc.keys import new_key
from neo_common.grpc.tokens import Claims, IssuerKey, Keys, Tokens, parse_keys
from tests.fuzz.front import wait
from tests.fuzz.target import Target, clear, refused

CLAIMS = {"iss": "i", "aud": "a", "sub": "me", "exp": 4e9, "roles": ["admin"], "tenant": "t"}


@cache
def _private() -> Ed25519PrivateKey:
    return Ed25519PrivateKey.from_private_bytes(bytes(range(32)))


class _Source:
    async def keys(self) -> Keys:
        return (IssuerKey("", "EdDSA", _private().public_key()),)

    async def look_again(self) -> Keys:
        return await self.keys()


class _Call:
    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = metadata

    def invocation_metadata(self) -> Any:
        return tuple(self._metadata.items())

    def auth_context(self) -> Mapping[str, Any]:
        return {}


def _one(data: bytes) -> None:
    kind, rest = data[:1], data[1:]
    try:
        if kind == b"j":
            parse_keys(rest, "jwks.json")
        elif kind == b"s":  # claims that the issuer has signed
            text = rest.decode("latin-1")
            head = base64.urlsafe_b64encode(b'{"alg":"EdDSA"}').rstrip(b"=")
            body = head + b"." + base64.urlsafe_b64encode(text.encode()).rstrip(b"=")
            signature = base64.urlsafe_b64encode(_private().sign(body)).rstrip(b"=")
            _check((body + b"." + signature).decode())
        elif kind == b"h":  # a header that nobody has signed
            _check(base64.urlsafe_b64encode(rest).rstrip(b"=").decode() + ".e30.AAAA")
        elif kind == b"m":
            said = {"x-neo-tenant": rest.decode("latin-1")}
            wait(Access(None, private=True).admit("/neo.v1.InferenceService/Generate", _Call(said)))
        else:
            _check(rest.decode("utf-8", "surrogateescape"))
    except ServiceError as error:
        refused(error)
    except ValueError as error:
        clear(error, "jwt_keys")


def _check(token: str) -> None:
    wait(Tokens(_Source(), Claims("i", "a", 30.0)).check(token))


def seeds() -> list[bytes]:
    public = _private().public_key()
    raw = base64.urlsafe_b64encode(public.public_bytes(Encoding.Raw, PublicFormat.Raw))
    key = {"kty": "OKP", "crv": "Ed25519", "x": raw.rstrip(b"=").decode(), "use": "sig", "kid": "k"}
    pem = public.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    token = jwt.encode(CLAIMS, _private(), "EdDSA")
    return [
        b"j"
        + json.dumps({"keys": [key, {"kty": "EC", "crv": "P-256", "x": "A", "y": "A"}]}).encode(),
        b"j" + pem,
        b"s" + json.dumps(CLAIMS).encode(),
        b"s" + json.dumps({**CLAIMS, "nbf": 1, "iat": 2, "aud": ["a", "b"]}).encode(),
        b"h" + json.dumps({"alg": "EdDSA", "kid": "k", "typ": "JWT"}).encode(),
        b"mtenant",
        b"t" + token.encode(),
        b"t" + new_key("n", "t", ["inference"])[0].encode(),
    ]


TARGET = Target(
    "credentials", _one, seeds, "text", (b'"RS256"', b'"none"', b"2e308"), max_bytes=8192
)
