"""A network between two namespaces of which a thread of ours carries every packet: late, or not.

    ours 10.77.0.1 ── tun ── thread: delay, loss, cut ── tun ── 10.77.0.2 in namespace `link.name`

Needs root and /dev/net/tun; `missing()` says what is not there.
"""

from __future__ import annotations

import fcntl
import heapq
import os
import random
import select
import shutil
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

HERE, THERE = "10.77.0.1", "10.77.0.2"
_TUNSETIFF = 0x400454CA
_TUN_WITHOUT_HEADER = 0x1001
_PACKET_BYTES = 65536


def missing() -> str:
    """Why there can be no such link; "" when there can."""
    if os.geteuid() != 0:
        return "needs root"
    if not Path("/dev/net/tun").exists():
        return "needs /dev/net/tun"
    if shutil.which("ip") is None:
        return "needs ip (iproute2)"
    tried = subprocess.run(["ip", "netns", "list"], capture_output=True, check=False)
    return "" if tried.returncode == 0 else "needs `ip netns`"


@dataclass
class Link:
    """What happens to packets; may be changed at any time."""

    name: str
    seed: int
    loss: float = 0.0
    """Part of the packets, of both directions."""
    delay: float = 0.0
    """Seconds, each way, give or take half: packets overtake each other."""
    cut: bool = False
    carried: int = 0
    dropped: int = 0
    _waiting: list[tuple[float, int, int, bytes]] = field(default_factory=list)

    def carry(self, ends: tuple[int, int], stop: int) -> None:
        """Until `stop` becomes readable."""
        draw = random.Random(self.seed)
        while True:
            wait = max(0.0, self._waiting[0][0] - time.monotonic()) if self._waiting else None
            ready, _, _ = select.select([*ends, stop], [], [], wait)
            if stop in ready:
                return
            for end in ready:
                packet = os.read(end, _PACKET_BYTES)
                self.carried += 1
                if self.cut or draw.random() < self.loss:
                    self.dropped += 1
                    continue
                due = time.monotonic() + self.delay * draw.uniform(0.5, 1.5)
                other = ends[1] if end == ends[0] else ends[0]
                heapq.heappush(self._waiting, (due, self.carried, other, packet))
            while self._waiting and self._waiting[0][0] <= time.monotonic():
                _, _, end, packet = heapq.heappop(self._waiting)
                os.write(end, packet)


@contextmanager
def lossy_link(seed: int) -> Iterator[Link]:
    link = Link(f"neo-{os.getpid()}", seed)
    with ExitStack() as stack:
        _ip("netns", "add", link.name)
        stack.callback(_ip, "netns", "delete", link.name)
        ends = (_tun(f"{link.name}a"), _tun(f"{link.name}b"))
        for end in ends:
            stack.callback(os.close, end)
        _ip("link", "set", f"{link.name}b", "netns", link.name)
        _ip("address", "add", HERE, "peer", THERE, "dev", f"{link.name}a")
        _ip("link", "set", f"{link.name}a", "up")
        inside = ("-n", link.name)
        _ip(*inside, "address", "add", THERE, "peer", HERE, "dev", f"{link.name}b")
        _ip(*inside, "link", "set", f"{link.name}b", "up")
        stopped, stop = os.pipe()
        thread = threading.Thread(target=link.carry, args=(ends, stopped))
        thread.start()
        try:
            yield link
        finally:
            os.close(stop)
            thread.join()
            os.close(stopped)


def _tun(name: str) -> int:
    end = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(end, _TUNSETIFF, struct.pack("16sH", name.encode(), _TUN_WITHOUT_HEADER))
    return end


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
