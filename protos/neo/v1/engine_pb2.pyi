from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class EngineState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ENGINE_STATE_UNSPECIFIED: _ClassVar[EngineState]
    ENGINE_STATE_STARTING: _ClassVar[EngineState]
    ENGINE_STATE_SERVING: _ClassVar[EngineState]
    ENGINE_STATE_DRAINING: _ClassVar[EngineState]

class HostTierState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    HOST_TIER_STATE_UNSPECIFIED: _ClassVar[HostTierState]
    HOST_TIER_STATE_OFF: _ClassVar[HostTierState]
    HOST_TIER_STATE_UP: _ClassVar[HostTierState]
    HOST_TIER_STATE_DEGRADED: _ClassVar[HostTierState]
ENGINE_STATE_UNSPECIFIED: EngineState
ENGINE_STATE_STARTING: EngineState
ENGINE_STATE_SERVING: EngineState
ENGINE_STATE_DRAINING: EngineState
HOST_TIER_STATE_UNSPECIFIED: HostTierState
HOST_TIER_STATE_OFF: HostTierState
HOST_TIER_STATE_UP: HostTierState
HOST_TIER_STATE_DEGRADED: HostTierState

class TierLoad(_message.Message):
    __slots__ = ("total_blocks", "free_blocks", "running_requests", "tokens_total", "freed_tokens_per_second", "token_seconds")
    TOTAL_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    FREE_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    FREED_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    TOKEN_SECONDS_FIELD_NUMBER: _ClassVar[int]
    total_blocks: int
    free_blocks: int
    running_requests: int
    tokens_total: int
    freed_tokens_per_second: float
    token_seconds: float
    def __init__(self, total_blocks: _Optional[int] = ..., free_blocks: _Optional[int] = ..., running_requests: _Optional[int] = ..., tokens_total: _Optional[int] = ..., freed_tokens_per_second: _Optional[float] = ..., token_seconds: _Optional[float] = ...) -> None: ...

class LoadSnapshot(_message.Message):
    __slots__ = ("state", "host_tier_state", "gpu", "host", "waiting_requests", "waiting_prompt_tokens", "max_waiting_requests", "block_tokens", "demotions_total", "promotions_total", "recomputations_total", "iterations_total", "iteration_seconds", "output_tokens_per_second", "sequence", "instance_id", "models", "prefix_query_tokens_total", "prefix_hit_tokens_total", "prefix_host_hit_tokens_total", "mode_seconds_total", "device_busy_seconds_total", "host_wait_seconds_total", "prompt_tokens_per_second", "decision", "predicted_seconds_total", "predicted_sweeps_took_seconds_total", "prediction_error", "host_busy_seconds_total")
    class ModeSecondsTotalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    class PredictedSecondsTotalEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    STATE_FIELD_NUMBER: _ClassVar[int]
    HOST_TIER_STATE_FIELD_NUMBER: _ClassVar[int]
    GPU_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DEMOTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PROMOTIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    RECOMPUTATIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ITERATIONS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    ITERATION_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    SEQUENCE_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    MODELS_FIELD_NUMBER: _ClassVar[int]
    PREFIX_QUERY_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HIT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREFIX_HOST_HIT_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    MODE_SECONDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_BUSY_SECONDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    HOST_WAIT_SECONDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    DECISION_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_SECONDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREDICTED_SWEEPS_TOOK_SECONDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    PREDICTION_ERROR_FIELD_NUMBER: _ClassVar[int]
    HOST_BUSY_SECONDS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    state: EngineState
    host_tier_state: HostTierState
    gpu: TierLoad
    host: TierLoad
    waiting_requests: int
    waiting_prompt_tokens: int
    max_waiting_requests: int
    block_tokens: int
    demotions_total: int
    promotions_total: int
    recomputations_total: int
    iterations_total: int
    iteration_seconds: float
    output_tokens_per_second: float
    sequence: int
    instance_id: str
    models: _containers.RepeatedScalarFieldContainer[str]
    prefix_query_tokens_total: int
    prefix_hit_tokens_total: int
    prefix_host_hit_tokens_total: int
    mode_seconds_total: _containers.ScalarMap[str, float]
    device_busy_seconds_total: float
    host_wait_seconds_total: float
    prompt_tokens_per_second: float
    decision: ModeDecision
    predicted_seconds_total: _containers.ScalarMap[str, float]
    predicted_sweeps_took_seconds_total: float
    prediction_error: float
    host_busy_seconds_total: float
    def __init__(self, state: _Optional[_Union[EngineState, str]] = ..., host_tier_state: _Optional[_Union[HostTierState, str]] = ..., gpu: _Optional[_Union[TierLoad, _Mapping]] = ..., host: _Optional[_Union[TierLoad, _Mapping]] = ..., waiting_requests: _Optional[int] = ..., waiting_prompt_tokens: _Optional[int] = ..., max_waiting_requests: _Optional[int] = ..., block_tokens: _Optional[int] = ..., demotions_total: _Optional[int] = ..., promotions_total: _Optional[int] = ..., recomputations_total: _Optional[int] = ..., iterations_total: _Optional[int] = ..., iteration_seconds: _Optional[float] = ..., output_tokens_per_second: _Optional[float] = ..., sequence: _Optional[int] = ..., instance_id: _Optional[str] = ..., models: _Optional[_Iterable[str]] = ..., prefix_query_tokens_total: _Optional[int] = ..., prefix_hit_tokens_total: _Optional[int] = ..., prefix_host_hit_tokens_total: _Optional[int] = ..., mode_seconds_total: _Optional[_Mapping[str, float]] = ..., device_busy_seconds_total: _Optional[float] = ..., host_wait_seconds_total: _Optional[float] = ..., prompt_tokens_per_second: _Optional[float] = ..., decision: _Optional[_Union[ModeDecision, _Mapping]] = ..., predicted_seconds_total: _Optional[_Mapping[str, float]] = ..., predicted_sweeps_took_seconds_total: _Optional[float] = ..., prediction_error: _Optional[float] = ..., host_busy_seconds_total: _Optional[float] = ...) -> None: ...

class ModeDecision(_message.Message):
    __slots__ = ("mode", "why", "host_rows", "streamed_rows", "resident_tokens", "tokens_per_second", "gpu_only_tokens_per_second")
    MODE_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    HOST_ROWS_FIELD_NUMBER: _ClassVar[int]
    STREAMED_ROWS_FIELD_NUMBER: _ClassVar[int]
    RESIDENT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    GPU_ONLY_TOKENS_PER_SECOND_FIELD_NUMBER: _ClassVar[int]
    mode: str
    why: str
    host_rows: float
    streamed_rows: float
    resident_tokens: int
    tokens_per_second: float
    gpu_only_tokens_per_second: float
    def __init__(self, mode: _Optional[str] = ..., why: _Optional[str] = ..., host_rows: _Optional[float] = ..., streamed_rows: _Optional[float] = ..., resident_tokens: _Optional[int] = ..., tokens_per_second: _Optional[float] = ..., gpu_only_tokens_per_second: _Optional[float] = ...) -> None: ...

class GetLoadRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetLoadResponse(_message.Message):
    __slots__ = ("load",)
    LOAD_FIELD_NUMBER: _ClassVar[int]
    load: LoadSnapshot
    def __init__(self, load: _Optional[_Union[LoadSnapshot, _Mapping]] = ...) -> None: ...

class WatchLoadRequest(_message.Message):
    __slots__ = ("interval_ms",)
    INTERVAL_MS_FIELD_NUMBER: _ClassVar[int]
    interval_ms: int
    def __init__(self, interval_ms: _Optional[int] = ...) -> None: ...

class WatchLoadResponse(_message.Message):
    __slots__ = ("load",)
    LOAD_FIELD_NUMBER: _ClassVar[int]
    load: LoadSnapshot
    def __init__(self, load: _Optional[_Union[LoadSnapshot, _Mapping]] = ...) -> None: ...

class DrainRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DrainResponse(_message.Message):
    __slots__ = ("live_requests",)
    LIVE_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    live_requests: int
    def __init__(self, live_requests: _Optional[int] = ...) -> None: ...

class ResetPrefixCacheRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResetPrefixCacheResponse(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class GetInfoResponse(_message.Message):
    __slots__ = ("version", "instance_id", "model", "device", "device_name", "offload", "offload_transport", "dtype", "host_kv_dtype", "max_context_tokens", "config")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    DEVICE_FIELD_NUMBER: _ClassVar[int]
    DEVICE_NAME_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_FIELD_NUMBER: _ClassVar[int]
    OFFLOAD_TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    HOST_KV_DTYPE_FIELD_NUMBER: _ClassVar[int]
    MAX_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_FIELD_NUMBER: _ClassVar[int]
    version: str
    instance_id: str
    model: str
    device: str
    device_name: str
    offload: str
    offload_transport: str
    dtype: str
    host_kv_dtype: str
    max_context_tokens: int
    config: str
    def __init__(self, version: _Optional[str] = ..., instance_id: _Optional[str] = ..., model: _Optional[str] = ..., device: _Optional[str] = ..., device_name: _Optional[str] = ..., offload: _Optional[str] = ..., offload_transport: _Optional[str] = ..., dtype: _Optional[str] = ..., host_kv_dtype: _Optional[str] = ..., max_context_tokens: _Optional[int] = ..., config: _Optional[str] = ...) -> None: ...
