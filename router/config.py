"""Everything that can be configured about a router. Loaded by `neo_common.config` (file < NEO_* <
flags)."""

from __future__ import annotations

from dataclasses import dataclass

from neo_common.grpc.settings import ListenSettings, PeerSettings
from neo_common.tracing import TracingSettings
from neo_http.settings import HttpSettings
from router.discovery.targets import Target, parse
from router.health import HealthLimits
from router.policies import POLICIES


@dataclass(frozen=True)
class RouterConfig(HttpSettings, ListenSettings, PeerSettings, TracingSettings):
    """One router in front of some gpu_services."""

    listen: str = "127.0.0.1:7000"
    """Address of the gRPC server; port 0 takes a free one."""
    admin_listen: str = "auto"
    """Address of the calls for operators (RouterService); `auto` is `listen` itself where only this
    machine can connect to that, and else 127.0.0.1 at its port + 10."""
    backends: tuple[str, ...] = ()
    """The gpu_services, at least one: gRPC addresses, `dns:///NAME:PORT` for all addresses of a
    name, `k8s:///NAMESPACE/SERVICE:PORT` for the ready pods behind a Service (without NAMESPACE: in
    the router's own). Those found so may change at any time."""
    dns_interval_seconds: float = 30.0
    """Names of `dns:///` are looked up again after this, or earlier when their time to live is
    over."""
    kubernetes_api: str = ""
    """URL of the API server for `k8s:///`; empty means that of the cluster that the router runs
    in."""
    kubernetes_account: str = "/var/run/secrets/kubernetes.io/serviceaccount"
    """Folder with the service account's `token`, `ca.crt` and `namespace`."""

    policy: str = "predicted-wait"
    """Which backend gets a call: `predicted-wait` (the least), `kv-pressure` (the least),
    `power-of-two` (the better of two drawn), `prefix` (where prompts that begin alike went),
    `session` (where calls with the same x-neo-session-id went) or `round-robin`. The two before the
    last keep to a quarter above each backend's share."""
    model_policies: tuple[str, ...] = ()
    """Other policies for some models, as MODEL=POLICY."""
    default_model: str = ""
    """Model of calls that name none; empty means the only one that the backends serve."""

    max_calls: int = 8192
    """Calls held at once; more are refused with RESOURCE_EXHAUSTED."""
    tenants: str = ""
    """YAML file with limits and shares of tenants, see docs/operations.md; read again when it
    changes. Empty: calls do not wait in the router."""
    max_join_ms: float = 40.0
    """When the router is busy, messages of one answer leave together that come within a time which
    grows up to this; 0: each leaves alone."""
    max_attempts: int = 3
    """Backends tried for one call while no message of its answer has come."""
    retry_ratio: float = 0.2
    """Tries on other backends for each call, over all calls of 10 s; calls that are open count once
    more, so that those of one lost backend can all be tried elsewhere."""
    retry_base_ms: float = 10.0
    """A call's first retry waits for a random time up to this; the bound doubles each time."""
    retry_max_ms: float = 250.0
    """Largest such bound."""
    hedge_after_ms: float = 0.0
    """A call without a first message after this is made on a second backend as well, if one has
    room and the retries allow it; the slower one is cancelled. Every hedged call is work done
    twice. 0: never."""
    breaker_failures: int = 5
    """Calls in a row that could not reach a backend, after which it gets none for 1 s, and longer
    each time, until one call that probes it is answered."""
    outlier_rate: float = 0.5
    """A backend that fails this part of its calls in 10 s, of 20 at least, is used only where there
    is no other, for 10 s and longer each time; more than 1: never."""
    outlier_part: float = 0.5
    """Most of the backends that are left out for that at the same time."""
    abort_seconds: float = 5.0
    """How long an Abort waits for each backend's answer."""
    retry_after_seconds: float = 1.0
    """What clients are told to wait when no backend can take their call."""

    load_interval_ms: int = 200
    """Time between a backend's load snapshots, 10 to 60000."""
    stale_seconds: float = 2.0
    """A backend whose newest snapshot is older is SUSPECT: others are preferred."""
    silence_seconds: float = 5.0
    """A load stream without a word for this long, and a fifth more in which what has come is read,
    is given up and opened again."""
    reconnect_seconds: float = 0.1
    """Pause before a lost load stream is opened again; doubles up to `max_reconnect_seconds`."""
    max_reconnect_seconds: float = 2.0
    """Longest such pause: how long a backend that came back may stay unnoticed."""

    drain_grace_seconds: float = 40.0
    """How long SIGTERM lets live calls finish; longer than a gpu_service's own grace."""
    metrics_port: int = 0
    """Prometheus endpoint on this port; 0 means none."""
    status_port: int = 0
    """Status page for people at http://127.0.0.1:PORT/; 0 means none. This machine alone can open
    it, or who forwards the port."""
    log_level: str = "info"
    """`debug`, `info`, `warning` or `error`."""
    log_format: str = "text"
    """`text` or `json`."""

    def targets(self) -> list[Target]:
        """What `backends` says. Raises ValueError."""
        return [parse(text) for text in self.backends]

    def health_limits(self) -> HealthLimits:
        return HealthLimits(
            breaker_failures=self.breaker_failures,
            outlier_rate=self.outlier_rate,
            outlier_part=self.outlier_part,
        )

    def policies_by_model(self) -> dict[str, str]:
        """Model -> policy of `model_policies`. Raises ValueError."""
        found = {}
        for text in self.model_policies:
            model, equals, policy = text.rpartition("=")
            if not equals or not model or policy not in POLICIES:
                raise ValueError(
                    f"model_policies must hold MODEL=POLICY with a policy of "
                    f"{', '.join(POLICIES)}, not {text!r}"
                )
            found[model] = policy
        return found

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        self.validate_listener()
        self.validate_peers()
        self.validate_tracing()
        self.validate_http()
        if not self.backends:
            raise ValueError("backends must name at least one gpu_service, such as 127.0.0.1:7001")
        if len(set(self.backends)) < len(self.backends):
            raise ValueError("backends must not name an address twice")
        self.targets()
        if self.policy not in POLICIES:
            raise ValueError(f"policy must be one of {', '.join(POLICIES)}, not {self.policy!r}")
        self.policies_by_model()
        for name in ("max_calls", "max_attempts", "breaker_failures"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        for name in (
            "abort_seconds", "retry_after_seconds", "stale_seconds", "silence_seconds",
            "reconnect_seconds", "max_reconnect_seconds", "dns_interval_seconds", "outlier_rate",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be more than 0")
        for name in (
            "drain_grace_seconds", "metrics_port", "status_port", "retry_ratio", "retry_base_ms",
            "retry_max_ms",
        ):  # fmt: skip
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative")
        if not 10 <= self.load_interval_ms <= 60_000:
            raise ValueError("load_interval_ms must be 10 to 60000")
        if self.stale_seconds * 1000 <= self.load_interval_ms:
            raise ValueError("stale_seconds must be longer than load_interval_ms")
