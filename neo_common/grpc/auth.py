"""Who may call what on one listener.

A call shows `authorization: Bearer KEY-OR-TOKEN`, or comes over a connection with a client
certificate. What a method needs is in one table here; methods that it does not name need the role
`inference`, so that a service added later is not open by mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from neo_common.errors import Reason, ServiceError
from neo_common.grpc.keys import PREFIX, ApiKeys
from neo_common.grpc.principal import ANONYMOUS, Principal, Role, claimed_tenant
from neo_common.grpc.settings import ListenSettings
from neo_common.grpc.tokens import Claims, FileKeys, KeySource, Tokens, UrlKeys, refused

HEADER = "authorization"
SCHEME = "bearer "

_HEALTH = "/grpc.health.v1.Health/"
OPEN = frozenset(
    {
        "/vllm.grpc.engine.VllmEngine/HealthCheck",
        "/inference.GRPCInferenceService/ServerLive",
        "/inference.GRPCInferenceService/ServerReady",
    }
)
"""Health, in the words of each protocol: for anybody."""
OPERATOR = frozenset(
    {
        "/neo.v1.EngineService/Drain",
        "/neo.v1.EngineService/GetInfo",
        "/neo.v1.EngineService/ResetPrefixCache",
        "/neo.v1.MachineService/GetMachine",
    }
)
"""Not for everybody who can reach a port that routers must reach."""
_NEEDS = (
    ("/neo.v1.EngineService/", frozenset({Role.SERVICE, Role.ADMIN})),
    ("/neo.v1.MachineService/", frozenset({Role.SERVICE, Role.ADMIN})),
    ("/neo.v1.RouterService/", frozenset({Role.ADMIN})),
    ("/neo.v1.CpuAttentionService/", frozenset({Role.SERVICE})),
)
_INFERENCE = frozenset({Role.INFERENCE, Role.SERVICE, Role.ADMIN})


def needed(method: str) -> frozenset[Role]:
    """Roles that may call `/package.Service/Method`, one is enough; empty: anybody may."""
    if method.startswith(_HEALTH) or method in OPEN:
        return frozenset()
    for prefix, roles in _NEEDS:
        if method.startswith(prefix):
            return roles
    return _INFERENCE


class Authenticator:
    """Finds out who calls, by what the settings say. Raises ValueError for files that it cannot
    use."""

    def __init__(self, settings: ListenSettings) -> None:
        self._keys = ApiKeys(settings.api_keys) if settings.api_keys else None
        self._tokens = _tokens(settings)
        self._certificates = settings.certificate_roles()

    async def identify(
        self, metadata: Mapping[str, str | bytes], connection: Callable[[], Mapping[str, Any]]
    ) -> Principal:
        """connection: gRPC's auth_context, asked only where it matters since it is copied out of
        the core each time. Raises ServiceError (UNAUTHENTICATED)."""
        said = metadata.get(HEADER)
        if said is not None:
            return await self._bearer(str(said))
        holder = self._holder(connection()) if self._certificates else None
        if holder is None:
            raise ServiceError(
                Reason.UNAUTHENTICATED, "the call carries no credentials that are known here"
            )
        return holder

    async def _bearer(self, said: str) -> Principal:
        if not said[: len(SCHEME)].lower() == SCHEME:
            raise refused("authorization must be `Bearer` and a key or token")
        credentials = said[len(SCHEME) :].strip()
        if credentials.startswith(PREFIX):
            principal = self._keys.find(credentials) if self._keys else None
            if principal is None:
                raise refused("the API key is not known")
            return principal
        if self._tokens is None:
            raise refused("it is no API key of ours")
        return await self._tokens.check(credentials)

    def _holder(self, shown: Mapping[str, Any]) -> Principal | None:
        names = {
            name.decode(errors="replace")
            for kind in ("x509_subject_alternative_name", "x509_common_name")
            for name in shown.get(kind, ())
        }
        for name in sorted(names & self._certificates.keys()):
            return Principal(name, name, self._certificates[name])
        named = sorted(name for name in names if name)
        if "*" in self._certificates and named:
            return Principal(named[0], named[0], self._certificates["*"])
        return None


def _tokens(settings: ListenSettings) -> Tokens | None:
    where = settings.jwt_keys
    if not where:
        return None
    source: KeySource
    if where.startswith(("https://", "http://127.0.0.1:", "http://localhost:")):
        source = UrlKeys(where)
    elif "://" in where:
        raise ValueError("jwt_keys must be a file or an https URL")
    else:
        source = FileKeys(where)
    claims = Claims(settings.jwt_issuer, settings.jwt_audience, settings.jwt_leeway_seconds)
    return Tokens(source, claims)


class Access:
    """The rule of one listener. authenticator: None where authentication is off. private: nobody
    but this machine reaches it."""

    def __init__(self, authenticator: Authenticator | None, *, private: bool) -> None:
        self._authenticator = authenticator
        self._private = private

    async def admit(self, method: str, context: Any) -> Principal:
        """Who calls. Raises ServiceError when they may not."""
        metadata = dict(context.invocation_metadata() or ())
        needs = needed(method)
        if self._authenticator is None:
            if method in OPERATOR and not self._private:
                raise ServiceError(
                    Reason.PERMISSION_DENIED,
                    "this call is served on the admin listener, or here to authenticated callers",
                )
            return _speaking_for(ANONYMOUS, metadata)
        if not needs:
            return ANONYMOUS
        principal = await self._authenticator.identify(metadata, context.auth_context)
        if not principal.roles & needs:
            raise ServiceError(
                Reason.PERMISSION_DENIED,
                f"this call needs one of the roles {', '.join(sorted(needs))}",
            )
        if Role.SERVICE in principal.roles:
            return _speaking_for(principal, metadata)
        return principal


def _speaking_for(principal: Principal, metadata: Mapping[str, str | bytes]) -> Principal:
    try:
        tenant = claimed_tenant(metadata.items())
    except ValueError as error:
        raise ServiceError(Reason.INVALID_ARGUMENT, str(error), field="metadata") from None
    return principal.for_tenant(tenant) if tenant else principal
