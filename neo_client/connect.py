"""How a client reaches its servers: addresses, TLS, credentials, retries."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from neo_client.trace import trace_metadata
from neo_common.grpc.keepalive import keepalive
from neo_common.grpc.settings import is_loopback
from neo_common.grpc.tls import TlsFiles, channel_credentials

MAX_MESSAGE_BYTES = 64 << 20

Token = str | Callable[[], str]
"""An API key or a JWT; or what gives the one to use, asked for each call, so it must not wait."""
Options = tuple[tuple[str, str | int], ...]


@dataclass(frozen=True)
class Tls:
    """TLS to the servers. Files are PEM, read when the client is made."""

    ca: str = ""
    """File with the authorities to trust; empty takes the system's."""
    certificate: str = ""
    """File with the certificate to show, where servers ask for one."""
    key: str = ""
    """File with its private key."""
    name: str = ""
    """Name in the servers' certificates, where that is not the address; needed with several
    addresses."""


@dataclass(frozen=True)
class Retries:
    """What is tried again when a server is UNAVAILABLE, gRPC's own retries: on another connection
    where there is one, never after the first message of an answer, and no more than a tenth of all
    calls once many fail."""

    generations: int = 3
    """Attempts of Generate and GenerateStream, 1 to 5."""
    questions: int = 4
    """Attempts of calls that ask and change nothing, 1 to 5. Abort and Drain are tried once."""
    initial_seconds: float = 0.1
    """First pause; it triples up to `max_seconds`, and is drawn at random below that."""
    max_seconds: float = 2.0

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        for name in ("generations", "questions"):
            if not 1 <= getattr(self, name) <= 5:
                raise ValueError(f"retries.{name} must be 1 to 5")
        for name in ("initial_seconds", "max_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"retries.{name} must be more than 0")


class Connection:
    """address: HOST:PORT of a router or a gpu_service; several of these, comma-separated, or
    `dns:///NAME:PORT`, share the calls round robin, passing by servers that do not answer or are
    not healthy. gRPC follows the addresses of a `dns:///` name; names in a list are looked up once.
    credentials: gRPC's own, instead of `tls`.

    Raises ValueError naming what is wrong.
    """

    def __init__(
        self,
        address: str,
        *,
        tls: Tls | None = None,
        token: Token | None = None,
        retries: Retries | None = None,
        credentials: grpc.ChannelCredentials | None = None,
    ) -> None:
        retries = retries or Retries()
        retries.validate()
        parts = [part.strip() for part in address.split(",")]
        balanced = len(parts) > 1 or parts[0].startswith("dns:")
        if len(parts) > 1 and tls is not None and not tls.name:
            raise ValueError("tls.name must be given with several addresses")
        secure = tls is not None or credentials is not None
        private = all(part.startswith("unix:") or is_loopback(part) for part in parts)
        if token is not None and not (secure or private):
            raise ValueError("token needs tls: others could read it on the way")
        self.address = address
        self._token = token
        self._target = parts[0] if len(parts) == 1 else _list_target(parts)
        self._credentials = credentials if tls is None else _credentials(tls)
        self._options: Options = (
            ("grpc.service_config", service_config(retries, balanced=balanced)),
            ("grpc.enable_retries", 1),
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            # A half-open connection is noticed within a minute, also while a stream waits for
            # tokens.
            *keepalive(45.0, 10.0),
        )
        if tls is not None and tls.name:
            self._options += (("grpc.ssl_target_name_override", tls.name),)

    def open(self) -> grpc.Channel:
        if self._credentials is None:
            return grpc.insecure_channel(self._target, options=self._options)
        return grpc.secure_channel(self._target, self._credentials, options=self._options)

    def open_aio(self) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(self._target, options=self._options)
        return grpc.aio.secure_channel(self._target, self._credentials, options=self._options)

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What every call carries."""
        trace = trace_metadata()
        if self._token is None:
            return trace
        token = self._token if isinstance(self._token, str) else self._token()
        return (("authorization", f"Bearer {token}"), *trace)


def _credentials(tls: Tls) -> grpc.ChannelCredentials:
    return channel_credentials(TlsFiles(tls.certificate, tls.key, tls.ca, "tls"))


def _list_target(addresses: Sequence[str]) -> str:
    """gRPC's name for a list of addresses, all of which must be of one kind: IPv4 where every
    server has one, else IPv6."""
    looked_up = [_look_up(address) for address in addresses]
    for family, scheme in ((socket.AF_INET, "ipv4"), (socket.AF_INET6, "ipv6")):
        if all(family in found for found in looked_up):
            return f"{scheme}:" + ",".join(each for found in looked_up for each in found[family])
    raise ValueError("address: the servers must all have IPv4 addresses, or all IPv6")


def _look_up(address: str) -> dict[int, list[str]]:
    """Address family -> HOST:PORT of each address that the host has."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"address must be HOST:PORT, or a list of those, not {address!r}")
    found: dict[int, list[str]] = {}
    try:
        infos = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"address: {host} is not known: {error.strerror}") from error
    for family, _, _, _, place in infos:
        shown = f"[{place[0]}]" if family == socket.AF_INET6 else f"{place[0]}"
        found.setdefault(family, []).append(f"{shown}:{port}")
    return found


def service_config(retries: Retries, *, balanced: bool) -> str:
    """gRPC's service config, as JSON."""

    def policy(service: str, methods: Sequence[str], attempts: int) -> list[dict[str, object]]:
        if attempts == 1:
            return []
        return [
            {
                "name": [{"service": f"neo.v1.{service}", "method": name} for name in methods],
                "retryPolicy": {
                    "maxAttempts": attempts,
                    "initialBackoff": f"{retries.initial_seconds:f}s",
                    "maxBackoff": f"{retries.max_seconds:f}s",
                    "backoffMultiplier": 3,
                    "retryableStatusCodes": ["UNAVAILABLE"],
                },
            }
        ]

    questions = ["ListModels", "GetModel", "Tokenize", "Detokenize"]
    config: dict[str, object] = {
        "methodConfig": [
            *policy("InferenceService", questions, retries.questions),
            *policy("InferenceService", ["Generate", "GenerateStream"], retries.generations),
            *policy("EngineService", ["GetLoad", "GetInfo"], retries.questions),
            *policy("RouterService", ["ListBackends"], retries.questions),
        ],
        "retryThrottling": {"maxTokens": 100, "tokenRatio": 0.1},
    }
    if balanced:
        config["loadBalancingConfig"] = [{"round_robin": {}}]
        config["healthCheckConfig"] = {"serviceName": ""}
    return json.dumps(config)
