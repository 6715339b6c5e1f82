"""JSON Web Tokens: signed by an issuer whose public keys come from a file or a URL.

Which algorithm a key verifies is fixed by the key, never by the token: `none`, and a public key
taken for an HMAC secret, have no way in.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import jwt
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from neo_common.documents import from_json
from neo_common.errors import Reason, ServiceError
from neo_common.grpc.principal import MAX_TENANT_CHARS, Principal, Role
from neo_common.watched import Watched, read

MIN_RSA_BITS = 2048
MAX_TOKEN_CHARS = 8192
MAX_JWKS_BYTES = 1 << 20
FETCH_SECONDS = 5.0
REFRESH_SECONDS = 300.0
COOL_DOWN_SECONDS = 10.0
"""Between fetches for keys that are not known: strangers can ask for those at will."""
CACHED_TOKENS = 4096
_PEM_END = b"-----END PUBLIC KEY-----"
_NEEDED = ["exp", "iss", "aud", "sub"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class IssuerKey:
    kid: str
    """"" for a key without a name."""
    algorithm: str
    key: Any
    """A public key of `cryptography`."""


Keys = tuple[IssuerKey, ...]


@dataclass(frozen=True)
class Claims:
    """What a token must say."""

    issuer: str
    audience: str
    leeway_seconds: float


def refused(why: str) -> ServiceError:
    return ServiceError(Reason.UNAUTHENTICATED, f"the credentials were refused: {why}")


def parse_keys(data: bytes, source: str) -> Keys:
    """From PEM public keys or a JWKS. Keys of a JWKS that are for something else (encryption, other
    algorithms) are passed over. Raises ValueError."""
    if _PEM_END in data:
        parts = data.split(_PEM_END)[:-1]
        return tuple(_pem_key(part + _PEM_END + b"\n", source) for part in parts)
    try:
        entries = from_json(data)["keys"]
        keys = tuple(key for entry in entries if (key := _jwk(entry)) is not None)
    except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise ValueError(f"jwt_keys: {source} must hold PEM public keys or a JWKS") from error
    if not keys:
        raise ValueError(f"jwt_keys: {source} holds no key for RS256, ES256 or EdDSA signatures")
    return keys


def _pem_key(pem: bytes, source: str) -> IssuerKey:
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"jwt_keys: {source} must hold PEM public keys or a JWKS") from error
    algorithm = _algorithm(key)
    if algorithm is None:
        raise ValueError(
            f"jwt_keys: {source} must hold keys of RSA (at least {MIN_RSA_BITS} bits), P-256 or "
            "Ed25519"
        )
    return IssuerKey("", algorithm, key)


def _jwk(entry: Mapping[str, Any]) -> IssuerKey | None:
    if entry.get("use", "sig") != "sig" or entry["kty"] not in ("RSA", "EC", "OKP"):
        return None
    try:
        key = jwt.PyJWK(dict(entry), algorithm=entry.get("alg")).key
    except jwt.PyJWTError:
        return None  # an algorithm that is not ours
    algorithm = _algorithm(key)
    if algorithm is None or entry.get("alg", algorithm) != algorithm:
        return None
    return IssuerKey(str(entry.get("kid", "")), algorithm, key)


def _algorithm(key: Any) -> str | None:
    """What the key verifies; None for keys that are not taken, private ones among them."""
    if isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        return "RS256"
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return "ES256"
    return "EdDSA" if isinstance(key, Ed25519PublicKey) else None


class KeySource(Protocol):
    async def keys(self) -> Keys:
        """What is known now. Raises ServiceError (NOT_READY) if nothing is."""

    async def look_again(self) -> Keys:
        """A key was not among them: the same, asked anew if that was not done just now."""


class FileKeys:
    """Raises ValueError when the file cannot be used."""

    def __init__(self, path: str) -> None:
        self._keys = Watched([path], lambda: parse_keys(read(path, "jwt_keys"), path))

    async def keys(self) -> Keys:
        return self._keys.get()

    async def look_again(self) -> Keys:
        return self._keys.get()


class UrlKeys:
    """A JWKS behind a URL, fetched when it is first needed, when it is `REFRESH_SECONDS` old (in
    the background, the old keys serve meanwhile), and for an unknown key. Used by one event loop.

    fetch: runs in a thread, raises ValueError.
    """

    def __init__(
        self,
        url: str,
        fetch: Callable[[str], Keys] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._url = url
        self._fetch = fetch or fetch_keys
        self._clock = clock
        self._keys: Keys = ()
        self._asked_at = float("-inf")
        self._fetching: asyncio.Task[None] | None = None

    async def keys(self) -> Keys:
        if not self._keys:
            return await self.look_again()
        if self._clock() - self._asked_at >= REFRESH_SECONDS:
            self._ask()
        return self._keys

    async def look_again(self) -> Keys:
        if self._fetching is None and self._clock() - self._asked_at >= COOL_DOWN_SECONDS:
            self._ask()
        if self._fetching is not None:
            # Shielded: others wait for the same answer when this call is cancelled.
            await asyncio.shield(self._fetching)
        if not self._keys:
            raise ServiceError(
                Reason.NOT_READY, "the issuer's keys are not known yet", retry_after=1.0
            )
        return self._keys

    def _ask(self) -> None:
        if self._fetching is None:
            self._asked_at = self._clock()
            self._fetching = asyncio.create_task(self._refresh(), name="fetch jwt_keys")

    async def _refresh(self) -> None:
        try:
            self._keys = await asyncio.to_thread(self._fetch, self._url)
        except ValueError as error:
            _log.warning("%s", error)
        finally:
            self._fetching = None


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *arguments: Any, **named: Any) -> None:
        """Who may vouch for callers is a setting, not a server's answer."""
        return


def fetch_keys(url: str) -> Keys:
    """Raises ValueError."""
    try:
        opener = urllib.request.build_opener(_NoRedirects)
        with opener.open(url, timeout=FETCH_SECONDS) as answer:
            data = answer.read(MAX_JWKS_BYTES + 1)
    except (OSError, urllib.error.URLError) as error:
        raise ValueError(f"jwt_keys: {url} cannot be fetched: {error}") from error
    if len(data) > MAX_JWKS_BYTES:
        raise ValueError(f"jwt_keys: {url} holds more than {MAX_JWKS_BYTES} bytes")
    return parse_keys(data, url)


class Tokens:
    """Checks tokens; those that were good are remembered until they expire or keys change."""

    def __init__(
        self, source: KeySource, claims: Claims, clock: Callable[[], float] = time.time
    ) -> None:
        self._source = source
        self._claims = claims
        self._clock = clock
        self._good: OrderedDict[bytes, tuple[float, Principal]] = OrderedDict()
        self._good_for: Keys = ()

    async def check(self, token: str) -> Principal:
        """Whose token it is. Raises ServiceError: UNAUTHENTICATED, or NOT_READY while there are no
        keys."""
        if len(token) > MAX_TOKEN_CHARS or not token.isascii():
            raise refused(f"a token has at most {MAX_TOKEN_CHARS} characters, all ASCII")
        keys = await self._source.keys()
        if keys is not self._good_for:
            self._good.clear()
            self._good_for = keys
        digest = hashlib.sha256(token.encode()).digest()
        known = self._good.get(digest)
        if known is not None and known[0] > self._clock():
            return known[1]
        claims = self._verify(token, await self._candidates(token, keys))
        if not isinstance(claims["exp"], int | float):
            raise refused("the token is malformed")
        principal = _principal(claims)
        if len(self._good) >= CACHED_TOKENS:
            self._good.popitem(last=False)
        self._good[digest] = (claims["exp"] + self._claims.leeway_seconds, principal)
        return principal

    async def _candidates(self, token: str, keys: Keys) -> Keys:
        try:
            header = jwt.get_unverified_header(token)
        except jwt.PyJWTError:
            raise refused("it is no API key of ours and no token") from None
        algorithm, kid = header.get("alg"), header.get("kid")

        def fitting(keys: Keys) -> Keys:
            return tuple(
                key
                for key in keys
                if key.algorithm == algorithm and (kid is None or key.kid in ("", kid))
            )

        found = fitting(keys) or fitting(await self._source.look_again())
        if not found:
            raise refused("no key of the issuer fits the token's `alg` and `kid`")
        return found

    def _verify(self, token: str, candidates: Keys) -> dict[str, Any]:
        for key in candidates:
            try:
                claims: dict[str, Any] = jwt.decode(
                    token,
                    key.key,
                    algorithms=[key.algorithm],
                    audience=self._claims.audience,
                    issuer=self._claims.issuer,
                    leeway=self._claims.leeway_seconds,
                    options={"require": _NEEDED},
                )
                return claims
            except jwt.InvalidSignatureError:
                continue
            except jwt.ExpiredSignatureError:
                raise refused("the token has expired") from None
            except jwt.ImmatureSignatureError:
                raise refused("the token is not valid yet") from None
            except jwt.InvalidAudienceError:
                raise refused("the token is for another audience") from None
            except jwt.InvalidIssuerError:
                raise refused("the token is from another issuer") from None
            except jwt.MissingRequiredClaimError as error:
                raise refused(f"the token lacks `{error.claim}`") from None
            # The others: claims of types that PyJWT takes on trust, such as an `exp` of 1e999.
            except (jwt.PyJWTError, ArithmeticError, TypeError, ValueError):
                raise refused("the token is malformed") from None
        raise refused("the token's signature is wrong")


def _principal(claims: Mapping[str, Any]) -> Principal:
    """`sub`; `tenant`, which is `sub` where it is missing; `roles`, where other people's roles are
    passed over and none at all means inference."""
    subject = str(claims["sub"])
    tenant = claims.get("tenant", subject)
    if not isinstance(tenant, str) or not tenant.isprintable() or len(tenant) > MAX_TENANT_CHARS:
        raise refused(f"`tenant` must be at most {MAX_TENANT_CHARS} printable characters")
    roles = claims.get("roles", [Role.INFERENCE])
    if not isinstance(roles, list):
        raise refused("`roles` must be a list")
    ours = frozenset(Role(role) for role in roles if role in list(Role))
    return Principal(subject, tenant, ours)
