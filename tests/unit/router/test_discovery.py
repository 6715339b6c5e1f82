"""What entries of `backends` mean, and what is read from DNS and from EndpointSlices."""

from __future__ import annotations

import asyncio
from typing import Any

import dns.message
import dns.rrset
import pytest

from router.discovery.dns import follow, lookup
from router.discovery.endpoints import Slices, addresses
from router.discovery.follow import Discovery
from router.discovery.targets import DnsTarget, KubernetesTarget, StaticTarget, parse


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("10.0.0.1:7001", StaticTarget("10.0.0.1:7001")),
        ("dns:///gpu.ns.svc.cluster.local:7001", DnsTarget("gpu.ns.svc.cluster.local", 7001)),
        ("dns://10.0.0.53:5353/gpu:7001", DnsTarget("gpu", 7001, "10.0.0.53:5353")),
        ("k8s:///ns/gpu:7001", KubernetesTarget("ns", "gpu", "7001")),
        ("k8s:///gpu:grpc", KubernetesTarget("", "gpu", "grpc")),
    ],
)
def test_entries(text: str, target: object) -> None:
    assert parse(text) == target


@pytest.mark.parametrize(
    "text",
    [
        "dns:///gpu", "dns:gpu:7001", "dns:///gpu:0", "dns:///gpu:70000", "dns:////gpu:1",
        "k8s:///a/b/c:1", "k8s://ns/gpu:1", "k8s:///gpu", "k8s:///gpu:99999", "k8s:///Gpu:1",
    ],
)  # fmt: skip
def test_entries_that_mean_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="backends"):
        parse(text)


# EndpointSlices -------------------------------------------------------------------------------

GPU = KubernetesTarget("ns", "gpu", "7001")


def endpoint(*hosts: str, **conditions: bool) -> dict[str, Any]:
    return {"addresses": list(hosts), "conditions": conditions}


def a_slice(name: str, *endpoints: dict[str, Any], **fields: Any) -> dict[str, Any]:
    ports = [{"name": "grpc", "port": 7001}, {"name": "metrics", "port": 9000}]
    return {"metadata": {"name": name}, "endpoints": list(endpoints), "ports": ports, **fields}


def test_ready_pods_are_backends() -> None:
    item = a_slice(
        "s",
        endpoint("10.0.0.1", ready=True),
        endpoint("10.0.0.2", ready=False),
        endpoint("10.0.0.3"),
        endpoint("10.0.0.4", ready=True, terminating=True),
        endpoint("10.0.0.5", "10.0.0.6", ready=True, serving=True, terminating=False),
        {"addresses": ["10.0.0.7"]},
    )
    assert addresses(GPU, item) == {f"10.0.0.{n}:7001" for n in (1, 3, 5, 7)}


def test_ports_by_name_and_addresses_of_both_families() -> None:
    item = a_slice("s", endpoint("fd00::1", ready=True), addressType="IPv6")
    assert addresses(KubernetesTarget("", "gpu", "metrics"), item) == {"[fd00::1]:9000"}
    assert addresses(KubernetesTarget("", "gpu", "other"), item) == set()
    assert addresses(GPU, a_slice("s", endpoint("gpu.example"), addressType="FQDN")) == set()
    assert addresses(GPU, {"metadata": {"name": "s"}, "endpoints": None, "ports": None}) == set()


def test_a_service_is_all_its_slices() -> None:
    slices = Slices(GPU)
    slices.replace([a_slice("s", endpoint("a")), a_slice("t", endpoint("b"), endpoint("c"))])
    assert slices.addresses == {"a:7001", "b:7001", "c:7001"}
    slices.put(a_slice("t", endpoint("c")))
    slices.drop(a_slice("s"))
    slices.drop(a_slice("unheard of"))
    assert slices.addresses == {"c:7001"}
    slices.replace([])
    assert slices.addresses == set()


# DNS ------------------------------------------------------------------------------------------


class Names(asyncio.DatagramProtocol):
    """A DNS server over UDP that knows `hosts` under every name."""

    def __init__(self) -> None:
        self.hosts: dict[str, list[str]] = {"A": [], "AAAA": []}
        self.ttl = 0
        self.queries: asyncio.Queue[str] = asyncio.Queue()
        self._transport: Any = None

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def datagram_received(self, data: bytes, addr: Any) -> None:
        query = dns.message.from_wire(data)
        answer = dns.message.make_response(query)
        (question,) = query.question
        self.queries.put_nowait(question.rdtype.name)
        hosts = self.hosts[question.rdtype.name]
        if hosts:
            kind = question.rdtype.name
            answer.answer.append(dns.rrset.from_text(question.name, self.ttl, "IN", kind, *hosts))
        self._transport.sendto(answer.to_wire(), addr)


@pytest.fixture
async def names() -> Any:
    loop = asyncio.get_running_loop()
    transport, server = await loop.create_datagram_endpoint(Names, local_addr=("127.0.0.1", 0))
    port = transport.get_extra_info("sockname")[1]
    yield server, DnsTarget("gpu.example", 7001, f"127.0.0.1:{port}")
    transport.close()


async def test_all_addresses_of_a_name(names: Any) -> None:
    server, target = names
    server.hosts = {"A": ["10.0.0.1", "10.0.0.2"], "AAAA": ["fd00::1"]}
    server.ttl = 7
    assert await lookup(target) == ({"10.0.0.1", "10.0.0.2", "fd00::1"}, 7.0)


async def test_a_name_is_asked_for_again_and_failures_change_nothing(
    names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("router.discovery.dns.MIN_SECONDS", 0.02)
    server, target = names
    server.hosts["A"] = ["10.0.0.1"]
    news: asyncio.Queue[list[str]] = asyncio.Queue()
    discovery = Discovery([StaticTarget("static:1"), target], 30.0, None)
    discovery.start(news.put_nowait)
    try:
        async with asyncio.timeout(20):
            assert await news.get() == ["static:1", "10.0.0.1:7001"]
            server.hosts["A"] = []  # as a headless Service whose pods are all gone for a moment
            while not server.queries.empty():
                server.queries.get_nowait()
            for _ in range(4):
                await server.queries.get()
            assert discovery.addresses == ["static:1", "10.0.0.1:7001"]
            server.hosts["A"] = ["10.0.0.3", "10.0.0.2"]
            assert await news.get() == ["static:1", "10.0.0.2:7001", "10.0.0.3:7001"]
    finally:
        await discovery.stop()


async def test_the_interval_bounds_the_time_to_live(
    names: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour by the answer, but the setting says otherwise."""
    monkeypatch.setattr("router.discovery.dns.MIN_SECONDS", 0.01)
    server, target = names
    server.hosts["A"], server.ttl = ["10.0.0.1"], 3600
    lookups: asyncio.Queue[frozenset[str]] = asyncio.Queue()
    task = asyncio.create_task(follow(target, 0.02, lookups.put_nowait))
    async with asyncio.timeout(20):
        for _ in range(3):
            assert await lookups.get() == {"10.0.0.1:7001"}
    task.cancel()


async def test_names_of_the_hosts_file_are_found() -> None:
    hosts, _ = await lookup(DnsTarget("localhost", 7001))
    assert hosts & {"127.0.0.1", "::1"}
