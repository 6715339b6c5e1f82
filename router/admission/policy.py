"""The tenants file: what each tenant may use, and how much the backends are given at once.

max_running: 64            # of everybody together
max_queued: 1000
default:                   # each tenant that is not named, by itself
  max_running: 8
  tokens_per_minute: 60000
tenants:
  acme: {weight: 4, max_running: 32, tokens_per_minute: 600000}
  nightly: {max_class: low}
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from neo_common import config
from neo_common.documents import from_yaml
from neo_common.grpc.principal import MAX_TENANT_CHARS
from neo_common.watched import read

SETTING = "tenants"


class PriorityClass(enum.IntEnum):
    """What a request's priority number comes to here."""

    LOW = 0
    """Below 0."""
    NORMAL = 1
    """0."""
    HIGH = 2
    """Above 0."""

    @classmethod
    def of(cls, priority: int) -> PriorityClass:
        return cls.NORMAL if priority == 0 else cls.HIGH if priority > 0 else cls.LOW


CLASS_NAMES = tuple(each.name.lower() for each in PriorityClass)


@dataclass(frozen=True)
class TenantLimits:
    """Of one tenant. 0 means no limit, where nothing else is said."""

    weight: float = 1.0
    """Share of what is given out while several tenants of one class wait."""
    max_running: int = 0
    """Requests on backends at once; more wait."""
    max_queued: int = 0
    """Requests that wait; more are refused. 0: the overall bound alone."""
    tokens_per_minute: float = 0.0
    """Prompt and output tokens; a request's are taken when it comes, what it did not use is given
    back when it ends."""
    burst_tokens: float = 0.0
    """Most tokens that can be saved up; 0 means one minute's."""
    requests_per_minute: float = 0.0
    """At most one minute's are saved up."""
    max_request_kib: int = 0
    """Largest request message."""
    max_class: str = "high"
    """`high`, `normal` or `low`: requests that ask for a higher class are treated as of this."""

    @property
    def highest(self) -> PriorityClass:
        return PriorityClass[self.max_class.upper()]

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        if not 0.001 <= self.weight <= 1000:
            raise ValueError("weight must be 0.001 to 1000")
        if self.max_class not in CLASS_NAMES:
            raise ValueError(f"max_class must be one of {', '.join(reversed(CLASS_NAMES))}")
        _not_negative(self, "max_running", "max_queued", "max_request_kib")
        _not_negative(self, "tokens_per_minute", "burst_tokens", "requests_per_minute")
        if self.burst_tokens and not self.tokens_per_minute:
            raise ValueError("burst_tokens needs tokens_per_minute")


@dataclass(frozen=True)
class SharedLimits:
    """Of all tenants together."""

    max_running: int = 0
    """Requests on backends at once; more wait. 0: no bound."""
    max_backend_waiting: int = 0
    """Requests wait here while every backend has this many in its own queue, where first come is
    first served. 0: no bound."""
    max_queued: int = 1000
    """Requests that wait here; beyond that the newest of whoever waits with most for their share is
    refused."""
    max_wait_seconds: float = 30.0
    """A request that would wait longer, or has, is refused."""
    high_weight: float = 16.0
    """Share of the class `high` while several classes wait."""
    normal_weight: float = 4.0
    """The same for `normal`."""
    low_weight: float = 1.0
    """The same for `low`."""
    default_output_tokens: int = 512
    """What a request without max_tokens is counted for."""
    max_output_tokens: int = 16384
    """A request is counted for at most this much output a choice, whatever it asks for: engines cut
    max_tokens to what the model's context has room for."""
    bytes_per_token: float = 4.0
    """How prompts that are text are counted before the backend says what they were."""

    def class_weight(self, which: PriorityClass) -> float:
        return (self.low_weight, self.normal_weight, self.high_weight)[which]

    def validate(self) -> None:
        """Raises ValueError naming the field."""
        _not_negative(self, "max_running", "max_backend_waiting", "max_queued")
        _not_negative(self, "default_output_tokens", "max_output_tokens")
        if self.max_wait_seconds <= 0:
            raise ValueError("max_wait_seconds must be more than 0")
        if self.bytes_per_token < 0.1:
            raise ValueError("bytes_per_token must be at least 0.1")
        for name in ("high_weight", "normal_weight", "low_weight"):
            if not 0.001 <= getattr(self, name) <= 1000:
                raise ValueError(f"{name} must be 0.001 to 1000")


@dataclass(frozen=True)
class Policy:
    """The whole file."""

    shared: SharedLimits = SharedLimits()
    default: TenantLimits = TenantLimits()
    tenants: Mapping[str, TenantLimits] = field(default_factory=dict)

    def of(self, tenant: str) -> TenantLimits:
        return self.tenants.get(tenant, self.default)

    def label(self, tenant: str) -> str:
        """For metrics, which must not grow with every name that somebody makes up."""
        return tenant if tenant in self.tenants else "other"


def load_policy(path: str) -> Policy:
    """Raises ValueError."""
    data = read(path, SETTING)
    try:
        content = from_yaml(data)
    except ValueError as error:
        raise ValueError(f"{SETTING}: {path} is not YAML: {error}") from error
    try:
        return parse_policy({} if content is None else content)
    except ValueError as error:
        raise ValueError(f"{SETTING}: {path}: {error}") from error


def parse_policy(content: Any) -> Policy:
    """Raises ValueError naming the tenant and the field."""
    if not isinstance(content, Mapping):
        raise ValueError("must hold a mapping of settings")
    rest = dict(content)
    default = _tenant("default", rest.pop("default", {}))
    named = rest.pop("tenants", {})
    if not isinstance(named, Mapping):
        raise ValueError("tenants must map names to limits")
    tenants = {}
    for name, limits in named.items():
        if not isinstance(name, str) or not 0 < len(name) <= MAX_TENANT_CHARS:
            raise ValueError(f"{name!r} is not the name of a tenant; quote it if it is a number")
        tenants[name] = _tenant(f"tenants.{name}", limits)
    return Policy(config.build(SharedLimits, rest), default, tenants)


def _tenant(where: str, limits: Any) -> TenantLimits:
    if not isinstance(limits, Mapping):
        raise ValueError(f"{where} must be a mapping of limits")
    try:
        return config.build(TenantLimits, limits)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _not_negative(settings: Any, *names: str) -> None:
    for name in names:
        if getattr(settings, name) < 0:
            raise ValueError(f"{name} must not be negative")
