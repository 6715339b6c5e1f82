"""CpuAttentionService spoken by hand: refusals, epochs, leases, lying messages."""

from __future__ import annotations

import os
import queue
import time
from collections.abc import Iterator

import grpc
import pytest
from google.protobuf import json_format

from kernels.cpu import LAYOUT_VERSION
from neo_client import cli
from neo_common.errors import ErrorDetails
from neo_common.shm.handoff import HandoffRefused, fetch
from neo_common.shm.memory import boot_id
from protos.neo.v1 import cpu_attention_pb2 as pb
from protos.neo.v1 import cpu_attention_pb2_grpc as pb_grpc
from protos.neo.v1 import machine_pb2
from tests.support.offload import cpu_service
from tests.support.stack import Service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with cpu_service(tmp_path_factory.mktemp("cpu"), max_sessions=100) as running:
        yield running


def opening(**changes: object) -> pb.OpenSession:
    shape = pb.AttentionShape(
        layers=2,
        query_heads=4,
        kv_heads=2,
        head_dim=32,
        block_tokens=16,
        kv_dtype=pb.KV_DTYPE_FLOAT32,
        activation_dtype=pb.KV_DTYPE_FLOAT32,
        scale=1.0,
    )
    for name in [name for name in changes if name.startswith("shape.")]:
        value = changes.pop(name)
        field = name.removeprefix("shape.")
        if isinstance(value, list):
            getattr(shape, field).extend(value)
        else:
            setattr(shape, field, value)
    values: dict[str, object] = {
        "session_id": os.urandom(16).hex(),
        "epoch": 1,
        "shape": shape,
        "host_blocks": 8,
        "max_rows": 4,
        "max_blocks_per_row": 4,
        "transport": pb.TRANSPORT_SHM,
        "lease_seconds": 1.0,
        "layout_version": LAYOUT_VERSION,
        "boot_id": boot_id(),
        **changes,
    }
    return pb.OpenSession(**values)  # type: ignore[arg-type]


@pytest.fixture
def stub(service: Service) -> Iterator[pb_grpc.CpuAttentionServiceStub]:
    with grpc.insecure_channel(service.address) as channel:
        yield pb_grpc.CpuAttentionServiceStub(channel)


def attend(
    stub: pb_grpc.CpuAttentionServiceStub, *requests: pb.AttendRequest
) -> list[pb.AttendResponse]:
    return list(stub.Attend(iter(requests), timeout=10))


REFUSED = {
    "session id": ({"session_id": "zz"}, "INVALID_ARGUMENT", "session_id"),
    "epoch": ({"epoch": 0}, "INVALID_ARGUMENT", "epoch"),
    "blocks": ({"host_blocks": 0}, "INVALID_ARGUMENT", "host_blocks"),
    "rows": ({"max_rows": 1 << 20}, "INVALID_ARGUMENT", "max_rows"),
    "table": ({"max_blocks_per_row": 0}, "INVALID_ARGUMENT", "max_blocks_per_row"),
    "lease": ({"lease_seconds": 1e6}, "INVALID_ARGUMENT", "lease_seconds"),
    "lease nan": ({"lease_seconds": float("nan")}, "INVALID_ARGUMENT", "lease_seconds"),
    "transport": ({"transport": 0}, "INVALID_ARGUMENT", "transport"),
    "layers": ({"shape.layers": 0}, "INVALID_ARGUMENT", "shape.layers"),
    "heads": ({"shape.query_heads": 3}, "INVALID_ARGUMENT", "shape.query_heads"),
    "head dim": ({"shape.head_dim": 31}, "INVALID_ARGUMENT", "shape.head_dim"),
    "block": ({"shape.block_tokens": 17}, "INVALID_ARGUMENT", "shape.block_tokens"),
    "kv dtype": ({"shape.kv_dtype": 9}, "INVALID_ARGUMENT", "shape.kv_dtype"),
    "activation": ({"shape.activation_dtype": 4}, "INVALID_ARGUMENT", "shape.activation_dtype"),
    "scale": ({"shape.scale": float("inf")}, "INVALID_ARGUMENT", "shape.scale"),
    "softcap": ({"shape.softcap": -1.0}, "INVALID_ARGUMENT", "shape.softcap"),
    "windows": ({"shape.sliding_window": [1]}, "INVALID_ARGUMENT", "shape.sliding_window"),
    "layout": ({"layout_version": 99}, "LAYOUT_MISMATCH", "layout_version"),
    "machine": ({"boot_id": "elsewhere"}, "NOT_COLOCATED", "boot_id"),
    "memory": ({"host_blocks": 1 << 30}, "OUT_OF_HOST_MEMORY", "host_blocks"),
}


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.replace(" ", "-"))
def test_an_opening_that_cannot_be_is_refused_with_its_field(
    stub: pb_grpc.CpuAttentionServiceStub, case: str
) -> None:
    changes, reason, field = REFUSED[case]
    with pytest.raises(grpc.RpcError) as caught:
        attend(stub, pb.AttendRequest(open=opening(**changes)))
    details = ErrorDetails(caught.value)
    assert details.reason == reason
    assert details.fields == [field]
    assert field.split(".")[-1] in caught.value.details() or reason == "OUT_OF_HOST_MEMORY"


@pytest.mark.parametrize(
    "request_",
    [
        pb.AttendRequest(heartbeat=pb.Heartbeat()),
        pb.AttendRequest(),
        pb.AttendRequest(step=pb.AttendStep()),
    ],
)
def test_the_first_message_must_open(
    stub: pb_grpc.CpuAttentionServiceStub, request_: pb.AttendRequest
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        attend(stub, request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_bytes_that_are_no_message_are_refused(service: Service) -> None:
    service_path = "/neo.v1.CpuAttentionService/"
    garbage = b"\xff\xff"
    opened = pb.AttendRequest(open=opening()).SerializeToString()
    with grpc.insecure_channel(service.address) as channel:
        stream = channel.stream_stream(service_path + "Attend")
        for messages in ([garbage], [opened, garbage]):
            with pytest.raises(grpc.RpcError) as caught:
                list(stream(iter(messages), timeout=5))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        unary = channel.unary_unary(service_path + "GetCapabilities")
        with pytest.raises(grpc.RpcError) as caught:
            unary(garbage, timeout=5)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_an_empty_stream_is_refused(stub: pb_grpc.CpuAttentionServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        attend(stub)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_capabilities(stub: pb_grpc.CpuAttentionServiceStub) -> None:
    answer = stub.GetCapabilities(pb.GetCapabilitiesRequest(), timeout=5)
    assert answer.layout_version == LAYOUT_VERSION
    assert answer.boot_id == boot_id()
    assert answer.threads == 1
    assert set(answer.transports) == {pb.TRANSPORT_SHM, pb.TRANSPORT_GRPC}
    assert answer.isa in answer.isas
    assert answer.pool_bytes_available > 0


def test_the_doctor_asks_for_the_machine(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["doctor", "--ask", "--address", service.address]) == 0
    machine = json_format.Parse(capsys.readouterr().out, machine_pb2.MachineReport())
    assert machine.memory_bytes >= machine.available_bytes > 0
    assert list(machine.allowed_cpus)


def first_opened(
    stub: pb_grpc.CpuAttentionServiceStub, request: pb.OpenSession
) -> tuple[pb.SessionOpened, grpc.Call]:
    """Opens, and leaves the stream half-way (cancelled by the caller)."""
    call = stub.Attend(iter([pb.AttendRequest(open=request)]), timeout=10)
    return next(call).opened, call


def test_mapped_needs_the_memory_and_the_right_nonce(
    stub: pb_grpc.CpuAttentionServiceStub,
) -> None:
    request = opening()
    mapped = pb.AttendRequest(mapped=pb.MemoryMapped(nonce=b"n" * 16))
    with pytest.raises(grpc.RpcError) as caught:
        attend(stub, pb.AttendRequest(open=request), mapped)
    assert ErrorDetails(caught.value).reason == "FAILED_PRECONDITION"

    request.epoch, request.resume = 2, True
    opened, call = first_opened(stub, request)
    tether, fds = fetch(opened.handoff_socket, opened.handoff_token)
    assert len(fds) == 3
    for fd in fds:
        os.close(fd)
    with pytest.raises(HandoffRefused, match="used before"):
        fetch(opened.handoff_socket, opened.handoff_token)
    with pytest.raises(HandoffRefused, match="not known"):
        fetch(opened.handoff_socket, bytes(32))
    call.cancel()
    tether.close()


def test_a_wrong_nonce_means_that_memory_is_not_shared(
    stub: pb_grpc.CpuAttentionServiceStub,
) -> None:
    requests: queue.SimpleQueue[pb.AttendRequest] = queue.SimpleQueue()
    requests.put(pb.AttendRequest(open=opening()))
    call = stub.Attend(iter(requests.get, None), timeout=10)
    opened = next(call).opened
    tether, fds = fetch(opened.handoff_socket, opened.handoff_token)
    requests.put(pb.AttendRequest(mapped=pb.MemoryMapped(nonce=b"n" * 16)))
    with pytest.raises(grpc.RpcError) as caught:
        next(call)
    assert ErrorDetails(caught.value).reason == "NOT_COLOCATED"
    requests.put(None)  # type: ignore[arg-type]
    tether.close()
    for fd in fds:
        os.close(fd)


def test_epochs_only_go_up_and_shapes_stay(stub: pb_grpc.CpuAttentionServiceStub) -> None:
    request = opening(epoch=5)
    _, call = first_opened(stub, request)
    for epoch, resume, changes, reason in (
        (5, True, {}, "STALE_EPOCH"),
        (4, True, {}, "STALE_EPOCH"),
        (6, False, {}, "SESSION_EXISTS"),
        (6, True, {"host_blocks": 9}, "FAILED_PRECONDITION"),
    ):
        other = opening(session_id=request.session_id, epoch=epoch, resume=resume, **changes)
        with pytest.raises(grpc.RpcError) as caught:
            attend(stub, pb.AttendRequest(open=other))
        assert ErrorDetails(caught.value).reason == reason
    call.cancel()


def test_a_lease_that_is_not_renewed_ends_the_session(
    service: Service, stub: pb_grpc.CpuAttentionServiceStub
) -> None:
    """The service's own side of it: memory free again, tether ended, stream over."""
    request = opening(lease_seconds=1.0)
    opened, call = first_opened(stub, request)
    tether, fds = fetch(opened.handoff_socket, opened.handoff_token)
    for fd in fds:
        os.close(fd)
    tether.settimeout(5)
    start = time.monotonic()
    assert tether.recv(1) == b""
    assert 0.8 < time.monotonic() - start < 3
    tether.close()
    request.epoch, request.resume = 2, False  # the name is free again
    _, again = first_opened(stub, request)
    call.cancel()
    again.cancel()


def test_an_opening_that_is_cut_off_leaves_no_session(
    stub: pb_grpc.CpuAttentionServiceStub,
) -> None:
    """Before the memory is mapped there is nothing to come back to, so that the engine's next try,
    or the service's drain, need not wait for the lease."""
    request = opening(lease_seconds=600.0)
    requests: queue.SimpleQueue[pb.AttendRequest] = queue.SimpleQueue()
    requests.put(pb.AttendRequest(open=request))
    call = stub.Attend(iter(requests.get, None), timeout=60)
    assert next(call).opened.handoff_token
    call.cancel()
    requests.put(None)  # type: ignore[arg-type]
    give_up, refused = time.monotonic() + 60, "SESSION_EXISTS"
    while refused == "SESSION_EXISTS" and time.monotonic() < give_up:  # for a moment
        refused = ""
        try:
            first_opened(stub, request)[1].cancel()
        except grpc.RpcError as error:
            refused = ErrorDetails(error).reason
    assert not refused


def test_inline_tensors_that_lie_are_refused(stub: pb_grpc.CpuAttentionServiceStub) -> None:
    """With the grpc transport: a bad step is an error of that step, the session goes on."""
    kv, q = bytes(2 * 32 * 4), bytes(4 * 32 * 4)
    good = {"sweep": 1, "lengths": [5], "block_ids": [0], "q": q, "k": kv, "v": kv}
    lies: list[dict[str, object]] = [
        {"layer": 2},
        {"lengths": [0]},
        {"lengths": [65]},
        {"lengths": [17]},
        {"lengths": []},
        {"lengths": [5] * 5},
        {"block_ids": [8]},
        {"block_ids": [2**32 - 1]},
        {"block_ids": [0, 1]},
        {"q": q[:-4]},
        {"k": b""},
        {"v": kv + kv},
    ]
    request = opening(transport=pb.TRANSPORT_GRPC)
    steps = [pb.AttendStep(**{**good, **lie}) for lie in lies]  # type: ignore[arg-type]
    answers = attend(
        stub,
        pb.AttendRequest(open=request),
        pb.AttendRequest(mapped=pb.MemoryMapped()),
        *[pb.AttendRequest(step=step) for step in steps],
        pb.AttendRequest(step=pb.AttendStep(**good)),  # type: ignore[arg-type]
        pb.AttendRequest(close=pb.CloseSession()),
    )
    kinds = [answer.WhichOneof("message") for answer in answers]
    assert kinds == ["opened", "ready", *["step_error"] * len(lies), "result", "closed"]
    for slots, field in (([128], "write_kv"), ([2**63], "write_kv")):
        bad = pb.AttendRequest(write_kv=pb.WriteKv(slots=slots, k=kv, v=kv))
        session = pb.AttendRequest(open=opening(transport=pb.TRANSPORT_GRPC))
        with pytest.raises(grpc.RpcError) as caught:
            attend(stub, session, bad)
        assert ErrorDetails(caught.value).fields == [field]


def test_a_read_of_more_than_a_message_carries_is_refused(
    stub: pb_grpc.CpuAttentionServiceStub,
) -> None:
    """Slots take a byte each on the way in: what they ask for must not fill the service's memory.

    The error comes in the place of an answer that no peer could receive."""
    session = pb.AttendRequest(open=opening(transport=pb.TRANSPORT_GRPC))
    most = (48 << 20) // (2 * 2 * 32 * 4)
    read = pb.AttendRequest(read_kv=pb.ReadKv(slots=[3] * (most + 1), call_id=1))
    with pytest.raises(grpc.RpcError) as caught:
        attend(stub, session, read)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert ErrorDetails(caught.value).fields == ["read_kv"]
    assert f"{most + 1} slots" in caught.value.details()


def test_tensors_do_not_belong_into_a_shared_memory_session(
    stub: pb_grpc.CpuAttentionServiceStub,
) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        attend(
            stub, pb.AttendRequest(open=opening()), pb.AttendRequest(step=pb.AttendStep(sweep=1))
        )
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
