"""Writes docs/errors.md: every reason for which a call fails, and which call fails for which.

python docs/errors.py            write
python docs/errors.py --check    exit 1 when the file is not current

Statuses come from the code; tests/meta/test_errors.py compares the rest with it.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from neo_common.errors import Reason
from neo_http.errors import http_status

TARGET = Path(__file__).with_name("errors.md")
HEAD = """# Errors

Written by `python docs/errors.py`; do not edit.

A call that fails has a gRPC status, and in the status details a `google.rpc.ErrorInfo` (domain
`neo.v1`) with one of the reasons below, a `BadRequest` naming the field where one is to blame, and
a `RetryInfo` where waiting helps. Over HTTP the reason is `code`, the field `param`, and the delay
`Retry-After`. Messages are for people and may change; reasons are not taken back.

Retry: **no** means that the same call will fail again. **later** means that it may succeed after
the delay, here or at another server; nothing of the failed call goes on. A stream that has begun
cannot be taken up again: retry it as a new one. Our clients (`neo_client.Retries`) and the router
try again by themselves as long as an answer has not begun, within a budget.

| reason | gRPC | HTTP | retry | when |
| --- | --- | --- | --- | --- |
"""
CALLS_HEAD = """
## By call

Each call can fail for these: {everywhere}. Beyond them:

| call | a gpu_service says | a router adds |
| --- | --- | --- |
"""
OTHERS_HEAD = """
| call | says |
| --- | --- |
"""
TAIL = """
Over HTTP, `/v1/completions` and `/v1/chat/completions` fail as `Generate` at a router does,
`/v1/models` as `ListModels` and `GetModel`. What only HTTP says:

| HTTP | code | when |
| --- | --- | --- |
| 404 | UNKNOWN_PATH | there is nothing at this path |
| 405 | METHOD_NOT_ALLOWED | such as GET where POST is wanted |
| 408 | BODY_TIMEOUT | the body did not arrive within `http_body_seconds` |
| 413 | BODY_TOO_LARGE | it has more than `http_max_body_mib` |
| 415 | UNSUPPORTED_MEDIA_TYPE | it is not `application/json`, or compressed |
| 503 | OVERLOADED | more than `http_max_connections` are open; this one is closed |

gRPC itself answers without a reason: UNIMPLEMENTED for methods that are not served,
RESOURCE_EXHAUSTED for messages larger than `max_message_mib`, and in the client CANCELLED and
DEADLINE_EXCEEDED for its own doing.
"""
NO, LATER = "no", "later"


@dataclass(frozen=True)
class About:
    retry: str
    when: str


REASONS = {
    Reason.INVALID_ARGUMENT: About(NO, "a field is wrong, or the bytes are no request"),
    Reason.UNAUTHENTICATED: About(NO, "no credentials, or such as are not accepted"),
    Reason.PERMISSION_DENIED: About(NO, "the caller is known, and may not do this"),
    Reason.UNKNOWN_MODEL: About(NO, "no server of this model is there"),
    Reason.NEVER_FITS: About(NO, "it needs more KV than the pools hold"),
    Reason.DUPLICATE_REQUEST_ID: About(NO, "`request_id` names a request that is still live"),
    Reason.REQUEST_NOT_FOUND: About(NO, "no live request has this `request_id`"),
    Reason.DEADLINE_EXCEEDED: About(NO, "the call's own deadline has passed"),
    Reason.QUEUE_FULL: About(LATER, "as many requests wait as may wait"),
    Reason.OVERLOADED: About(LATER, "the router holds its `max_calls`"),
    Reason.RATE_LIMITED: About(LATER, "the tenant has used up its tokens or requests per minute"),
    Reason.WAIT_TOO_LONG: About(LATER, "it would wait, or has waited, too long in the router"),
    Reason.OUT_OF_MEMORY: About(LATER, "an allocation failed while the request ran"),
    Reason.DRAINING: About(LATER, "the server finishes what it has and takes nothing new"),
    Reason.NOT_READY: About(LATER, "the model is loading, or the issuer's keys are not there yet"),
    Reason.ENGINE_LOST: About(LATER, "the engine core has ended; its gpu_service ends, too"),
    Reason.HOST_TIER_LOST: About(LATER, "the cpu_service did not come back within the lease"),
    Reason.NO_BACKEND: About(LATER, "no backend of the router can take calls now"),
    Reason.UNKNOWN_BACKEND: About(NO, "the router has no backend of this address"),
    Reason.BACKEND_LOST: About(LATER, "the backend went away, before or while it answered"),
    Reason.FAILED_PRECONDITION: About(NO, "the session or its setting does not allow it"),
    Reason.LAYOUT_MISMATCH: About(NO, "the peers lay out shared memory differently"),
    Reason.NOT_COLOCATED: About(NO, "the peers do not share memory; use transport `grpc`"),
    Reason.STALE_EPOCH: About(NO, "a message of a connection that has been replaced"),
    Reason.SESSION_EXISTS: About(NO, "a session of this id is attached already"),
    Reason.TOO_MANY_SESSIONS: About(LATER, "the cpu_service holds `max_sessions`"),
    Reason.OUT_OF_HOST_MEMORY: About(LATER, "the host pool asked for does not fit"),
    Reason.GRAMMAR_FAILED: About(NO, "what the output must follow became too complex"),
    Reason.NUMERICAL: About(NO, "the model produced NaN for this request"),
    Reason.INTERNAL_ERROR: About(NO, "a bug; the message has a ticket that is in the log"),
}

EVERYWHERE = (
    Reason.INVALID_ARGUMENT, Reason.UNAUTHENTICATED, Reason.PERMISSION_DENIED, Reason.NOT_READY,
    Reason.INTERNAL_ERROR,
)  # fmt: skip
_GENERATE = (
    Reason.UNKNOWN_MODEL, Reason.NEVER_FITS, Reason.DUPLICATE_REQUEST_ID, Reason.DEADLINE_EXCEEDED,
    Reason.QUEUE_FULL, Reason.OUT_OF_MEMORY, Reason.DRAINING, Reason.ENGINE_LOST,
    Reason.HOST_TIER_LOST, Reason.GRAMMAR_FAILED, Reason.NUMERICAL,
)  # fmt: skip
_RELAY = (Reason.UNKNOWN_MODEL, Reason.OVERLOADED, Reason.NO_BACKEND, Reason.BACKEND_LOST)
_ADMIT = (Reason.RATE_LIMITED, Reason.QUEUE_FULL, Reason.WAIT_TOO_LONG)
_ALL = (Reason.OVERLOADED, Reason.NO_BACKEND, Reason.BACKEND_LOST)
_MODEL = (Reason.UNKNOWN_MODEL, Reason.DRAINING)

INFERENCE: dict[str, tuple[tuple[Reason, ...], tuple[Reason, ...]]] = {
    "InferenceService.Generate": (_GENERATE, _RELAY + _ADMIT),
    "InferenceService.GenerateStream": (_GENERATE, _RELAY + _ADMIT),
    "InferenceService.Abort": ((Reason.REQUEST_NOT_FOUND, Reason.DRAINING), _ALL),
    "InferenceService.ListModels": ((Reason.DRAINING,), _ALL),
    "InferenceService.GetModel": (_MODEL, _RELAY),
    "InferenceService.Tokenize": (_MODEL, _RELAY),
    "InferenceService.Detokenize": (_MODEL, _RELAY),
    "VllmEngine.Generate": (_GENERATE, _RELAY + _ADMIT),
    "VllmEngine.Abort": ((), _ALL),
    "VllmEngine.HealthCheck": ((), ()),
    "VllmEngine.GetModelInfo": ((), _RELAY),
    "VllmEngine.GetServerInfo": ((), _RELAY),
    "VllmEngine.GetLoads": ((), ()),
    "VllmEngine.GetTokenizer": ((), _RELAY),
    "GRPCInferenceService.ModelInfer": (_GENERATE, _RELAY + _ADMIT),
    "GRPCInferenceService.ModelStreamInfer": (_GENERATE, _RELAY + _ADMIT),
    "GRPCInferenceService.ServerLive": ((), ()),
    "GRPCInferenceService.ServerReady": ((), ()),
    "GRPCInferenceService.ModelReady": ((), _RELAY),
    "GRPCInferenceService.ServerMetadata": ((), _RELAY),
    "GRPCInferenceService.ModelMetadata": ((Reason.UNKNOWN_MODEL,), _RELAY),
    "GRPCInferenceService.ModelConfig": ((Reason.UNKNOWN_MODEL,), _RELAY),
    "GRPCInferenceService.RepositoryIndex": ((), _ALL),
}
"""Call -> (reasons of a gpu_service, further ones of a router)."""
OTHERS: dict[str, tuple[Reason, ...]] = {
    "EngineService.GetLoad": (),
    "EngineService.WatchLoad": (),
    "EngineService.Drain": (),
    "EngineService.GetInfo": (),
    "EngineService.ResetPrefixCache": (Reason.ENGINE_LOST,),
    "MachineService.GetMachine": (),
    "RouterService.ListBackends": (),
    "RouterService.WatchBackends": (),
    "RouterService.DrainBackend": (Reason.UNKNOWN_BACKEND, Reason.BACKEND_LOST),
    "RouterService.ResetBackendPrefixCache": (Reason.UNKNOWN_BACKEND, Reason.BACKEND_LOST),
    "CpuAttentionService.GetCapabilities": (Reason.DRAINING,),
    "CpuAttentionService.Attend": (
        Reason.DRAINING, Reason.FAILED_PRECONDITION, Reason.LAYOUT_MISMATCH, Reason.NOT_COLOCATED,
        Reason.STALE_EPOCH, Reason.SESSION_EXISTS, Reason.TOO_MANY_SESSIONS,
        Reason.OUT_OF_HOST_MEMORY,
    ),
}  # fmt: skip


def render() -> str:
    lines = [HEAD.rstrip()]
    for reason, about in REASONS.items():
        code = reason.status_code
        status = http_status(reason.value, code)
        lines.append(f"| {reason} | {code.name} | {status} | {about.retry} | {about.when} |")
    lines.append(CALLS_HEAD.format(everywhere=", ".join(EVERYWHERE)).rstrip())
    for call, (own, added) in INFERENCE.items():
        lines.append(f"| {call} | {_listed(own)} | {_listed(added)} |")
    lines.append(OTHERS_HEAD.rstrip())
    lines += [f"| {call} | {_listed(reasons)} |" for call, reasons in OTHERS.items()]
    return "\n".join(lines) + "\n" + TAIL


def _listed(reasons: tuple[Reason, ...]) -> str:
    return ", ".join(reasons) or "-"


def main() -> int:
    if "--check" in sys.argv[1:]:
        if TARGET.read_text(encoding="utf-8") == render():
            return 0
        print("docs/errors.md is not current; run python docs/errors.py", file=sys.stderr)
        return 1
    TARGET.write_text(render(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
