"""A cpu_service that dies, stops, stays away or cannot start; an engine that dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import grpc
import pytest
import torch
import yaml

from gpu_service.offload.host_tier import HostTierStalled, HostTierState
from gpu_service.offload.keeper import HostTierUnavailable
from kernels.cpu import LAYOUT_VERSION
from protos.neo.v1 import cpu_attention_pb2, cpu_attention_pb2_grpc
from tests.support.offload import (
    SHAPE,
    SLOTS,
    TRANSPORTS,
    Mirror,
    cpu_service,
    open_tier,
    poll_until,
)
from tests.support.processes import suspend
from tests.support.stack import REPO, free_port


def kill(service: object) -> None:
    service.signal(signal.SIGKILL)  # type: ignore[attr-defined]
    service.wait_exit()  # type: ignore[attr-defined]


def test_killed_in_the_middle_of_a_sweep_and_restarted(tmp_path: Path) -> None:
    """No KV is lost, the interrupted sweep is repeated, and the wait does not last its deadline."""
    mirror = Mirror.make()
    with cpu_service(tmp_path) as service, open_tier(service.address) as tier:
        mirror.fill(tier)
        epoch = tier.epoch
        rows = mirror.rows([40, 90])
        for _ in range(3):
            start = time.monotonic()
            with pytest.raises(HostTierStalled):
                mirror.sweep(tier, rows, after_submit=lambda layer: layer == 1 and kill(service))
            assert time.monotonic() - start < 2.0, "the deadline is 5 s; death is noticed at once"
            assert tier.state is HostTierState.DEGRADED
            with pytest.raises(HostTierStalled):
                tier.begin_sweep([rows])
            service.start()
            service.wait_serving()
            assert poll_until(tier, HostTierState.UP) < 1.0
            assert tier.epoch > epoch
            epoch = tier.epoch
            mirror.sweep(tier, rows)  # the same rows: appending is idempotent
            mirror.check_contents(tier)


def test_the_pool_can_be_read_and_written_while_the_service_is_dead(tmp_path: Path) -> None:
    mirror = Mirror.make()
    with cpu_service(tmp_path) as service, open_tier(service.address) as tier:
        mirror.fill(tier)
        kill(service)
        poll_until(tier, HostTierState.DEGRADED)
        assert tier.mapped_pool is not None
        mirror.check_contents(tier)
        mirror.fill(tier)
        service.start()
        service.wait_serving()
        poll_until(tier, HostTierState.UP)
        mirror.check_contents(tier)
        mirror.sweep(tier, mirror.rows([40]))


def test_a_stopped_service_is_given_up_and_cannot_write_later(tmp_path: Path) -> None:
    """SIGSTOP past the deadline: blocks of the sweep stay quarantined until the old worker has
    acknowledged, and what it does after SIGCONT does not touch them once they are reassigned."""
    mirror = Mirror.make()
    with cpu_service(tmp_path) as service, open_tier(service.address, deadline_seconds=0.2) as tier:
        mirror.fill(tier)
        rows = mirror.rows([40, 90])
        service.signal(signal.SIGSTOP)
        start = time.monotonic()
        with pytest.raises(HostTierStalled, match=r"did not answer within 0\.2 s"):
            mirror.sweep(tier, rows)
        assert time.monotonic() - start < 1.0
        assert tier.state is HostTierState.DEGRADED
        tier.poll()
        assert tier.mapped_pool is None, "the stopped worker could still write"
        slots = torch.arange(1)
        token = mirror.normal(1, SHAPE.kv_heads, SHAPE.head_dim)
        with pytest.raises(HostTierStalled):
            tier.write_kv(0, slots, token, token)
        tier.read_kv(0, slots)  # reading harms nobody
        time.sleep(0.3)
        tier.poll()
        assert tier.state is HostTierState.DEGRADED
        service.signal(signal.SIGCONT)
        assert poll_until(tier, HostTierState.UP) < 2.0
        mirror.fill(tier)  # all blocks mean something else now
        time.sleep(0.1)
        mirror.check_contents(tier)
        mirror.sweep(tier, rows)


def test_a_restart_beside_a_service_that_is_only_stopped(tmp_path: Path) -> None:
    """Two processes for a while (a supervisor gave up on the stopped one): the session waits for
    proof that the old one is gone."""
    mirror = Mirror.make()
    with cpu_service(tmp_path) as service, open_tier(service.address, deadline_seconds=0.2) as tier:
        mirror.fill(tier)
        old = service.process
        assert old is not None
        suspend(old.pid)
        with pytest.raises(HostTierStalled):
            mirror.sweep(tier, mirror.rows([40]))
        # The old process still owns the port; a proxy in front would lead to the new one. Here the
        # tier itself is pointed there.
        with cpu_service(tmp_path / "2") as second:
            object.__setattr__(tier._options, "address", second.address)
            time.sleep(0.5)
            tier.poll()
            assert tier.state is HostTierState.DEGRADED
            assert tier.mapped_pool is None
            old.kill()
            old.wait()
            poll_until(tier, HostTierState.UP)
            mirror.check_contents(tier)
            mirror.sweep(tier, mirror.rows([40]))
            tier.close()


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_lease_that_runs_out_loses_the_kv_and_a_new_session_follows(
    tmp_path: Path, transport: str
) -> None:
    mirror = Mirror.make()
    with (
        cpu_service(tmp_path) as service,
        open_tier(service.address, transport, lease_seconds=1.0) as tier,
    ):
        mirror.fill(tier)
        kill(service)
        poll_until(tier, HostTierState.DEGRADED)
        assert 0.5 < poll_until(tier, HostTierState.EXPIRED) < 3.0
        with pytest.raises(HostTierStalled):
            tier.read_kv(0, torch.arange(1))
        service.start()
        service.wait_serving()
        poll_until(tier, HostTierState.UP)
        k, _ = tier.read_kv(0, torch.arange(SLOTS))
        assert not k.any(), "the new pool is empty"
        mirror = Mirror.make()
        mirror.fill(tier)
        mirror.sweep(tier, mirror.rows([40]))


def test_with_the_grpc_transport_a_dead_service_takes_the_kv_with_it(tmp_path: Path) -> None:
    """LOST is seen even when the new session is up before the engine polls."""
    mirror = Mirror.make()
    with cpu_service(tmp_path) as service, open_tier(service.address, "grpc") as tier:
        mirror.fill(tier)
        start = time.monotonic()
        with pytest.raises(HostTierStalled):
            mirror.sweep(
                tier, mirror.rows([40]), after_submit=lambda layer: layer == 1 and kill(service)
            )
        assert time.monotonic() - start < 2.0
        service.start()
        service.wait_serving()
        deadline = time.monotonic() + 10
        while tier._keeper.view.state is not HostTierState.UP and time.monotonic() < deadline:
            time.sleep(0.01)
        tier.poll()
        assert tier.state is HostTierState.LOST
        tier.poll()
        assert tier.state is HostTierState.UP
        mirror = Mirror.make()
        mirror.fill(tier)
        mirror.sweep(tier, mirror.rows([40]))


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_cut_connection_is_resumed_with_the_kv(tmp_path: Path, transport: str) -> None:
    """The stream ends, both processes live on."""
    mirror = Mirror.make()
    with cpu_service(tmp_path) as service, open_tier(service.address, transport) as tier:
        mirror.fill(tier)
        epoch = tier.epoch
        for _ in range(5):
            attachment = tier._view.attachment
            assert attachment is not None
            attachment.link.cancel()
            deadline = time.monotonic() + 5
            while tier.epoch == epoch and time.monotonic() < deadline:
                tier.poll()
                time.sleep(0.001)
            poll_until(tier, HostTierState.UP)
            assert tier.epoch > epoch
            epoch = tier.epoch
            mirror.sweep(tier, mirror.rows([40, 33]))
        mirror.check_contents(tier)


def test_sigterm_with_a_live_session(tmp_path: Path) -> None:
    """The service waits for the session, ends it with its grace, exits 0; the engine goes on with
    the next process, KV intact."""
    mirror = Mirror.make()
    with (
        cpu_service(tmp_path, drain_grace_seconds=2.0) as service,
        open_tier(service.address) as tier,
    ):
        mirror.fill(tier)
        service.signal(signal.SIGTERM)
        time.sleep(0.1)
        mirror.sweep(tier, mirror.rows([40]))  # still served within the grace
        with (
            pytest.raises(HostTierUnavailable, match="shutting down"),
            open_tier(service.address, open_seconds=0.3),
        ):
            pass
        with grpc.insecure_channel(service.address) as channel:
            stub = cpu_attention_pb2_grpc.CpuAttentionServiceStub(channel)
            asked = stub.GetCapabilities(cpu_attention_pb2.GetCapabilitiesRequest(), timeout=5)
            assert asked.layout_version == LAYOUT_VERSION  # questions are answered to the end
        assert service.wait_exit(5) == 0
        poll_until(tier, HostTierState.DEGRADED)
        service.start()
        service.wait_serving()
        poll_until(tier, HostTierState.UP)
        mirror.check_contents(tier)
        mirror.sweep(tier, mirror.rows([40]))


def test_sigterm_ends_at_once_when_the_session_closes(tmp_path: Path) -> None:
    with cpu_service(tmp_path, drain_grace_seconds=30.0) as service:
        with open_tier(service.address):
            service.signal(signal.SIGTERM)
            time.sleep(0.2)
            assert service.process is not None
            assert service.process.poll() is None
        assert service.wait_exit(5) == 0


def test_the_memory_of_an_engine_that_dies_is_free_at_once(tmp_path: Path) -> None:
    """SIGKILL of the engine: the tether's end says so, long before the lease does."""
    script = (
        "import sys, time\n"
        "from tests.support.offload import open_tier\n"
        "with open_tier(sys.argv[1], lease_seconds=60.0) as tier:\n"
        "    print('up', flush=True)\n"
        "    time.sleep(60)\n"
    )
    with cpu_service(tmp_path, max_sessions=1) as service:
        engine = subprocess.Popen(
            [sys.executable, "-c", script, service.address],
            cwd=REPO,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(REPO)},
        )
        assert engine.stdout is not None
        assert engine.stdout.readline() == b"up\n"
        engine.kill()
        engine.wait()
        engine.stdout.close()
        time.sleep(0.3)
        with open_tier(service.address) as tier:
            assert tier.state is HostTierState.UP


def test_closing_while_the_service_is_away_does_not_hang(tmp_path: Path) -> None:
    with cpu_service(tmp_path) as service:
        for number in (signal.SIGKILL, signal.SIGSTOP):
            with open_tier(service.address):
                service.signal(number)
                time.sleep(0.1)
                start = time.monotonic()
            assert time.monotonic() - start < 8
            if number == signal.SIGKILL:
                service.wait_exit()
                service.start()
                service.wait_serving()


def test_close_from_a_stall_interrupts_the_keeper(tmp_path: Path) -> None:
    """A close while it is reconnecting ends the attempt."""
    with cpu_service(tmp_path) as service, open_tier(service.address) as tier:
        kill(service)
        poll_until(tier, HostTierState.DEGRADED)
        listener = socket.create_server(("127.0.0.1", int(service.address.split(":")[1])))
        time.sleep(0.3)  # it is now talking to somebody who never answers
        closer = threading.Thread(target=tier.close)
        closer.start()
        closer.join(3)
        assert not closer.is_alive()
        listener.close()


# Refusals to start: exit code 2 and one sentence.


def refuse(tmp_path: Path, **config: object) -> str:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"runtime_dir": str(tmp_path / "run"), **config}))
    result = subprocess.run(
        [sys.executable, "-m", "cpu_service", "--config", str(path)],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    return result.stderr.splitlines()[-1]  # gRPC itself may have logged before


def test_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        assert address in refuse(tmp_path, listen=address)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"listen": "nowhere"}, "listen"),
        ({"cpus": [4000]}, "cpus"),
        ({"threads": -1}, "threads"),
        ({"max_sessions": 0}, "max_sessions"),
        ({"runtime_dir": "/proc/nowhere"}, "runtime_dir"),
        ({"thread": 1}, "did you mean threads"),
        ({"log_level": "loud"}, "log_level"),
        ({"isa": "z80"}, "isa"),
    ],
)
def test_bad_configuration(tmp_path: Path, config: dict[str, object], words: str) -> None:
    assert words in refuse(tmp_path, **{"listen": f"127.0.0.1:{free_port()}", **config})


def test_a_pool_larger_than_memory_is_one_sentence(tmp_path: Path) -> None:
    with (
        cpu_service(tmp_path, max_pool_gib=0.0001) as service,
        pytest.raises(HostTierUnavailable, match=r"do not fit .* max_pool_gib leaves"),
        open_tier(service.address),
    ):
        pass


def test_no_service_at_all_is_one_sentence(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    address = f"127.0.0.1:{free_port()}"
    with (
        pytest.raises(HostTierUnavailable, match=f"cpu_service at {address} cannot be used"),
        open_tier(address, open_seconds=0.3),
    ):
        pass
    told = [record.getMessage() for record in caplog.records if address in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith(f"host tier: waiting up to 0.3 s for the cpu_service at {address}")
