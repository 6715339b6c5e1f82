from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NumaNode(_message.Message):
    __slots__ = ("node", "cpus", "memory_bytes", "free_bytes")
    NODE_FIELD_NUMBER: _ClassVar[int]
    CPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    FREE_BYTES_FIELD_NUMBER: _ClassVar[int]
    node: int
    cpus: _containers.RepeatedScalarFieldContainer[int]
    memory_bytes: int
    free_bytes: int
    def __init__(self, node: _Optional[int] = ..., cpus: _Optional[_Iterable[int]] = ..., memory_bytes: _Optional[int] = ..., free_bytes: _Optional[int] = ...) -> None: ...

class HugePages(_message.Message):
    __slots__ = ("page_bytes", "reserved", "free", "limit_bytes")
    PAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    RESERVED_FIELD_NUMBER: _ClassVar[int]
    FREE_FIELD_NUMBER: _ClassVar[int]
    LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    page_bytes: int
    reserved: int
    free: int
    limit_bytes: int
    def __init__(self, page_bytes: _Optional[int] = ..., reserved: _Optional[int] = ..., free: _Optional[int] = ..., limit_bytes: _Optional[int] = ...) -> None: ...

class MachineGpu(_message.Message):
    __slots__ = ("name", "memory_bytes", "pci_bus_id", "numa_node", "to_device_bytes_per_second", "to_host_bytes_per_second")
    NAME_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    PCI_BUS_ID_FIELD_NUMBER: _ClassVar[int]
    NUMA_NODE_FIELD_NUMBER: _ClassVar[int]
    TO_DEVICE_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TO_HOST_BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    name: str
    memory_bytes: int
    pci_bus_id: str
    numa_node: int
    to_device_bytes_per_second: float
    to_host_bytes_per_second: float
    def __init__(self, name: _Optional[str] = ..., memory_bytes: _Optional[int] = ..., pci_bus_id: _Optional[str] = ..., numa_node: _Optional[int] = ..., to_device_bytes_per_second: _Optional[float] = ..., to_host_bytes_per_second: _Optional[float] = ...) -> None: ...

class MemoryRate(_message.Message):
    __slots__ = ("threads", "bytes_per_second")
    THREADS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    threads: int
    bytes_per_second: float
    def __init__(self, threads: _Optional[int] = ..., bytes_per_second: _Optional[float] = ...) -> None: ...

class MachineReport(_message.Message):
    __slots__ = ("architecture", "cpu_flags", "cores", "allowed_cpus", "cpu_quota", "memory_bytes", "available_bytes", "available_limit", "memory_limit_bytes", "memlock_bytes", "dev_shm_bytes", "transparent_hugepages", "shared_hugepages", "hugepages", "numa_nodes", "allowed_nodes", "gpus", "memory_rates", "open_files")
    ARCHITECTURE_FIELD_NUMBER: _ClassVar[int]
    CPU_FLAGS_FIELD_NUMBER: _ClassVar[int]
    CORES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_CPUS_FIELD_NUMBER: _ClassVar[int]
    CPU_QUOTA_FIELD_NUMBER: _ClassVar[int]
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_LIMIT_FIELD_NUMBER: _ClassVar[int]
    MEMORY_LIMIT_BYTES_FIELD_NUMBER: _ClassVar[int]
    MEMLOCK_BYTES_FIELD_NUMBER: _ClassVar[int]
    DEV_SHM_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRANSPARENT_HUGEPAGES_FIELD_NUMBER: _ClassVar[int]
    SHARED_HUGEPAGES_FIELD_NUMBER: _ClassVar[int]
    HUGEPAGES_FIELD_NUMBER: _ClassVar[int]
    NUMA_NODES_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_NODES_FIELD_NUMBER: _ClassVar[int]
    GPUS_FIELD_NUMBER: _ClassVar[int]
    MEMORY_RATES_FIELD_NUMBER: _ClassVar[int]
    OPEN_FILES_FIELD_NUMBER: _ClassVar[int]
    architecture: str
    cpu_flags: _containers.RepeatedScalarFieldContainer[str]
    cores: int
    allowed_cpus: _containers.RepeatedScalarFieldContainer[int]
    cpu_quota: float
    memory_bytes: int
    available_bytes: int
    available_limit: str
    memory_limit_bytes: int
    memlock_bytes: int
    dev_shm_bytes: int
    transparent_hugepages: str
    shared_hugepages: str
    hugepages: _containers.RepeatedCompositeFieldContainer[HugePages]
    numa_nodes: _containers.RepeatedCompositeFieldContainer[NumaNode]
    allowed_nodes: _containers.RepeatedScalarFieldContainer[int]
    gpus: _containers.RepeatedCompositeFieldContainer[MachineGpu]
    memory_rates: _containers.RepeatedCompositeFieldContainer[MemoryRate]
    open_files: int
    def __init__(self, architecture: _Optional[str] = ..., cpu_flags: _Optional[_Iterable[str]] = ..., cores: _Optional[int] = ..., allowed_cpus: _Optional[_Iterable[int]] = ..., cpu_quota: _Optional[float] = ..., memory_bytes: _Optional[int] = ..., available_bytes: _Optional[int] = ..., available_limit: _Optional[str] = ..., memory_limit_bytes: _Optional[int] = ..., memlock_bytes: _Optional[int] = ..., dev_shm_bytes: _Optional[int] = ..., transparent_hugepages: _Optional[str] = ..., shared_hugepages: _Optional[str] = ..., hugepages: _Optional[_Iterable[_Union[HugePages, _Mapping]]] = ..., numa_nodes: _Optional[_Iterable[_Union[NumaNode, _Mapping]]] = ..., allowed_nodes: _Optional[_Iterable[int]] = ..., gpus: _Optional[_Iterable[_Union[MachineGpu, _Mapping]]] = ..., memory_rates: _Optional[_Iterable[_Union[MemoryRate, _Mapping]]] = ..., open_files: _Optional[int] = ...) -> None: ...

class GetMachineRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetMachineResponse(_message.Message):
    __slots__ = ("machine",)
    MACHINE_FIELD_NUMBER: _ClassVar[int]
    machine: MachineReport
    def __init__(self, machine: _Optional[_Union[MachineReport, _Mapping]] = ...) -> None: ...
