"""What comes after what on a CUDA device's streams, in sweeps with host rows. Triton's interpreter
has no streams, so forks and joins are followed here with a clock for each stream."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
from gpu_service.engine.build import exchange_limits, geometry_of
from gpu_service.model.model import CausalLM, load_model
from gpu_service.pipeline.cuda import forward, host_rows, streamed
from gpu_service.pipeline.cuda.build import CudaLimits, open_cuda
from gpu_service.pipeline.cuda.host_side import HostSide
from gpu_service.pipeline.cuda.inputs import SweepShape
from gpu_service.pipeline.cuda.runner import CudaRunner, CudaSweeps
from gpu_service.pipeline.cuda.shapes import ShapeTable
from gpu_service.scheduling.plan import IterationPlan, Migration, Mode, Tier
from tests.support.engine import config
from tests.support.models import tiny_model_dir
from tests.support.mutants import mutated

HOST, SECOND = 3, 2
Clock = dict[str, int]


@dataclass(frozen=True)
class Launch:
    stream: str
    clock: Clock
    """Of all streams, as far as they are known to have come."""

    def comes_after(self, other: Launch) -> bool:
        return self.clock.get(other.stream, 0) >= other.clock[other.stream]


def _later(one: Clock, other: Clock) -> Clock:
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in one | other}


class Streams:
    """Follows what is launched where."""

    def __init__(self) -> None:
        self.current = "main"
        self.clocks: dict[str, Clock] = {"main": {}}
        self.launches: dict[tuple[Any, ...], Launch] = {}

    def launch(self, *what: Any) -> None:
        clock = self.clocks[self.current]
        clock = clock | {self.current: clock.get(self.current, 0) + 1}
        self.clocks[self.current] = clock
        assert what not in self.launches, f"{what} is launched twice"
        self.launches[what] = Launch(self.current, clock)

    def wait(self, name: str, clock: Clock) -> None:
        self.clocks[name] = _later(self.clocks[name], clock)

    def branch(self, device: object, *, first: bool = False) -> _Branch:
        name = f"branch {len(self.clocks)}"
        self.clocks[name] = {}
        return _Branch(self, name)

    def ordered(self, before: tuple[Any, ...], after: tuple[Any, ...]) -> bool:
        return self.launches[after].comes_after(self.launches[before])


class _Branch:
    """As `gpu_service.pipeline.cuda.branch.Branch` on a CUDA device."""

    def __init__(self, streams: Streams, name: str) -> None:
        self._streams, self._name, self._forked = streams, name, False

    @contextmanager
    def forked(self, when: object = True) -> Iterator[None]:
        if not when:
            yield
            return
        streams = self._streams
        before = streams.current
        streams.wait(self._name, streams.clocks[before])
        self._forked, streams.current = True, self._name
        yield
        streams.current = before

    def follow(self, other: _Branch) -> None:
        if other._forked:
            self._streams.wait(self._name, self._streams.clocks[other._name])

    def mark(self) -> Clock | None:
        return dict(self._streams.clocks[self._name]) if self._forked else None

    def reach(self, mark: Clock | None) -> None:
        if mark is not None:
            self._streams.wait(self._streams.current, mark)

    def join(self) -> None:
        if self._forked:
            self._streams.wait(self._streams.current, self._streams.clocks[self._name])
            self._forked = False


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model") / "llama", "llama", head_dim=16)


@pytest.fixture(scope="module")
def model(directory: Path) -> CausalLM:
    return load_model(directory, dtype="float32")


def traced(
    directory: Path,
    model: CausalLM,
    monkeypatch: pytest.MonkeyPatch,
    mode: str,
    *mutants: ModuleType,
) -> tuple[CudaSweeps, Streams]:
    """Sweeps whose launches are followed, and not made. `mutants`: modules in use beside ours."""
    streams = Streams()
    for module in (forward, host_rows, streamed, *mutants):
        monkeypatch.setattr(module, "Branch", streams.branch)
        for name in ("expand_tables", "embed"):
            monkeypatch.setattr(module, name, lambda *_: None, raising=False)
    made = config(
        directory, offload="auto", offload_mode=mode, cpu_services=("127.0.0.1:1",),
        max_batch_tokens=16, max_running_requests=8,
    )  # fmt: skip
    lanes = ((HOST, 0), (HOST, SECOND)) if mode == "asymmetric" else ()
    limits = CudaLimits(
        max_running=8,
        max_batch_tokens=16,
        max_context_tokens=64,
        memory_utilization=1.0,
        kv_blocks=4,
        table=ShapeTable((4,), (16,), 1, host=0 if lanes else HOST, lanes=lanes),
        host=exchange_limits(made, model.spec, model.dtype),
    )
    _, sweeps = open_cuda(model, geometry_of(model.spec, 16), limits, lambda *_: None)
    _follow(sweeps, streams, monkeypatch)
    return sweeps, streams


def _follow(sweeps: CudaSweeps, streams: Streams, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = {
        id(linear): (name, index)
        for index, layer in enumerate(sweeps.model.layers)
        for name in ("qkv", "output", "gate_up", "down")
        for linear in (getattr(layer, name),)
    }

    def dense(linear: Any, *tensors: Any) -> None:
        lane = int(len(tensors[-1]) == SECOND)  # of `out`
        streams.launch(*layers[id(linear)], lane)

    for name in ("normed", "plain", "gated"):
        monkeypatch.setattr(sweeps.activations.dense, name, dense)
    exchange, count = sweeps.exchange, len(sweeps.model.layers)
    for name in ("depart", "ring", "arrive"):

        def crossed(at: Any, *tensors: Any, name: str = name) -> None:
            streams.launch(name, at.place % count, at.place // count)

        monkeypatch.setattr(exchange, name, crossed)
    made = sweeps.forward
    monkeypatch.setattr(made, "_rope", lambda *_, **__: None)
    monkeypatch.setattr(made, "_attend_chunks", lambda layer, *_: streams.launch("chunks", layer))
    monkeypatch.setattr(made, "_attend_decode", lambda layer, *_: streams.launch("decode", layer))
    monkeypatch.setattr(made, "_head", lambda _: streams.launch("head"))
    for host in made._hosts:
        departures = host._departures  # type: ignore[attr-defined]
        monkeypatch.setattr(departures, "_rope", lambda *_: None)


def check_waited(streams: Streams, layers: int, lanes: int) -> None:
    """Each lane's own order, its overlap with the other sub-batch, and what the graph ends with."""
    for layer in range(layers):
        for lane in range(lanes):
            chain = [(name, layer, lane) for name in ("qkv", "depart", "ring", "arrive", "output")]
            if layer + 1 < layers:
                # Its buffers, K and V on their way out among them, are filled again.
                chain += [("qkv", layer + 1, lane), ("depart", layer + 1, lane)]
            for before, after in itertools.pairwise(chain):
                assert streams.ordered(before, after), (before, after)
        for attention in ("chunks", "decode"):
            assert streams.ordered((attention, layer), ("output", layer, 0))
            # It does not wait for its own sub-batch's host rows either.
            assert not streams.ordered(("arrive", layer, 0), (attention, layer))
        if lanes == 2:
            # While the host works for one lane the device is in the other one's dense layers.
            for name in ("qkv", "chunks", "decode"):
                here = (name, layer, 0) if name == "qkv" else (name, layer)
                assert not streams.ordered(("arrive", layer, 1), here)
            assert not streams.ordered(("arrive", layer, 0), ("output", layer, 1))
            assert not streams.ordered(("arrive", layer, 0), ("down", layer, 1))
            if layer + 1 < layers:
                assert not streams.ordered(("arrive", layer, 0), ("qkv", layer + 1, 1))
        assert all(streams.ordered(("ring", layer, lane), ("head",)) for lane in range(lanes))


def check_deferred(streams: Streams, layers: int) -> None:
    for layer in range(layers):
        assert streams.ordered(("qkv", layer, 0), ("depart", layer, 0))
        # Their state has changed places before the layer's end adds to it.
        assert streams.ordered(("depart", layer, 0), ("output", layer, 0))
        assert streams.ordered(("arrive", layer, 0), ("output", layer, 0))
        assert not streams.ordered(("ring", layer, 0), ("output", layer, 0))
        if layer:
            assert streams.ordered(("output", layer - 1, 0), ("arrive", layer, 0))
            assert not streams.ordered(("gate_up", layer - 1, 0), ("arrive", layer, 0))


SWEEPS: dict[str, tuple[str, SweepShape, Callable[[Streams, int], None]]] = {
    "asymmetric": (
        "asymmetric",
        SweepShape(4, 9, 1, HOST, SECOND),
        lambda streams, layers: check_waited(streams, layers, 2),
    ),
    "inline": (
        "asymmetric",
        SweepShape(4, 9, 1, HOST),
        lambda streams, layers: check_waited(streams, layers, 1),
    ),
    "deferred": ("deferred", SweepShape(4, 9, 1, HOST), check_deferred),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_launches_come_in_their_order(
    directory: Path, model: CausalLM, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mode, shape, check = SWEEPS[name]
    sweeps, streams = traced(directory, model, monkeypatch, mode)
    sweeps.forward.run(shape, shape.prefill)
    check(streams, len(model.layers))


MUTANTS: dict[str, tuple[str, ModuleType, str, str]] = {
    "no-join-before-the-output": (
        "asymmetric",
        host_rows,
        "    def ready(self) -> None:\n        self._branch.join()",
        "    def ready(self) -> None:\n        pass",
    ),
    "waits-on-the-main-stream": (
        "asymmetric",
        host_rows,
        "            exchange.arrive(crossing, ",
        "        self._branch.join()\n        exchange.arrive(crossing, ",
    ),
    "joined-at-once": (
        "inline",
        host_rows,
        "            exchange.arrive(crossing, rows.attended, *departures.at)\n",
        "            exchange.arrive(crossing, rows.attended, *departures.at)\n"
        "        self._branch.join()\n",
    ),
    "one-sub-batch-after-the-other": (
        "asymmetric",
        forward,
        "parts.insert(0, ",
        "parts.append(",
    ),
    "state-is-not-waited-for": (
        "deferred",
        host_rows,
        "        self._leaving.reach(self._left)\n",
        "",
    ),
    "what-arrives-is-not-waited-for": (
        "deferred",
        host_rows,
        "        self._arriving.join()\n",
        "",
    ),
}


def run_mutant(
    directory: Path,
    model: CausalLM,
    monkeypatch: pytest.MonkeyPatch,
    folder: Path,
    sweep: str,
    module: ModuleType,
    old: str,
    new: str,
) -> Streams:
    mutant = mutated(module, old, new, folder)
    mode, shape, _ = SWEEPS[sweep]
    if module is host_rows:
        for made in ("WaitedRows", "DeferredRows"):
            monkeypatch.setattr(forward, made, getattr(mutant, made))
    else:
        monkeypatch.setattr("gpu_service.pipeline.cuda.build.Forward", mutant.Forward)
    sweeps, streams = traced(directory, model, monkeypatch, mode, mutant)
    sweeps.forward.run(shape, shape.prefill)
    return streams


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_found(
    directory: Path,
    model: CausalLM,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
) -> None:
    streams = run_mutant(directory, model, monkeypatch, tmp_path, *MUTANTS[name])
    with pytest.raises(AssertionError):
        SWEEPS[MUTANTS[name][0]][2](streams, len(model.layers))


@pytest.mark.parametrize("module", [host_rows, forward])
@pytest.mark.parametrize("sweep", SWEEPS)
def test_copies_that_are_no_mutants_pass(
    directory: Path,
    model: CausalLM,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    sweep: str,
    module: ModuleType,
) -> None:
    same = ("import annotations", "import annotations")
    streams = run_mutant(directory, model, monkeypatch, tmp_path, sweep, module, *same)
    SWEEPS[sweep][2](streams, len(model.layers))


def test_a_sweep_s_time_begins_behind_copies_beside_the_one_before(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And before the copies that it waits for itself."""
    streams, host = Streams(), object.__new__(HostSide)
    blocks = np.zeros(1, np.int32)
    drawn = SimpleNamespace(drawn=torch.zeros(1))
    made: Any = SimpleNamespace(activations=drawn)
    unused: Any = None
    runner = CudaRunner(made, unused, unused, host)
    monkeypatch.setattr(host, "_copies", streams.branch(None), raising=False)
    monkeypatch.setattr(host, "_session", lambda: host)
    monkeypatch.setattr(host, "_move", lambda *_: streams.launch("copy", number))
    monkeypatch.setattr(runner, "_mark", lambda: streams.launch("begin", number))
    for number, beside in enumerate((True, False, True)):
        move = Migration(1, Tier.HOST, 1, blocks, blocks, beside=beside)
        runner.launch(IterationPlan(number, Mode.INLINE, (move,), ()), {})
    for number in range(3):
        assert streams.ordered(("begin", number), ("copy", number))
        assert not streams.ordered(("copy", number), ("begin", number))
    assert streams.ordered(("copy", 0), ("begin", 1))
    assert streams.ordered(("copy", 1), ("begin", 2))
