"""The NVIDIA driver asked through ctypes, with a library that does as it is told here."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from neo_client.doctor import cuda, measure
from neo_client.doctor.cuda import CudaError, gpus, link_rates
from neo_common.machine import facts
from tests.unit.client.test_doctor import MACHINE

SIZE = 1 << 20
BUS = ("0000:0F:00.0", "0000:B7:00.0")


class Function:
    """A C function: what ctypes would pass, checked to be what the header declares."""

    def __init__(self, body: Callable[..., int], kinds: str) -> None:
        self._body = body
        self._kinds = kinds  # p: pointer to write to, n: number, d: device
        self.argtypes: tuple[Any, ...] = ()

    def __call__(self, *arguments: Any) -> int:
        assert len(arguments) == len(self._kinds), "wrong number of arguments"
        for kind, argument in zip(self._kinds, arguments, strict=True):
            if kind == "n":
                assert isinstance(argument, int)
        if self.argtypes:
            assert len(self.argtypes) == len(arguments)
        return self._body(*arguments)


class FakeCuda:
    """A driver with two GPUs. fail: name of a call -> its error code."""

    def __init__(self, fail: dict[str, int] | None = None) -> None:
        self.calls: list[str] = []
        self.now = 0.0
        self._fail = fail or {}
        self._live: set[int] = set()
        self._contexts = 0
        self._places = 0x7000
        for name, kinds in {
            "cuInit": "n", "cuDeviceGetCount": "p", "cuDeviceGet": "pn", "cuDeviceGetName": "pnd",
            "cuDeviceTotalMem_v2": "pd", "cuDeviceGetPCIBusId": "pnd",
            "cuDevicePrimaryCtxRetain": "pd", "cuDevicePrimaryCtxRelease_v2": "d",
            "cuCtxSetCurrent": "d", "cuCtxSynchronize": "", "cuMemAlloc_v2": "pn",
            "cuMemAllocHost_v2": "pn", "cuMemFree_v2": "n", "cuMemFreeHost": "n",
            "cuMemcpyHtoD_v2": "nnn", "cuMemcpyDtoH_v2": "nnn", "cuGetErrorString": "np",
        }.items():  # fmt: skip
            setattr(self, name, Function(self._run(name), kinds))

    def _run(self, name: str) -> Callable[..., int]:
        def run(*arguments: Any) -> int:
            self.calls.append(name)
            if name in self._fail:
                return self._fail[name]
            return int(getattr(self, f"_{name}", lambda *_: 0)(*arguments) or 0)

        return run

    @property
    def clean(self) -> bool:
        return not self._live and self._contexts == 0

    def _cuDeviceGetCount(self, count: Any) -> None:
        count._obj.value = len(BUS)

    def _cuDeviceGet(self, device: Any, ordinal: int) -> None:
        device._obj.value = ordinal

    def _cuDeviceGetName(self, name: Any, size: int, device: Any) -> None:
        assert ctypes.sizeof(name) == size
        name.value = b"NVIDIA H100"

    def _cuDeviceTotalMem_v2(self, total: Any, device: Any) -> None:
        total._obj.value = 80 << 30

    def _cuDeviceGetPCIBusId(self, bus: Any, size: int, device: Any) -> None:
        assert ctypes.sizeof(bus) == size
        bus.value = BUS[device.value].encode()

    def _cuDevicePrimaryCtxRetain(self, context: Any, device: Any) -> None:
        self._contexts += 1

    def _cuDevicePrimaryCtxRelease_v2(self, device: Any) -> None:
        self._contexts -= 1

    def _allocate(self, place: Any, size: int) -> None:
        assert size == SIZE
        assert self._contexts
        self._places += SIZE
        place._obj.value = self._places
        self._live.add(self._places)

    _cuMemAlloc_v2 = _cuMemAllocHost_v2 = _allocate

    def _free(self, place: int) -> None:
        self._live.remove(place)

    _cuMemFree_v2 = _cuMemFreeHost = _free

    def _cuMemcpyHtoD_v2(self, to: int, source: int, size: int) -> None:
        assert {to, source} == self._live
        self.now += 1e-3

    def _cuMemcpyDtoH_v2(self, to: int, source: int, size: int) -> None:
        assert {to, source} == self._live
        self.now += 2e-3

    def _cuGetErrorString(self, code: int, said: Any) -> None:
        said._obj.value = b"out of memory" if code == 2 else None


def test_gpus_are_described() -> None:
    found = gpus(FakeCuda())
    assert [gpu.pci_bus_id for gpu in found] == list(BUS)
    assert {(gpu.name, gpu.memory_bytes) for gpu in found} == {("NVIDIA H100", 80 << 30)}


def test_no_driver_and_no_device_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-is-not-here.so.1")
    assert gpus() == []
    assert gpus(FakeCuda({"cuInit": 100})) == []


def test_the_link_is_timed_both_ways_and_all_is_given_back() -> None:
    fake = FakeCuda()
    rates = link_rates(1, fake, size=SIZE, clock=lambda: fake.now)
    assert rates == (pytest.approx(SIZE / 1e-3), pytest.approx(SIZE / 2e-3))
    assert fake.clean
    copies = [name for name in fake.calls if name.startswith(("cuMemcpy", "cuCtxSync"))]
    assert copies[1::2] == ["cuCtxSynchronize"] * (len(copies) // 2)


@pytest.mark.parametrize(
    "call", ["cuInit", "cuDeviceGetCount", "cuDevicePrimaryCtxRetain", "cuCtxSetCurrent",
             "cuMemAllocHost_v2", "cuMemAlloc_v2", "cuMemcpyHtoD_v2", "cuMemcpyDtoH_v2"],
)  # fmt: skip
def test_each_call_that_fails_is_named_and_leaves_nothing(call: str) -> None:
    fake = FakeCuda({call: 2})
    with pytest.raises(CudaError, match=f"{call}: out of memory"):
        link_rates(0, fake, size=SIZE, clock=lambda: fake.now)
    assert fake.clean


def test_an_error_without_words_keeps_its_number() -> None:
    with pytest.raises(CudaError, match="cuInit: error 999"):
        gpus(FakeCuda({"cuInit": 999}))


def test_gpus_get_their_place_from_sysfs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for bus, node in zip(BUS, ("1", "-1"), strict=True):
        folder = tmp_path / "bus/pci/devices" / bus.lower()
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(node + "\n")
    roots = facts.Roots(sys=tmp_path)
    monkeypatch.setattr(measure, "gpu_node", lambda bus: facts.gpu_node(bus, roots))
    found = measure.with_gpus(replace(MACHINE, gpus=()), links=False, library=FakeCuda()).gpus
    assert [gpu.numa_node for gpu in found] == [1, None]
    assert {gpu.to_device for gpu in found} == {0.0}
