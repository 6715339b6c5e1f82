"""Parts of the engine's end that need no cpu_service."""

from __future__ import annotations

import dataclasses
import itertools
import socket
import threading
import time
from typing import Any

import pytest
import torch

from gpu_service.config import GpuServiceConfig
from gpu_service.offload.factory import host_shape, open_host_tier
from gpu_service.offload.grpc_tier import Mailbox, MailboxBroken
from gpu_service.offload.host_tier import HostTierState
from gpu_service.offload.link import Link, LinkBroken, Waker
from gpu_service.offload.null_tier import NullHostTier
from gpu_service.offload.shape import HostShape, HostTierOptions
from kernels.cpu import DType
from neo_common.model_spec import ModelSpec, RopeSpec
from protos.neo.v1 import cpu_attention_pb2 as pb
from tests.support.stack import free_port

SPEC = ModelSpec(
    name="test",
    family="llama",
    layers=4,
    hidden_size=96,
    intermediate_size=128,
    query_heads=6,
    kv_heads=2,
    head_dim=16,
    vocab_size=100,
    norm_eps=1e-5,
    rope=RopeSpec(theta=1e4),
    max_context_tokens=100,
    tied_embeddings=True,
    qkv_bias=False,
    qk_norm=False,
    sliding_window=(0, 0, 0, 0),
    bos_token_id=None,
    eos_token_ids=(0,),
)


def config(**changes: Any) -> GpuServiceConfig:
    return dataclasses.replace(
        GpuServiceConfig(model="m", cpu_services=("127.0.0.1:1",)), **changes
    )


def open_with(settings: GpuServiceConfig) -> Any:
    return open_host_tier(settings, SPEC, torch.float32, max_rows=4, max_context_tokens=100)


def test_a_model_gives_the_shape() -> None:
    shape = host_shape(config(), SPEC, torch.bfloat16)
    assert shape == HostShape(4, 6, 2, 16, 16, DType.BFLOAT16, DType.BFLOAT16, 0.25)
    assert host_shape(config(host_kv_dtype="int8"), SPEC, torch.float16).kv_dtype is DType.INT8
    windowed = dataclasses.replace(SPEC, sliding_window=(0, 8, 0, 8))
    assert host_shape(config(), windowed, torch.float32).sliding_window == (0, 8, 0, 8)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"host_kv_dtype": "fp4"}, "host_kv_dtype"),
        ({"cpu_services": ("a:1", "b:1")}, "exactly one"),
        ({"offload_transport": "carrier pigeon"}, "offload_transport"),
        ({"lease_seconds": 0.0}, "lease_seconds"),
        ({"sweep_deadline_ms": 0.0}, "sweep_deadline_ms"),
        ({"host_kv_gib": 1e-9}, "host_kv_gib"),
    ],
)
def test_bad_settings_name_their_field(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        open_with(config(**changes))


def test_no_host_tier() -> None:
    for changes in ({"offload": "never"}, {"cpu_services": ()}):
        tier = open_with(config(**changes))
        assert isinstance(tier, NullHostTier)
        assert (tier.state, tier.blocks, tier.epoch) == (HostTierState.OFF, 0, 0)
        assert tier.mapped_pool is None
        tier.poll()
        tier.cancel_sweep()
        tier.close()


@pytest.mark.parametrize(
    ("call", "tensors"),
    [("write_kv", 3), ("read_kv", 1), ("submit", 3), ("wait", 1), ("begin_sweep", 0)],
)
def test_using_no_host_tier_is_a_bug(call: str, tensors: int) -> None:
    lead = {"write_kv": [0], "read_kv": [0], "submit": [0, 0], "wait": [0, 0], "begin_sweep": [[]]}
    with pytest.raises(AssertionError, match="no host tier"):
        getattr(NullHostTier(), call)(*lead[call], *[torch.empty(0)] * tensors)


def test_pool_size_in_blocks() -> None:
    shape = host_shape(config(), SPEC, torch.float32)
    one = shape.layout.pool_bytes(1)
    assert shape.blocks_in(10 * one) == 10
    assert shape.blocks_in(11 * one - 1) == 10
    HostTierOptions("a:1", 1, 1, 1).validate()


def answer(call_id: int) -> pb.AttendResponse:
    return pb.AttendResponse(kv_data=pb.KvData(call_id=call_id))


def test_mailbox_keeps_only_what_is_wanted() -> None:
    box = Mailbox()
    box.put(1, answer(1))
    assert box.take(1, 0.0) is None
    box.want(2)
    threading.Timer(0.05, box.put, (2, answer(2))).start()
    got = box.take(2, 5.0)
    assert got is not None
    assert got.kv_data.call_id == 2
    box.put(2, answer(2))  # the same answer twice
    assert box.take(2, 0.0) is None


def test_a_broken_mailbox_ends_every_wait() -> None:
    box = Mailbox()
    box.want(1)
    threading.Timer(0.05, box.break_off, ("gone",)).start()
    start = time.monotonic()
    with pytest.raises(MailboxBroken, match="gone"):
        box.take(1, 20.0)
    assert time.monotonic() - start < 5
    box.break_off("later")
    with pytest.raises(MailboxBroken, match="gone"):
        box.take(2, 20.0)


def test_a_link_to_nobody_breaks_and_closes() -> None:
    waker = Waker()
    link = Link(f"127.0.0.1:{free_port()}", lambda response: None, waker.wake)
    with pytest.raises(LinkBroken):
        link.expect("opened", 5.0)
    with pytest.raises(LinkBroken):  # and stays broken
        link.receive(0)
    with pytest.raises(LinkBroken):
        link.send(pb.AttendRequest(), 1.0)
    link.close()
    link.close()
    waker.clear()
    waker.close()
    waker.wake()  # late, from a reader's thread: harmless


def test_a_full_link_does_not_hang_its_sender() -> None:
    """A peer that accepts connections and never reads."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        link = Link(address, lambda response: None, lambda: None)
        start = time.monotonic()
        beats = (pb.AttendRequest(heartbeat=pb.Heartbeat()) for _ in range(1000))
        with pytest.raises(LinkBroken, match="does not take"):
            list(map(link.send, beats, itertools.repeat(0.1)))
        assert time.monotonic() - start < 5
        link.close()
