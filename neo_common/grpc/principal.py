"""Who makes the current call.

`neo_common.grpc.guard` sets it before a handler runs; anything that runs in the handler's task, or
in a task started from it, reads it:

    tenant = principal.current().tenant
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from contextvars import ContextVar
from dataclasses import dataclass, replace

TENANT_KEY = "x-neo-tenant"
"""Metadata: whose call it is. Believed where authentication is off, and from a caller whose role is
`service`; from others it is passed over."""
MAX_TENANT_CHARS = 128
PRIORITY_KEY = "x-neo-priority"
"""Metadata: how urgent the call is to a router, a whole number of -100 to 100. It goes before
`scheduling.priority`, and is the only way in protocols that have no such field."""


class Role(enum.StrEnum):
    """What a caller may do."""

    INFERENCE = "inference"
    """Call the services that generate, and ask about models."""
    ADMIN = "admin"
    """Drain, and look into a service; includes inference."""
    SERVICE = "service"
    """Be another service of ours, a router at its backends or an engine at its cpu_services: watch
    load, drain, and call on behalf of other tenants."""


@dataclass(frozen=True)
class Principal:
    """An authenticated caller."""

    name: str
    """The token's subject, the key's name or the certificate's; "anonymous" without any."""
    tenant: str
    """Whom its use counts for; "" is the tenant of callers that name none."""
    roles: frozenset[Role]

    def for_tenant(self, tenant: str) -> Principal:
        return replace(self, tenant=tenant)


ANONYMOUS = Principal("anonymous", "", frozenset(Role))
"""Every caller where authentication is off: nothing is forbidden."""

_current: ContextVar[Principal] = ContextVar("neo_principal", default=ANONYMOUS)


def current() -> Principal:
    """Of the call that this task serves; ANONYMOUS outside of one."""
    return _current.get()


def enter(principal: Principal) -> None:
    """From now on this task, and those it starts, serve a call of `principal`."""
    _current.set(principal)


def claimed_tenant(metadata: Iterable[tuple[str, str | bytes]]) -> str:
    """What the caller says in `x-neo-tenant`; "" if nothing. Raises ValueError for a name that is
    too long or not printable ASCII."""
    for key, value in metadata:
        if key == TENANT_KEY and isinstance(value, str):
            if len(value) > MAX_TENANT_CHARS or not (value.isascii() and value.isprintable()):
                raise ValueError(
                    f"{TENANT_KEY} must be at most {MAX_TENANT_CHARS} printable ASCII characters"
                )
            return value
    return ""
