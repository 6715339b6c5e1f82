"""The addresses in a Service's EndpointSlices: pods that are ready and not on their way out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.discovery.targets import KubernetesTarget, join


class Slices:
    """The slices of one Service, as far as the API server has told."""

    def __init__(self, target: KubernetesTarget) -> None:
        self._target = target
        self._slices: dict[str, frozenset[str]] = {}

    def replace(self, items: list[Mapping[str, Any]]) -> None:
        """These are all."""
        self._slices = {}
        for item in items:
            self.put(item)

    def put(self, item: Mapping[str, Any]) -> None:
        """This one is new, or has changed."""
        self._slices[item["metadata"]["name"]] = addresses(self._target, item)

    def drop(self, item: Mapping[str, Any]) -> None:
        self._slices.pop(item["metadata"]["name"], None)

    @property
    def addresses(self) -> frozenset[str]:
        return frozenset().union(*self._slices.values())


def addresses(target: KubernetesTarget, item: Mapping[str, Any]) -> frozenset[str]:
    """Of one slice. A pod that ends is left out as soon as it is told to: it still finishes what it
    has."""
    port = port_of(target, item)
    if port is None or item.get("addressType") == "FQDN":
        return frozenset()
    return frozenset(
        join(address, port)
        for endpoint in item.get("endpoints") or ()
        if _is_ready(endpoint.get("conditions") or {})
        # Kubernetes says of several addresses that only the first is to be used.
        for address in (endpoint.get("addresses") or ())[:1]
    )


def port_of(target: KubernetesTarget, item: Mapping[str, Any]) -> int | None:
    """None when the slice has no such port."""
    if target.port.isdigit():
        return int(target.port)
    return next(
        (
            int(port["port"])
            for port in item.get("ports") or ()
            if port.get("name") == target.port and port.get("port")
        ),
        None,
    )


def _is_ready(conditions: Mapping[str, Any]) -> bool:
    """An absent `ready` means yes, as Kubernetes says."""
    return conditions.get("ready") is not False and not conditions.get("terminating")
