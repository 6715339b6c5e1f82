"""Settings of a service's HTTP listener; mixed into its configuration class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HttpSettings:
    """TLS, keys and tokens are those of `listen`."""

    http_listen: str = ""
    """Address of an HTTP listener with OpenAI's API (/v1/completions, /v1/chat/completions,
    /v1/models) and /health; port 0 takes a free one. TLS and authentication are those of `listen`.
    Empty: none."""
    http_max_body_mib: int = 8
    """Largest body of an HTTP request; larger ones end with 413."""
    http_bodies_mib: int = 256
    """Bodies of HTTP requests together, as far as they have come and until they are answered; what
    is too much ends with 429. At least `http_max_body_mib`."""
    http_body_seconds: float = 30.0
    """How long a request's body may take to arrive."""
    http_max_connections: int = 4096
    """HTTP connections at once; further ones are answered with 503 and closed."""
    http_idle_seconds: float = 75.0
    """HTTP connections on which no request comes for this long are closed."""

    def validate_http(self) -> None:
        """Raises ValueError naming the field."""
        for name in ("http_max_body_mib", "http_max_connections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.http_bodies_mib < self.http_max_body_mib:
            raise ValueError("http_bodies_mib must be at least http_max_body_mib")
        for name in ("http_body_seconds", "http_idle_seconds"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0")
