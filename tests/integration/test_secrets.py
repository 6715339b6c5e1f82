"""A whole system with TLS, keys, tokens, traces and metrics at log level debug: nothing that is
secret shows in logs, traces, metrics, errors, or in what /proc tells of its processes, and memory
and sockets are nobody else's."""

from __future__ import annotations

import base64
import fcntl
import os
import stat
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest

from gpu_service.offload.keeper import SessionKeeper
from gpu_service.offload.shm_tier import ShmTransport
from neo_common.shm.handoff import TOKEN_BYTES
from protos.neo.v1 import cpu_attention_pb2 as attention
from protos.neo.v1 import cpu_attention_pb2_grpc as attention_grpc
from protos.neo.v1 import inference_pb2 as pb
from protos.neo.v1 import inference_pb2_grpc as pb_grpc
from tests.support.collector import Collector, collector
from tests.support.credentials import AUDIENCE, ISSUER, Authority, Signer, jwks, write_keys
from tests.support.offload import SHAPE, options
from tests.support.processes import descendants
from tests.support.stack import Service, free_port, stack_model

PROMPT = "the owl in the attic hums 7193"
_SEALED = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@dataclass
class System:
    services: dict[str, Service]
    runtime: Path
    spans: Collector
    metrics: list[int]
    secrets: dict[str, bytes]
    http: str
    user_key: str

    def processes(self) -> set[int]:
        found = {s.process.pid for s in self.services.values() if s.process is not None}
        return found.union(*(descendants(pid) for pid in found))


@contextmanager
def system(directory: Path) -> Iterator[System]:
    runtime = directory / "run"
    runtime.mkdir(mode=0o700)
    authority, signer = Authority(directory), Signer.make("ES256", "k1")
    certificate, private = authority.issue("gpu", "127.0.0.1")
    inside, outside, public = (directory / name for name in ("in.yaml", "out.yaml", "jwks.json"))
    peer_key = directory / "router.key"
    peer_key.write_text(write_keys(inside, router=["service"])["router"] + "\n")
    user_key = write_keys(outside, user=["inference"])["user"]
    public.write_bytes(jwks(signer))
    names = ("cpu", "gpu", "health", "router", "http", "m1", "m2", "m3")
    port = {name: free_port() for name in names}
    at = {name: f"127.0.0.1:{number}" for name, number in port.items()}
    with collector() as spans, ExitStack() as running:
        traced = {"trace_endpoint": spans.endpoint, "trace_sample_ratio": 1.0}
        cpu = {
            "listen": at["cpu"], "runtime_dir": str(runtime), "threads": 1,
            "metrics_port": port["m1"],
        }  # fmt: skip
        gpu = {
            "listen": at["gpu"], "health_listen": at["health"],
            "model": str(stack_model(directory)), "device": "cpu", "dtype": "float32",
            "threads": 1, "cpu_services": [at["cpu"]],
            "host_kv_gib": 0.0625, "gpu_kv_gib": 0.0625, "offload": "always",
            "offload_mode": "inline", "metrics_port": port["m2"], "tls_cert": certificate,
            "tls_key": private, "api_keys": str(inside), **traced,
        }  # fmt: skip
        router = {
            "listen": at["router"], "http_listen": at["http"], "backends": [at["gpu"]],
            "metrics_port": port["m3"], "api_keys": str(outside), "jwt_keys": str(public),
            "jwt_issuer": ISSUER, "jwt_audience": AUDIENCE, "peer_tls_ca": authority.file,
            "peer_api_key": str(peer_key), **traced,
        }  # fmt: skip
        services = {}
        for name, address, config in (
            ("cpu_service", at["cpu"], cpu),
            ("gpu_service", at["health"], gpu),
            ("router", at["router"], router),
        ):
            made = Service(name, address, config | {"log_level": "debug"}, directory)
            services[name] = made
            running.callback(made.stop)
            made.start()
        for service in services.values():
            service.wait_serving()
        pem = Path(private).read_text().splitlines()
        secrets = {
            "a caller's key": user_key.encode(),
            "the router's key": peer_key.read_text().strip().encode(),
            "a token": signer.token(tenant="t", exp=4_000_000_000).encode(),
            "a private key": pem[1].encode(),
            "a prompt": PROMPT.encode(),
        }
        metrics = [port[name] for name in ("m1", "m2", "m3")]
        yield System(services, runtime, spans, metrics, secrets, f"http://{at['http']}", user_key)


def bearer(credentials: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {credentials}"),)


def handoff_token(address: str) -> bytes:
    """As an engine gets it; the session goes with its lease."""
    asked = options(address, lease_seconds=1.0)
    keeper = SessionKeeper(SHAPE, asked, ShmTransport(SHAPE, asked))
    keeper._epoch = 1
    with grpc.insecure_channel(address) as channel:
        call = attention_grpc.CpuAttentionServiceStub(channel).Attend(
            iter([attention.AttendRequest(open=keeper._request())]), timeout=60
        )
        token: bytes = next(call).opened.handoff_token
        call.cancel()
    return token


def use(it: System) -> list[str]:
    """Calls that succeed and calls that fail; what the latter said."""
    said = []
    with grpc.insecure_channel(it.services["router"].address) as channel:
        stub = pb_grpc.InferenceServiceStub(channel)
        asked = pb.GenerateRequest(text=PROMPT)
        asked.sampling.max_tokens = 8
        token = it.secrets["a token"].decode()
        for credentials in (it.user_key, token):
            metadata = bearer(credentials)
            assert stub.Generate(asked, metadata=metadata, timeout=120).usage.completion_tokens > 0
            assert list(stub.GenerateStream(asked, metadata=metadata, timeout=120))
        wrong = pb.GenerateRequest(text=PROMPT, model="other")
        too_much = pb.GenerateRequest(text=PROMPT)
        too_much.sampling.temperature = -1
        for request, credentials in (
            (wrong, it.user_key), (too_much, it.user_key), (asked, it.user_key + "x"),
            (asked, token[:-4] + "AAAA"),
        ):  # fmt: skip
            with pytest.raises(grpc.RpcError) as caught:
                stub.Generate(request, metadata=bearer(credentials), timeout=120)
            said.append(str(caught.value))
    body = b'{"model": "x", "prompt": "' + PROMPT.encode() + b'", "max_tokens": '
    for end in (b"8}", b"oops", b"-1}"):
        headers = {"authorization": f"Bearer {it.user_key}", "content-type": "application/json"}
        request = urllib.request.Request(f"{it.http}/v1/completions", body + end, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                answer.read()
        except urllib.error.HTTPError as error:
            with closing(error):
                said.append(error.read().decode())
    return said


def spelled(secret: bytes) -> list[bytes]:
    """How a secret may be written down."""
    return [secret, secret.hex().encode(), base64.b64encode(secret).rstrip(b"="),
            repr(secret)[2:-1].encode()]  # fmt: skip


def shown(it: System, errors: list[str]) -> dict[str, bytes]:
    """All that somebody else may get to see, by where."""
    found = {f"log of {name}": s.log.encode() for name, s in it.services.items()}
    for port in it.metrics:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as answer:
            found[f"metrics {port}"] = answer.read()
    found["traces"] = repr(it.spans.wait_for(lambda spans: len(spans) > 5)).encode()
    for pid in it.processes():
        for name in ("cmdline", "environ", "comm", "maps"):
            found[f"/proc/{pid}/{name}"] = Path(f"/proc/{pid}/{name}").read_bytes()
    return found | {"errors": "\n".join(errors).encode()}


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[System, list[str]]]:
    with system(tmp_path_factory.mktemp("secrets")) as it:
        errors = use(it)
        it.secrets["a handoff token"] = handoff_token(it.services["cpu_service"].address)
        yield it, errors


def test_no_secret_is_shown(used: tuple[System, list[str]]) -> None:
    it, errors = used
    everything = shown(it, errors)
    assert len(errors) >= 6
    assert all(b"DEBUG" in everything[f"log of {name}"] for name in it.services)
    assert b"opened" in everything["log of cpu_service"]
    # An error goes to who has asked, and may name what was wrong with the request.
    leaks = [
        (what, where)
        for what, secret in it.secrets.items()
        for where, text in everything.items()
        if any(way in text for way in spelled(secret))
        and not (what == "a prompt" and where == "errors")
    ]
    assert not leaks


def test_tokens_of_the_handoff_cannot_be_guessed(used: tuple[System, list[str]]) -> None:
    """That each is used once is in tests/unit/test_shm.py."""
    it, _ = used
    address = it.services["cpu_service"].address
    tokens = {it.secrets["a handoff token"], handoff_token(address), handoff_token(address)}
    assert len(tokens) == 3
    assert {len(token) for token in tokens} == {TOKEN_BYTES} == {32}


def test_memory_has_no_name_and_a_fixed_size(used: tuple[System, list[str]]) -> None:
    it, _ = used
    seen: dict[str, int] = {}
    for pid in it.processes():
        assert "/dev/shm" not in Path(f"/proc/{pid}/maps").read_text()
        for link in Path(f"/proc/{pid}/fd").iterdir():
            try:
                target = os.readlink(link)
                if not target.startswith("/memfd:neo-"):
                    continue
                descriptor = os.open(link, os.O_RDONLY)
            except OSError:  # closed meanwhile
                continue
            seals = fcntl.fcntl(descriptor, fcntl.F_GET_SEALS)
            os.close(descriptor)
            assert seals & _SEALED == _SEALED, target
            seen[target.split()[0]] = pid
    assert {"/memfd:neo-control", "/memfd:neo-step"} <= seen.keys()
    assert len(seen) >= 3, "the pool, too"


def test_sockets_and_folders_are_the_owners(used: tuple[System, list[str]]) -> None:
    """A socket is closed to others by its mode or by its folder's, and a folder by its own."""
    it, _ = used
    engine = next(
        Path(arguments[arguments.index("--directory") + 1])
        for pid in it.processes()
        if "--directory" in (arguments := Path(f"/proc/{pid}/cmdline").read_text().split("\0"))
    )
    sockets = 0
    for folder in (*it.runtime.iterdir(), engine):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        for path in folder.iterdir():
            sockets += stat.S_ISSOCK(path.stat().st_mode)
            assert path.stat().st_uid == os.getuid()
    (handoff,) = it.runtime.glob("*/handoff")
    assert stat.S_IMODE(handoff.stat().st_mode) == 0o600
    assert sockets == 3
