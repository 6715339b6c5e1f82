"""A name's addresses, looked up again whenever their time to live is over.

A lookup that fails, or finds nothing, changes nothing: a DNS server that is away must not take the
backends along. Whether those are alive is for their load streams to say.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import dns.asyncresolver
import dns.exception
import dns.resolver

from router.discovery.targets import DnsTarget, join

log = logging.getLogger("router.discovery")

MIN_SECONDS = 1.0
"""Between two lookups, whatever the time to live."""
LOOKUP_SECONDS = 5.0


async def follow(
    target: DnsTarget, interval: float, found: Callable[[frozenset[str]], None]
) -> None:
    """Tell `found` the addresses, now and whenever they were looked up again, until cancelled.
    interval: longest time between two lookups, in seconds."""
    failing = False
    while True:
        pause = interval
        try:
            hosts, ttl = await lookup(target)
            pause = min(interval, max(ttl, MIN_SECONDS))
            found(frozenset(join(host, target.port) for host in hosts))
            failing = False
        except (OSError, UnicodeError, dns.exception.DNSException) as error:
            if not failing:
                log.warning("cannot look up %s: %s", target.name, error)
            failing = True
            pause = min(interval, MIN_SECONDS)
        await asyncio.sleep(pause)


async def lookup(target: DnsTarget) -> tuple[set[str], float]:
    """Addresses, at least one, and the seconds for which they hold. Raises OSError or
    DNSException."""
    try:
        return await _ask(target)
    except dns.exception.DNSException:
        if target.server:
            raise
        # Names that only /etc/hosts or another source of the system's knows.
        return await _system(target), float("inf")


async def _ask(target: DnsTarget) -> tuple[set[str], float]:
    resolver = dns.asyncresolver.Resolver(configure=not target.server)
    resolver.lifetime = LOOKUP_SECONDS
    if target.server:
        host, _, port = target.server.partition(":")
        resolver.nameservers, resolver.port = [host], int(port or 53)
    answers = await asyncio.gather(
        *(resolver.resolve(target.name, kind, search=not target.server) for kind in ("A", "AAAA")),
        return_exceptions=True,
    )
    hosts: set[str] = set()
    ttl = float("inf")
    problem: BaseException | None = None
    for answer in answers:
        if isinstance(answer, BaseException):
            if problem is None or not isinstance(answer, dns.resolver.NoAnswer):
                problem = answer
        elif answer.rrset is not None:
            hosts.update(record.address for record in answer)
            ttl = min(ttl, float(answer.rrset.ttl))
    if not hosts:
        raise problem or dns.resolver.NoAnswer
    return hosts, ttl


async def _system(target: DnsTarget) -> set[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(target.name, target.port, type=socket.SOCK_STREAM)
    return {str(address[0]) for *_, address in found}
