"""What an entry of `backends` means:

- 10.0.0.1:7001: this address
- dns:///gpu.example:7001: every address of that name; dns://server/gpu.example:7001 asks "server"
- k8s:///namespace/service:7001: every ready pod behind that Service, at that port of the pods;
  k8s:///service:grpc: in the router's own namespace, and the port by its name
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]*[A-Za-z0-9_])?\.?"
_LABEL = r"[a-z0-9](?:[a-z0-9-]*[a-z0-9])?"
_DNS = re.compile(rf"dns://(?P<server>[^/]*)/(?P<name>{_NAME}):(?P<port>\d+)")
_KUBERNETES = re.compile(
    rf"k8s:///(?:(?P<namespace>{_LABEL})/)?(?P<service>{_LABEL}):(?P<port>\d+|{_LABEL})"
)


@dataclass(frozen=True)
class StaticTarget:
    address: str


@dataclass(frozen=True)
class DnsTarget:
    name: str
    port: int
    server: str = ""
    """HOST or HOST:PORT of the DNS server; "" means the system's."""


@dataclass(frozen=True)
class KubernetesTarget:
    namespace: str
    """"" means the router's own."""
    service: str
    port: str
    """A number, or the name of one of the Service's ports."""


Target = StaticTarget | DnsTarget | KubernetesTarget


def parse(text: str) -> Target:
    """Raises ValueError."""
    if text.startswith("dns:"):
        found = _DNS.fullmatch(text)
        if found is None:
            raise ValueError(
                f"backends: {text!r} is not dns:///NAME:PORT or dns://SERVER/NAME:PORT"
            )
        return DnsTarget(found["name"], _port(text, found["port"]), found["server"])
    if text.startswith("k8s:"):
        found = _KUBERNETES.fullmatch(text)
        if found is None:
            raise ValueError(
                f"backends: {text!r} is not k8s:///NAMESPACE/SERVICE:PORT or k8s:///SERVICE:PORT"
            )
        if found["port"].isdigit():
            _port(text, found["port"])
        return KubernetesTarget(found["namespace"] or "", found["service"], found["port"])
    return StaticTarget(text)


def _port(text: str, digits: str) -> int:
    if not 0 < int(digits) < 65_536:
        raise ValueError(f"backends: {text!r} has no port from 1 to 65535")
    return int(digits)


def join(host: str, port: int) -> str:
    """As gRPC wants it: IPv6 in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
