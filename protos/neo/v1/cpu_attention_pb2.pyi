from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Transport(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TRANSPORT_UNSPECIFIED: _ClassVar[Transport]
    TRANSPORT_SHM: _ClassVar[Transport]
    TRANSPORT_GRPC: _ClassVar[Transport]

class KvDtype(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    KV_DTYPE_UNSPECIFIED: _ClassVar[KvDtype]
    KV_DTYPE_FLOAT32: _ClassVar[KvDtype]
    KV_DTYPE_BFLOAT16: _ClassVar[KvDtype]
    KV_DTYPE_FLOAT16: _ClassVar[KvDtype]
    KV_DTYPE_INT8: _ClassVar[KvDtype]
TRANSPORT_UNSPECIFIED: Transport
TRANSPORT_SHM: Transport
TRANSPORT_GRPC: Transport
KV_DTYPE_UNSPECIFIED: KvDtype
KV_DTYPE_FLOAT32: KvDtype
KV_DTYPE_BFLOAT16: KvDtype
KV_DTYPE_FLOAT16: KvDtype
KV_DTYPE_INT8: KvDtype

class AttentionShape(_message.Message):
    __slots__ = ("layers", "query_heads", "kv_heads", "head_dim", "block_tokens", "kv_dtype", "activation_dtype", "scale", "sliding_window", "softcap")
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    QUERY_HEADS_FIELD_NUMBER: _ClassVar[int]
    KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    ACTIVATION_DTYPE_FIELD_NUMBER: _ClassVar[int]
    SCALE_FIELD_NUMBER: _ClassVar[int]
    SLIDING_WINDOW_FIELD_NUMBER: _ClassVar[int]
    SOFTCAP_FIELD_NUMBER: _ClassVar[int]
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    block_tokens: int
    kv_dtype: KvDtype
    activation_dtype: KvDtype
    scale: float
    sliding_window: _containers.RepeatedScalarFieldContainer[int]
    softcap: float
    def __init__(self, layers: _Optional[int] = ..., query_heads: _Optional[int] = ..., kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_tokens: _Optional[int] = ..., kv_dtype: _Optional[_Union[KvDtype, str]] = ..., activation_dtype: _Optional[_Union[KvDtype, str]] = ..., scale: _Optional[float] = ..., sliding_window: _Optional[_Iterable[int]] = ..., softcap: _Optional[float] = ...) -> None: ...

class OpenSession(_message.Message):
    __slots__ = ("session_id", "epoch", "shape", "host_blocks", "max_rows", "max_blocks_per_row", "transport", "lease_seconds", "resume", "layout_version", "boot_id")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    HOST_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    MAX_ROWS_FIELD_NUMBER: _ClassVar[int]
    MAX_BLOCKS_PER_ROW_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    LEASE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: str
    epoch: int
    shape: AttentionShape
    host_blocks: int
    max_rows: int
    max_blocks_per_row: int
    transport: Transport
    lease_seconds: float
    resume: bool
    layout_version: int
    boot_id: str
    def __init__(self, session_id: _Optional[str] = ..., epoch: _Optional[int] = ..., shape: _Optional[_Union[AttentionShape, _Mapping]] = ..., host_blocks: _Optional[int] = ..., max_rows: _Optional[int] = ..., max_blocks_per_row: _Optional[int] = ..., transport: _Optional[_Union[Transport, str]] = ..., lease_seconds: _Optional[float] = ..., resume: _Optional[bool] = ..., layout_version: _Optional[int] = ..., boot_id: _Optional[str] = ...) -> None: ...

class SessionOpened(_message.Message):
    __slots__ = ("transport", "handoff_socket", "handoff_token", "pool_bytes", "step_bytes", "control_bytes", "nonce", "threads", "isa", "resumed")
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_SOCKET_FIELD_NUMBER: _ClassVar[int]
    HANDOFF_TOKEN_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_FIELD_NUMBER: _ClassVar[int]
    STEP_BYTES_FIELD_NUMBER: _ClassVar[int]
    CONTROL_BYTES_FIELD_NUMBER: _ClassVar[int]
    NONCE_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    ISA_FIELD_NUMBER: _ClassVar[int]
    RESUMED_FIELD_NUMBER: _ClassVar[int]
    transport: Transport
    handoff_socket: str
    handoff_token: bytes
    pool_bytes: int
    step_bytes: int
    control_bytes: int
    nonce: bytes
    threads: int
    isa: str
    resumed: bool
    def __init__(self, transport: _Optional[_Union[Transport, str]] = ..., handoff_socket: _Optional[str] = ..., handoff_token: _Optional[bytes] = ..., pool_bytes: _Optional[int] = ..., step_bytes: _Optional[int] = ..., control_bytes: _Optional[int] = ..., nonce: _Optional[bytes] = ..., threads: _Optional[int] = ..., isa: _Optional[str] = ..., resumed: _Optional[bool] = ...) -> None: ...

class MemoryMapped(_message.Message):
    __slots__ = ("nonce",)
    NONCE_FIELD_NUMBER: _ClassVar[int]
    nonce: bytes
    def __init__(self, nonce: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sequence",)
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    def __init__(self, sequence: _Optional[int] = ...) -> None: ...

class WriteKv(_message.Message):
    __slots__ = ("layer", "slots", "k", "v")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    layer: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    k: bytes
    v: bytes
    def __init__(self, layer: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ...) -> None: ...

class ReadKv(_message.Message):
    __slots__ = ("layer", "slots", "call_id")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    layer: int
    slots: _containers.RepeatedScalarFieldContainer[int]
    call_id: int
    def __init__(self, layer: _Optional[int] = ..., slots: _Optional[_Iterable[int]] = ..., call_id: _Optional[int] = ...) -> None: ...

class KvData(_message.Message):
    __slots__ = ("call_id", "k", "v")
    CALL_ID_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    call_id: int
    k: bytes
    v: bytes
    def __init__(self, call_id: _Optional[int] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ...) -> None: ...

class AttendStep(_message.Message):
    __slots__ = ("sweep", "layer", "lane", "lengths", "block_ids", "q", "k", "v")
    SWEEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    LENGTHS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    Q_FIELD_NUMBER: _ClassVar[int]
    K_FIELD_NUMBER: _ClassVar[int]
    V_FIELD_NUMBER: _ClassVar[int]
    sweep: int
    layer: int
    lane: int
    lengths: _containers.RepeatedScalarFieldContainer[int]
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    q: bytes
    k: bytes
    v: bytes
    def __init__(self, sweep: _Optional[int] = ..., layer: _Optional[int] = ..., lane: _Optional[int] = ..., lengths: _Optional[_Iterable[int]] = ..., block_ids: _Optional[_Iterable[int]] = ..., q: _Optional[bytes] = ..., k: _Optional[bytes] = ..., v: _Optional[bytes] = ...) -> None: ...

class AttendResult(_message.Message):
    __slots__ = ("sweep", "layer", "lane", "o")
    SWEEP_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    LANE_FIELD_NUMBER: _ClassVar[int]
    O_FIELD_NUMBER: _ClassVar[int]
    sweep: int
    layer: int
    lane: int
    o: bytes
    def __init__(self, sweep: _Optional[int] = ..., layer: _Optional[int] = ..., lane: _Optional[int] = ..., o: _Optional[bytes] = ...) -> None: ...

class CloseSession(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SessionClosed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StepError(_message.Message):
    __slots__ = ("sweep", "message")
    SWEEP_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    sweep: int
    message: str
    def __init__(self, sweep: _Optional[int] = ..., message: _Optional[str] = ...) -> None: ...

class SessionStats(_message.Message):
    __slots__ = ("sequence", "kv_bytes_read", "rows", "busy_seconds", "sweeps")
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_READ_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    BUSY_SECONDS_FIELD_NUMBER: _ClassVar[int]
    SWEEPS_FIELD_NUMBER: _ClassVar[int]
    sequence: int
    kv_bytes_read: int
    rows: int
    busy_seconds: float
    sweeps: int
    def __init__(self, sequence: _Optional[int] = ..., kv_bytes_read: _Optional[int] = ..., rows: _Optional[int] = ..., busy_seconds: _Optional[float] = ..., sweeps: _Optional[int] = ...) -> None: ...

class AttendRequest(_message.Message):
    __slots__ = ("open", "mapped", "heartbeat", "write_kv", "read_kv", "step", "close")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    MAPPED_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    WRITE_KV_FIELD_NUMBER: _ClassVar[int]
    READ_KV_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    open: OpenSession
    mapped: MemoryMapped
    heartbeat: Heartbeat
    write_kv: WriteKv
    read_kv: ReadKv
    step: AttendStep
    close: CloseSession
    def __init__(self, open: _Optional[_Union[OpenSession, _Mapping]] = ..., mapped: _Optional[_Union[MemoryMapped, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., write_kv: _Optional[_Union[WriteKv, _Mapping]] = ..., read_kv: _Optional[_Union[ReadKv, _Mapping]] = ..., step: _Optional[_Union[AttendStep, _Mapping]] = ..., close: _Optional[_Union[CloseSession, _Mapping]] = ...) -> None: ...

class AttendResponse(_message.Message):
    __slots__ = ("opened", "ready", "stats", "kv_data", "result", "step_error", "closed")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    KV_DATA_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    STEP_ERROR_FIELD_NUMBER: _ClassVar[int]
    CLOSED_FIELD_NUMBER: _ClassVar[int]
    opened: SessionOpened
    ready: Heartbeat
    stats: SessionStats
    kv_data: KvData
    result: AttendResult
    step_error: StepError
    closed: SessionClosed
    def __init__(self, opened: _Optional[_Union[SessionOpened, _Mapping]] = ..., ready: _Optional[_Union[Heartbeat, _Mapping]] = ..., stats: _Optional[_Union[SessionStats, _Mapping]] = ..., kv_data: _Optional[_Union[KvData, _Mapping]] = ..., result: _Optional[_Union[AttendResult, _Mapping]] = ..., step_error: _Optional[_Union[StepError, _Mapping]] = ..., closed: _Optional[_Union[SessionClosed, _Mapping]] = ...) -> None: ...

class GetCapabilitiesRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetCapabilitiesResponse(_message.Message):
    __slots__ = ("version", "isa", "isas", "threads", "transports", "kv_dtypes", "pool_bytes_available", "layout_version", "boot_id", "numa_node")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    ISA_FIELD_NUMBER: _ClassVar[int]
    ISAS_FIELD_NUMBER: _ClassVar[int]
    THREADS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    KV_DTYPES_FIELD_NUMBER: _ClassVar[int]
    POOL_BYTES_AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_VERSION_FIELD_NUMBER: _ClassVar[int]
    BOOT_ID_FIELD_NUMBER: _ClassVar[int]
    NUMA_NODE_FIELD_NUMBER: _ClassVar[int]
    version: str
    isa: str
    isas: _containers.RepeatedScalarFieldContainer[str]
    threads: int
    transports: _containers.RepeatedScalarFieldContainer[Transport]
    kv_dtypes: _containers.RepeatedScalarFieldContainer[KvDtype]
    pool_bytes_available: int
    layout_version: int
    boot_id: str
    numa_node: int
    def __init__(self, version: _Optional[str] = ..., isa: _Optional[str] = ..., isas: _Optional[_Iterable[str]] = ..., threads: _Optional[int] = ..., transports: _Optional[_Iterable[_Union[Transport, str]]] = ..., kv_dtypes: _Optional[_Iterable[_Union[KvDtype, str]]] = ..., pool_bytes_available: _Optional[int] = ..., layout_version: _Optional[int] = ..., boot_id: _Optional[str] = ..., numa_node: _Optional[int] = ...) -> None: ...
