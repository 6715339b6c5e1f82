"""Settings that services share: how they are called, and how they call each other.

Mixed into a service's configuration class; see neo_common.config.
"""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from neo_common.grpc.principal import Role
from neo_common.grpc.tls import TlsFiles

ADMIN_PORT_OFFSET = 10
SYSTEM = "system"


@dataclass(frozen=True)
class ListenSettings:
    """Of the listening side. `listen` itself is the service's own."""

    health_listen: str = ""
    """Address of a port for health checks alone, without TLS or authentication, such as those of a
    kubelet, which can do neither; empty: none but those of the other ports."""
    tls_cert: str = ""
    """PEM file with this service's certificate and its intermediates; read again when it changes.
    Empty: no TLS."""
    tls_key: str = ""
    """PEM file with its private key."""
    tls_ca: str = ""
    """PEM file with the authorities of clients' certificates; clients must then show one (mutual
    TLS)."""
    tls_client_roles: tuple[str, ...] = ()
    """Turns authentication on: what holders of client certificates may do, as NAME=ROLE, where NAME
    is a DNS or URI name in the certificate, its common name, or `*`, and ROLE is `inference`,
    `admin` or `service`."""
    api_keys: str = ""
    """Turns authentication on: YAML file with the hashes of API keys, as `neo keys new` prints
    them; read again when it changes."""
    jwt_keys: str = ""
    """Turns authentication on: the public keys of the tokens' issuer, as a file (PEM or JWKS, read
    again when it changes) or as the https URL of a JWKS (fetched again every 5 minutes and for an
    unknown key). RS256, ES256 and EdDSA."""
    jwt_issuer: str = ""
    """What the tokens' `iss` must be."""
    jwt_audience: str = ""
    """What the tokens' `aud` must hold."""
    jwt_leeway_seconds: float = 30.0
    """How far the issuer's clock may be off from ours."""
    max_message_mib: int = 64
    """Largest message in either direction."""
    max_connection_streams: int = 8192
    """Calls at once on one connection; a client keeps further ones back."""
    max_connection_age_seconds: float = 0.0
    """Connections older than this are closed once their calls have ended, so that clients spread
    out again, give or take a tenth; 0 means never."""

    @property
    def authenticates(self) -> bool:
        return bool(self.tls_client_roles or self.api_keys or self.jwt_keys)

    @property
    def tls(self) -> TlsFiles | None:
        """None without TLS."""
        if not self.tls_cert and not self.tls_key:
            return None
        return TlsFiles(self.tls_cert, self.tls_key, self.tls_ca, "tls")

    def certificate_roles(self) -> dict[str, frozenset[Role]]:
        """Name -> roles of `tls_client_roles`. Raises ValueError."""
        found: dict[str, frozenset[Role]] = {}
        for text in self.tls_client_roles:
            name, equals, role = text.rpartition("=")
            if not equals or not name or role not in list(Role):
                raise ValueError(
                    f"tls_client_roles must hold NAME=ROLE with a role of {', '.join(Role)}, "
                    f"not {text!r}"
                )
            found[name] = found.get(name, frozenset()) | {Role(role)}
        return found

    def validate_listener(self) -> None:
        """Raises ValueError naming the field."""
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key must be given together")
        if self.tls_ca and not self.tls_cert:
            raise ValueError("tls_ca needs tls_cert and tls_key")
        if self.tls_client_roles and not self.tls_ca:
            raise ValueError("tls_client_roles needs tls_ca")
        self.certificate_roles()
        if self.jwt_keys and not (self.jwt_issuer and self.jwt_audience):
            raise ValueError("jwt_keys needs jwt_issuer and jwt_audience")
        for name in ("max_message_mib", "max_connection_streams"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in ("jwt_leeway_seconds", "max_connection_age_seconds"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")


@dataclass(frozen=True)
class PeerSettings:
    """Of channels to other services of ours: a router's to its backends, an engine's to its
    cpu_services."""

    peer_tls_ca: str = ""
    """PEM file with the authorities that sign the certificates of the services called from here, or
    `system` for the system's. Empty: no TLS on these channels."""
    peer_tls_cert: str = ""
    """PEM file with the certificate to show to them (mutual TLS)."""
    peer_tls_key: str = ""
    """PEM file with its private key."""
    peer_tls_name: str = ""
    """Name that their certificates must bear where that is not the address, such as behind IP
    addresses of pods."""
    peer_api_key: str = ""
    """File with the API key to present to them; needs `peer_tls_ca`. Read again when it changes."""

    @property
    def peer_tls(self) -> TlsFiles | None:
        """None without TLS."""
        if not self.peer_tls_ca:
            return None
        ca = "" if self.peer_tls_ca == SYSTEM else self.peer_tls_ca
        return TlsFiles(self.peer_tls_cert, self.peer_tls_key, ca, "peer_tls")

    def validate_peers(self) -> None:
        """Raises ValueError naming the field."""
        for name in ("peer_tls_cert", "peer_tls_key", "peer_tls_name", "peer_api_key"):
            if getattr(self, name) and not self.peer_tls_ca:
                raise ValueError(f"{name} needs peer_tls_ca")
        if bool(self.peer_tls_cert) != bool(self.peer_tls_key):
            raise ValueError("peer_tls_cert and peer_tls_key must be given together")


def is_loopback(listen: str) -> bool:
    """Whether only this machine can reach the address HOST:PORT."""
    host = listen.rpartition(":")[0].removeprefix("[").removesuffix("]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def admin_address(listen: str, admin_listen: str) -> str | None:
    """Where the RPCs for operators are served; None: on `listen`, which is private itself."""
    if admin_listen != "auto":
        return admin_listen
    if is_loopback(listen):
        return None
    port = listen.rpartition(":")[2]
    if not port.isdigit() or port == "0":
        return "127.0.0.1:0"
    return f"127.0.0.1:{int(port) + ADMIN_PORT_OFFSET}"
