"""Rows that leave in a sweep and come back in it, or in the next one, with the real worker at the
other end."""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from kernels.cpu.dataplane import WaitStatus
from kernels.gpu import host_exchange
from kernels.gpu.host_exchange import HostExchange, StepOffsets
from kernels.gpu.tensors import INTERPRET
from tests.support.dataplane import SECOND_US, SHAPE, Floats, Ints, Rig, rig
from tests.support.mutants import mutated

DEVICE = "cpu" if INTERPRET else "cuda"
ROWS, HIDDEN = 5, 48
LANE = tuple[Ints, Ints]


def address(memory: mmap.mmap) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


@contextmanager
def registered(*memories: mmap.mmap) -> Iterator[None]:
    """So that a CUDA device reaches them."""
    if DEVICE == "cpu":
        yield
        return
    runtime = torch.cuda.cudart()
    for memory in memories:
        assert int(runtime.cudaHostRegister(address(memory), len(memory), 3)) == 0
    try:
        yield
    finally:
        torch.cuda.synchronize()
        for memory in memories:
            runtime.cudaHostUnregister(address(memory))


class Device:
    """What a sweep does in its layers, and what should have come of it."""

    def __init__(self, it: Rig, exchange: HostExchange) -> None:
        self.it = it
        self.exchange = exchange
        addresses = [address(it.control), address(it.step)]
        self.bases = torch.tensor(addresses, dtype=torch.int64, device=DEVICE)
        self.waiting: list[tuple[Floats, torch.Tensor]] = [
            (np.empty((0, 4, 32), np.float32), torch.empty(0, HIDDEN))
        ] * SHAPE.layers
        """By layer: the result that is due, and the state that was left there."""

    def sweep(self, cohorts: list[LANE]) -> None:
        """`cohorts[i]` leaves in layer i. Checks who arrives."""
        it = self.it
        lengths = np.concatenate([lengths for lengths, _ in cohorts])
        tables = np.concatenate([tables for _, tables in cohorts])
        ends = np.cumsum([len(lengths) for lengths, _ in cohorts])
        ranges = np.stack((np.concatenate(([0], ends[:-1])), ends), 1).astype(np.int32)
        status = it.channel.begin_sweep(
            [(lengths, tables)], SECOND_US, device_rings=True, ranges=ranges
        )
        assert status is WaitStatus.OK
        arriving = [len(result) for result, _ in self.waiting]
        counts = [len(cohorts[0][0]), *arriving, it.channel.sweep]
        # Rows that arrive in a layer leave in the next one.
        assert counts[1 : SHAPE.layers] == [len(lengths) for lengths, _ in cohorts[1:]]
        on_device = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
        residual = torch.randn(ROWS, HIDDEN, device=DEVICE)
        for layer, lane in enumerate(cohorts):
            self._layer(layer, lane, on_device, residual)

    def _layer(self, layer: int, lane: LANE, counts: torch.Tensor, residual: torch.Tensor) -> None:
        it, exchange = self.it, self.exchange
        rows = len(lane[0])
        arrays = it.inputs(rows)
        q = torch.full((ROWS, SHAPE.query_heads, SHAPE.head_dim), 7.0, device=DEVICE)
        kv = torch.full((1, 2, SHAPE.kv_heads, 16, SHAPE.head_dim), 7.0, device=DEVICE)
        q[:rows] = torch.from_numpy(arrays[0])
        for part, array in enumerate(arrays[1:]):
            kv[0, part, :, :rows] = torch.from_numpy(array).transpose(0, 1)
        due, state = self.waiting[layer]
        self.waiting[layer] = (it.expected(layer, lane, arrays), residual[:rows].cpu().clone())
        out = torch.full_like(q, 9.0)
        at = exchange.deferred(layer)
        exchange.arrive(at, out, self.bases, counts)
        exchange.depart(at, q, kv, self.bases, counts, residual)
        exchange.ring(at, self.bases, counts)
        assert int(exchange.status) == 0, "the host was not waited for, or did not come"
        np.testing.assert_array_equal(out[: len(due)].cpu().numpy(), due)
        assert (out[len(due) :] == 9).all()
        assert torch.equal(residual[: len(state)].cpu(), state)


class TwoLanes:
    """What a sweep does whose host rows it waits for: each layer of lane 1 leaves before lane 0 is
    waited for."""

    def __init__(self, it: Rig, exchange: HostExchange) -> None:
        self.it = it
        self.exchange = exchange
        addresses = [address(it.control), address(it.step)]
        self.bases = torch.tensor(addresses, dtype=torch.int64, device=DEVICE)

    def sweep(self, lanes: list[LANE]) -> None:
        it, exchange = self.it, self.exchange
        assert it.channel.begin_sweep(lanes, SECOND_US, device_rings=True) is WaitStatus.OK
        numbers = [0] * (SHAPE.layers + 2)
        numbers[: len(lanes)] = [len(lengths) for lengths, _ in lanes]
        numbers[-1] = it.channel.sweep
        counts = torch.tensor(numbers, dtype=torch.int32, device=DEVICE)
        for layer in range(SHAPE.layers):
            due = {
                lane: self._leave(layer, lane, rows, counts)
                for lane, rows in reversed(list(enumerate(lanes)))
            }
            for lane in range(len(lanes)):
                out = torch.full((17, SHAPE.query_heads, SHAPE.head_dim), 9.0, device=DEVICE)
                exchange.arrive(exchange.waited(lane, layer), out, self.bases, counts)
                assert int(exchange.status) == 0, "the host was not waited for, or did not come"
                np.testing.assert_array_equal(out[: len(due[lane])].cpu().numpy(), due[lane])
                assert (out[len(due[lane]) :] == 9).all()

    def _leave(self, layer: int, lane: int, rows: LANE, counts: torch.Tensor) -> Floats:
        """Padded to two blocks of K and V. Returns what is to come back."""
        exchange, count = self.exchange, len(rows[0])
        arrays = self.it.inputs(count)
        q = torch.full((17, SHAPE.query_heads, SHAPE.head_dim), 7.0, device=DEVICE)
        kv = torch.full((2, 2, SHAPE.kv_heads, 16, SHAPE.head_dim), 7.0, device=DEVICE)
        q[:count] = torch.from_numpy(arrays[0])
        for part, array in enumerate(arrays[1:]):
            kv[0, part, :, :count] = torch.from_numpy(array).transpose(0, 1)
        at = exchange.waited(lane, layer)
        exchange.depart(at, q, kv, self.bases, counts)
        exchange.ring(at, self.bases, counts)
        return self.it.expected(layer, rows, arrays)


def together(it: Rig, device: TwoLanes) -> None:
    """Sub-batches of all sizes, among them empty ones, and sweeps with one."""
    for first, second in (([20, 33], [5]), ([], [40, 1]), ([2], []), ([16, 17], [18, 3, 9])):
        device.sweep([it.rows(first), it.rows(second)])
    device.sweep([it.rows([1, 17, 30])])


def exchange_of(made: type[HostExchange], deadline: float = 5.0, rows: int = ROWS) -> HostExchange:
    offsets = StepOffsets(*SHAPE.offsets())
    heads = (SHAPE.query_heads, SHAPE.kv_heads, SHAPE.head_dim)
    return made(offsets, SHAPE.layers, rows, *heads, HIDDEN, torch.float32, DEVICE, deadline)


def fly(it: Rig, device: Device, sweeps: int = 6) -> None:
    """Cohorts of all sizes, one starting in each sweep, among them empty ones."""
    waiting = [it.rows([])] * (SHAPE.layers + 1)
    for number in range(sweeps):
        starting = it.rows([[20, 33, 5], [], [40], [1, 2], [16, 17], []][number % 6])
        device.sweep([starting, *waiting[: SHAPE.layers - 1]])
        waiting = [starting, *waiting[:-1]]


def test_results_are_those_of_the_host_a_sweep_later() -> None:
    with rig() as it, registered(it.control, it.step):
        fly(it, Device(it, exchange_of(HostExchange)), 9)


def test_results_of_two_lanes_are_those_of_the_host_in_the_same_sweep() -> None:
    with rig() as it, registered(it.control, it.step):
        together(it, TwoLanes(it, exchange_of(HostExchange, rows=0)))


def test_a_wait_ends_without_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_exchange, "_MOST_POLLS", 50)
    with rig() as it, registered(it.control, it.step):
        it.restart(start=False)
        exchange = exchange_of(HostExchange, deadline=0.05)
        bases = torch.tensor([address(it.control), address(it.step)], device=DEVICE)
        it.channel.begin_sweep([it.rows([20])], SECOND_US, device_rings=True)
        counts = torch.tensor([1, 1, 0, 2], dtype=torch.int32, device=DEVICE)
        out = torch.full((ROWS, SHAPE.query_heads, SHAPE.head_dim), 9.0, device=DEVICE)
        exchange.arrive(exchange.deferred(0), out, bases, counts)
        assert int(exchange.status) == 1
        assert (out == 9).all()


def test_a_wait_ends_when_the_epoch_is_given_up() -> None:
    """However far away its deadline is: the peer has died."""
    with rig() as it, registered(it.control, it.step):
        it.restart(start=False)
        exchange = exchange_of(HostExchange, deadline=60.0)
        bases = torch.tensor([address(it.control), address(it.step)], device=DEVICE)
        it.channel.begin_sweep([it.rows([20])], SECOND_US, device_rings=True)
        counts = torch.tensor([1, 1, 0, 2], dtype=torch.int32, device=DEVICE)
        it.channel.revoke()
        out = torch.full((ROWS, SHAPE.query_heads, SHAPE.head_dim), 9.0, device=DEVICE)
        started = time.monotonic()
        exchange.arrive(exchange.deferred(0), out, bases, counts)
        assert int(exchange.status) == 1
        assert time.monotonic() - started < 5


MUTANTS = {
    "this-sweep-s-slot": ("- BACK) & 1)", ") & 1)"),
    "no-wait": ("(arriving > 0) & (failed == 0)", "arriving < 0"),
    "keys-for-values": ("element - Q_WIDTH\n", "(element - Q_WIDTH) % KV_WIDTH\n"),
    "state-stays": ("tl.store(here, coming, mask=ok)", "tl.store(here, going, mask=ok)"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(name: str, tmp_path: Path) -> None:
    made = mutated(host_exchange, *MUTANTS[name], tmp_path).HostExchange
    with rig() as it, registered(it.control, it.step):
        if name == "no-wait":
            it.restart(start=False)  # nobody is there who could be quick enough
        device = Device(it, exchange_of(made))
        with pytest.raises(AssertionError):
            fly(it, device)


LANE_MUTANTS = {
    "one-slot-for-both-lanes": ("Crossing(lane * self._layers + layer,", "Crossing(layer,"),
    "the-other-lane": ("Crossing(lane * self._layers", "Crossing((1 - lane) * self._layers"),
    "the-other-s-rows": ("leaving=lane, arriving=lane", "leaving=1 - lane, arriving=1 - lane"),
    "a-sweep-later": ("arriving=lane, back=0", "arriving=lane, back=1"),
    "no-wait": MUTANTS["no-wait"],
}


@pytest.mark.parametrize("name", LANE_MUTANTS)
def test_mutants_of_lanes_are_found(name: str, tmp_path: Path) -> None:
    made = mutated(host_exchange, *LANE_MUTANTS[name], tmp_path).HostExchange
    with rig() as it, registered(it.control, it.step):
        if name == "no-wait":
            it.restart(start=False)  # nobody is there who could be quick enough
        device = TwoLanes(it, exchange_of(made, deadline=0.5, rows=0))
        with pytest.raises(AssertionError):
            together(it, device)
