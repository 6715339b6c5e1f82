"""What fuzzers and readers of the code have found, each as the smallest input that showed it."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest

from cpu_service.config import CpuServiceConfig
from cpu_service.spec import read_spec
from gpu_service.frontend.compat import kserve_messages
from gpu_service.frontend.validate import encode_chat
from gpu_service.model.spec import read_spec as read_model
from gpu_service.model.tokenizer import load_tokenizer
from gpu_service.model.weights import SafetensorsSource
from neo_client.bench.load import read_prompts
from neo_client.workloads import read_workload
from neo_client.workloads.traces import read_trace
from neo_common.errors import ErrorDetails, Reason, ServiceError, reason_of
from neo_common.grpc.keys import load_keys, new_key
from neo_common.grpc.tokens import parse_keys
from neo_plan.demand import demand_of
from neo_plan.simulator.profile import read_profile
from protos.compat import kserve_pb2 as kserve
from protos.neo.v1 import cpu_attention_pb2 as cpu
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import types_pb2 as types
from router.admission.policy import load_policy
from router.backend import load_view
from router.peek import MAX_FIELDS, peek
from router.policies import POLICIES, choose
from router.views import BackendState, BackendView, CallView
from tests.fuzz import files
from tests.fuzz.front import MODEL, tokenizer, wait
from tests.fuzz.mutate import varint
from tests.fuzz.target import refused
from tests.fuzz.targets import cpu_sessions, credentials

GENERATE = "/neo.v1.InferenceService/GenerateStream"


def refusal(call: Callable[[], Any], field: str) -> ServiceError:
    with pytest.raises(ServiceError) as caught:
        call()
    refused(caught.value)
    assert caught.value.field == field
    return caught.value


# Requests ----------------------------------------------------------------------------------------


def infer(**fields: Any) -> kserve.ModelInferRequest:
    request = kserve.ModelInferRequest(model_name="tiny")
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1])
    text.contents.bytes_contents.append(b"hi")
    for name, value in fields.items():
        tensor = request.inputs.add(name=name, datatype="BYTES", shape=[1])
        tensor.contents.bytes_contents.append(value)
    return request


def test_a_tensor_of_ever_so_many_dimensions() -> None:
    """Their product took a minute on the event loop."""
    request = infer()
    request.inputs[0].shape[:] = [2**62] * 100_000
    refusal(lambda: kserve_messages.read_question(request), "inputs[0].shape")


@pytest.mark.parametrize("name", ["\\ud800", "x" * 50_000])
def test_a_parameter_whose_name_no_status_could_hold(name: str) -> None:
    request = infer(sampling_parameters=f'{{"{name}": 1}}'.encode())
    with pytest.raises(ServiceError) as caught:
        kserve_messages.read_question(request)
    refused(caught.value)
    assert "is no input or parameter" in caught.value.message or "..." in caught.value.message


def test_roles_count_like_what_is_said() -> None:
    """Only contents did: 60 MB of role was rendered, and cut, on the event loop."""
    chat = types.Chat(messages=[types.ChatMessage(role="r" * 1_000_000, content="")])
    refusal(lambda: wait(encode_chat(tokenizer(), chat, MODEL)), "chat.messages.role")


def test_a_long_chat_of_nothing_is_cut_off_the_event_loop() -> None:
    where = []

    class Watched:
        longest_token = 10

        def render_chat(self, messages: Any) -> list[int]:
            where.append(threading.current_thread() is threading.main_thread())
            return [1]

    chat = types.Chat(messages=[types.ChatMessage(role="user")] * 512)
    watched: Any = Watched()
    wait(encode_chat(watched, chat, MODEL))
    assert where == [False]


@pytest.mark.parametrize("field", [b"\x0a\x00", b"\x40\x01"])
def test_the_router_reads_on_for_a_bounded_time(field: bytes) -> None:
    """64 MB of empty fields took it ten seconds. What is behind too many is not seen."""
    first, last = b"\x12\x01m", b"\x12\x01n"
    assert peek(GENERATE, first + field * (MAX_FIELDS // 2 - 2) + last).model == "n"
    assert peek(GENERATE, first + field * MAX_FIELDS + last).model == "m"


def test_fields_within_prompts_count_too() -> None:
    ids = b"\x08\x01" * 5000
    one, last = b"\x22" + varint(len(ids)) + ids, b"\x12\x01n"
    assert peek(GENERATE, b"\x12\x01m" + one + last).model == "n"
    assert peek(GENERATE, b"\x12\x01m" + one * 3 + last).model == "m"


# Errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("letter", ["x", "\u20ac", "\U0001f600", "\x01"])
def test_a_status_is_never_longer_than_its_client_takes(letter: str) -> None:
    error = ServiceError(Reason.INVALID_ARGUMENT, letter * 100_000, field=letter * 100_000)
    refused(error)
    assert error.message.startswith(letter)
    short = ServiceError(Reason.INVALID_ARGUMENT, "n is 0", field="n")
    assert (short.message, short.field) == ("n is 0", "n")


def test_details_that_are_garbage_say_nothing() -> None:
    error: Any = ServiceError(Reason.QUEUE_FULL, "full", field="f", retry_after=1.0)
    status = error.to_status()
    data = status.trailing_metadata[0][1]
    broken = data.replace(b"\x0a\x01f", b"\x0a\x7ff")
    assert broken != data

    class Failed:
        def trailing_metadata(self) -> Any:
            return (("grpc-status-details-bin", broken),)

    assert ErrorDetails(Failed()).reason == "QUEUE_FULL"
    assert reason_of(broken) == "QUEUE_FULL"
    assert reason_of(data[:-1] + b"\xff") in ("", "QUEUE_FULL")


# Backends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [float("nan"), float("inf"), -1.0, 1e-300, 1e300])
@pytest.mark.parametrize("policy", POLICIES)
def test_one_backend_cannot_make_calls_to_others_fail(policy: str, rate: float) -> None:
    """`least_wait` rounded NaN: an INTERNAL for every call, whoever would have taken it."""
    tier = engine.TierLoad(
        total_blocks=9, freed_tokens_per_second=rate, token_seconds=rate, running_requests=3
    )
    load = engine.LoadSnapshot(
        gpu=tier, host=tier, block_tokens=16, waiting_requests=4, waiting_prompt_tokens=10**6,
        prompt_tokens_per_second=rate,
    )  # fmt: skip
    lying = BackendView("lying", BackendState.UP, load_view(load), age_seconds=0.1)
    honest = BackendView("honest", BackendState.UP, None)
    call = CallView(prompt_tokens=100)
    assert choose(POLICIES[policy], [lying, honest], call) in ("lying", "honest")


# Credentials -------------------------------------------------------------------------------------


def signed(**claims: Any) -> str:
    return jwt.encode({**credentials.CLAIMS, **claims}, credentials._private(), "EdDSA")


@pytest.mark.parametrize(
    "token",
    [
        "\udcff",
        base64.urlsafe_b64encode(b"[" * 6000).decode().rstrip("=") + ".e30.AAAA",
        base64.urlsafe_b64encode(b'{"alg":{"a":' * 500).decode().rstrip("=") + ".e30.AAAA",
    ],
    ids=["surrogate", "nested", "nested-alg"],
)
def test_a_token_that_cannot_be_read_is_refused(token: str) -> None:
    with pytest.raises(ServiceError) as caught:
        credentials._check(token)
    assert caught.value.reason is Reason.UNAUTHENTICATED


@pytest.mark.parametrize(
    "claims", [{"exp": float("inf")}, {"exp": "4000000000"}, {"exp": [1]}, {"nbf": float("inf")}]
)
def test_signed_claims_of_wrong_types_are_refused(claims: dict[str, Any]) -> None:
    with pytest.raises(ServiceError) as caught:
        credentials._check(signed(**claims))
    assert caught.value.reason is Reason.UNAUTHENTICATED


def test_a_jwks_that_is_nested_too_deeply() -> None:
    with pytest.raises(ValueError, match="jwt_keys: k must hold"):
        parse_keys(b"[" * 100_000, "k")


# Files of operators ------------------------------------------------------------------------------

YAMLS = [
    "[" * 1000,
    '!!int ""',
    '!!float ""',
    "!!timestamp x",
    "!!bool x",
    "2001-99-99",
    "a: " + "9" * 5000,
]


@pytest.mark.parametrize("text", YAMLS, ids=lambda text: text[:12])
@pytest.mark.parametrize(("load", "name"), [(load_keys, "api_keys"), (load_policy, "tenants")])
def test_yaml_that_its_parser_gives_up_on(
    tmp_path: Path, load: Callable[[str], Any], name: str, text: str
) -> None:
    path = tmp_path / "file.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=f"{name}: .* is not YAML"):
        load(str(path))


def test_roles_that_are_no_texts(tmp_path: Path) -> None:
    entry = new_key("n", "t", ["admin"])[1] | {"roles": [{"a": 1}]}
    path = tmp_path / "keys.yaml"
    path.write_text(json.dumps({"keys": [entry]}))
    with pytest.raises(ValueError, match="roles must be a list"):
        load_keys(str(path))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2" * 200_000 + ",1,1\n", "cannot be read"),
        ("\udcff,1,1\n", "cannot be read"),
        (f"2023-01-01,{'9' * 400},1\n", "digits"),
    ],
)
def test_traces_that_csv_gives_up_on(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "trace.csv"
    head = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"
    path.write_bytes(head + text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=words):
        read_trace(str(path))


def test_a_trace_without_a_span(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("TIMESTAMP,ContextTokens,GeneratedTokens\n" + "2023-01-01,1,1\n" * 2)
    with pytest.raises(ValueError, match="at the same time"):
        demand_of(None, "1x1", str(path), 0, 1000)


@pytest.mark.parametrize("text", ["[[1e999, 1]]", "[" * 100_000, f"[[{10**300}, 1]]"])
def test_lengths_that_are_none(tmp_path: Path, text: str) -> None:
    path = tmp_path / "lengths.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"workload lengths\.json"):
        read_workload(str(path), 1)


@pytest.mark.parametrize("name", ["9" * 400 + "x1", "1x" + "9" * 5000])
def test_a_workload_of_ever_so_many_digits(name: str) -> None:
    with pytest.raises(ValueError, match="at most 9 digits"):
        read_workload(name, 3)


@pytest.mark.parametrize("read", [lambda n: read_workload(n, 1), read_trace, read_profile])
def test_a_name_that_no_file_can_have(read: Callable[[str], Any]) -> None:
    with pytest.raises(ValueError, match="is neither"):
        read("x" * 5000)


def test_settings_whose_names_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "tenants.yaml"
    path.write_text("default: {999: 1}")
    with pytest.raises(ValueError, match="unknown setting 999"):
        load_policy(str(path))


def test_a_folder_is_no_workload(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither INxOUT nor a file"):
        read_workload(str(tmp_path), 1)


@pytest.mark.parametrize(
    "line",
    ['{"text": "a", "max_tokens": 1e999}', '{"token_ids": 5, "max_tokens": 1}',
     '{"text": 5, "max_tokens": 1}', "[" * 100_000],
)  # fmt: skip
def test_prompts_that_are_none(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match="prompts, line 1"):
        read_prompts(str(path))


# Checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**8},
        {"num_hidden_layers": 10**30},
        {"vocab_size": 10**12},
        {"rms_norm_eps": 10**400},
        {"rms_norm_eps": -1},
        {"head_dim": 15},
        {"eos_token_id": -5},
        {"bos_token_id": 40},
        {"rope_theta": 1.0},
        {"max_position_embeddings": 2**40},
        {"rope_scaling": {"rope_type": "linear", "factor": 1e300}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 2, "low_freq_factor": 4}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 4, "beta_slow": 0}},
    ],
    ids=str,
)
def test_a_shape_that_no_model_has(tmp_path: Path, changes: dict[str, Any]) -> None:
    text = json.dumps({**files.CONFIG, **changes}, allow_nan=True)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: ") as caught:
        read_model(tmp_path)
    assert len(str(caught.value)) < 400


def test_a_config_that_is_nested_too_deeply(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"config\.json: it is nested too deeply"):
        read_model(tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"general.alignment": "x"},
        {"general.alignment": 0},
        {"llama.block_count": 2**32 - 1},
        {"llama.attention.head_count": 33},
        {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        {"llama.rope.freq_base": float("inf")},
        {"tokenizer.ggml.eos_token_id": 40},
    ],
    ids=str,
)
def test_metadata_that_no_model_has(tmp_path: Path, changes: dict[str, Any]) -> None:
    path = tmp_path / "model.gguf"
    metadata = {**files.metadata("gpt2"), **changes}
    metadata.pop("llama.attention.key_length")
    path.write_bytes(files.gguf(metadata, files.shapes(), b""))
    with pytest.raises(ValueError, match=r"model\.gguf"):
        read_model(path)


def test_arrays_within_arrays(tmp_path: Path) -> None:
    """A thousand levels of one element each."""
    level = (9).to_bytes(4, "little") + (1).to_bytes(8, "little")
    head = b"GGUF" + (3).to_bytes(4, "little") + bytes(8) + (1).to_bytes(8, "little")
    path = tmp_path / "deep.gguf"
    path.write_bytes(head + bytes(8) + (9).to_bytes(4, "little") + level * 5000)
    with pytest.raises(ValueError, match="its header is damaged"):
        read_model(path)


@pytest.mark.parametrize("shape", [(2**63, 2**33), (2**32, 2**32), (0, 32), (2**62, 4, 4)])
def test_a_tensor_of_more_bytes_than_there_are(tmp_path: Path, shape: tuple[int, ...]) -> None:
    """Their product was taken in 64 bits, and came out as 0 for some."""
    path = tmp_path / "model.gguf"
    tensors = {**files.shapes(), "rope_freqs.weight": shape}
    path.write_bytes(files.gguf(files.metadata("llama"), tensors, bytes(8192)))
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        read_model(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"tokenizer.ggml.scores": ["a"] * 40},
        {"tokenizer.ggml.token_type": 5},
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": [1],
            "tokenizer.ggml.merges": ["a b"],
        },
        {"tokenizer.ggml.tokens": ["a" * 1_000_000] * 2, "tokenizer.ggml.scores": [0.0, 0.0]},
        {"tokenizer.ggml.tokens": ["a b"] * 40},
    ],
    ids=lambda changes: "-".join(key.rpartition(".")[2] for key in changes),
)
def test_a_vocabulary_that_is_none(tmp_path: Path, changes: dict[str, Any]) -> None:
    """The longest token was cut in two at each of its million characters."""
    path = tmp_path / "model.gguf"
    path.write_bytes(files.gguf({**files.metadata("llama"), **changes}, files.shapes(), b""))
    begin = time.process_time()
    with pytest.raises(ValueError, match=r"model\.gguf"):
        load_tokenizer(path)
    assert time.process_time() - begin < 5


def test_scales_of_a_tensor_without_rows(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(files.CONFIG))
    data = files.safetensors({"a.weight": (), "a.weight_scale": (1,)}, b"")
    (tmp_path / "model.safetensors").write_bytes(data.replace(b'"F32"', b'"F8_E4M3"', 1))
    with pytest.raises(ValueError, match="a"):
        SafetensorsSource(tmp_path, fp8=True)


# Sessions of cpu_services ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        cpu.AttendRequest(read_kv=cpu.ReadKv(layer=2**32 - 1, slots=[1])),
        cpu.AttendRequest(read_kv=cpu.ReadKv(slots=[2**64 - 1])),
        cpu.AttendRequest(read_kv=cpu.ReadKv(slots=[cpu_sessions.SLOTS])),
        cpu.AttendRequest(write_kv=cpu.WriteKv(slots=[2**63], k=bytes(64), v=bytes(64))),
        cpu.AttendRequest(write_kv=cpu.WriteKv(layer=2**31, slots=[0], k=bytes(64), v=bytes(64))),
    ],
    ids=lambda message: message.WhichOneof("message"),
)
def test_places_outside_the_pool(message: cpu.AttendRequest) -> None:
    """Numbers that no C++ integer holds were an internal error."""
    with pytest.raises(ServiceError) as caught:
        cpu_sessions._handle(message.SerializeToString())
    assert caught.value.reason is Reason.INVALID_ARGUMENT
    assert caught.value.field == message.WhichOneof("message")


def test_tables_of_a_step_count_as_memory() -> None:
    """One row of a million blocks among 4,096 short ones: 4 GiB of mask, for a message of 2 MB."""
    opening = cpu_sessions.opening()
    opening.max_rows, opening.max_blocks_per_row = 4096, 1 << 20
    spec = read_spec(opening, CpuServiceConfig())
    assert spec.work_bytes == 4096 * (1 << 20) * 5
