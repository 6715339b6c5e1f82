"""What the commands make of their arguments, and what they print."""

from __future__ import annotations

import asyncio
import io
import re
from pathlib import Path

import grpc
import pytest
from rich.console import Console

from neo_client import cli
from neo_client.commands import demo, generate, load, serve
from neo_client.errors import explain
from neo_client.local.plan import make_plan, parse_override, with_port
from neo_client.options import Structured
from neo_client.stats import StreamStats
from neo_common.errors import Reason, ServiceError
from protos.neo.v1 import engine_pb2 as engine
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import router_pb2 as router
from protos.neo.v1 import types_pb2
from router.app import running
from router.config import RouterConfig
from tests.support.fake_backend import fake_backends


def arguments(*words: str):  # type: ignore[no-untyped-def]
    return cli.parser().parse_args(words)


def test_sampling_flags_cover_the_message() -> None:
    flags = {name.replace("-", "_") for name, _, _ in generate.SAMPLING_FLAGS}
    others = {"stop", "stop_token_ids", "logit_bias", "ignore_eos", "structured"}
    assert flags | others == {field.name for field in types_pb2.SamplingParams.DESCRIPTOR.fields}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), None),
        (("--json",), Structured(json_object=True)),
        (("--json-schema", "{}"), Structured(json_schema="{}")),
        (("--regex", "a+"), Structured(regex="a+")),
        (("--choice", "a", "--choice", "b"), Structured(choices=("a", "b"))),
    ],
)
def test_the_form_of_the_answer(words: tuple[str, ...], expected: Structured | None) -> None:
    assert generate.sampling_of(arguments("generate", "x", *words)).structured == expected


def test_a_grammar_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "g.lark").write_text('start: "a"')
    given = arguments("generate", "x", "--grammar", f"@{tmp_path}/g.lark")
    assert generate.sampling_of(given).structured == Structured(grammar='start: "a"')
    with pytest.raises(SystemExit):
        arguments("generate", "x", "--grammar", f"@{tmp_path}/none")


def test_sampling_from_flags() -> None:
    given = arguments(
        "generate", "x", "--temperature", "0.5", "--stop", "a", "--stop", "b", "--logit-bias",
        "7=-2", "--stop-token-id", "4", "--n", "2", "--ignore-eos",
    )  # fmt: skip
    sampling = generate.sampling_of(given)
    assert (sampling.temperature, sampling.n, sampling.top_k) == (0.5, 2, None)
    assert (sampling.stop, sampling.stop_token_ids) == (("a", "b"), (4,))
    assert (sampling.logit_bias, sampling.ignore_eos) == ({7: -2.0}, True)


def test_a_bad_bias_is_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        arguments("generate", "x", "--logit-bias", "seven")
    assert end.value.code == 2
    assert "must be ID=BIAS" in capsys.readouterr().err


def test_serve_passes_on_what_was_said_and_nothing_else(tmp_path: Path) -> None:
    given = arguments(
        "serve", "--model", "smollm2", "--listen", "127.0.0.1:0", "--offload", "always",
        "--host-kv-gib", "1.5", "--set", "cpu.threads=3", "--set", "gpu.lease-seconds=2",
    )  # fmt: skip
    plan = make_plan(serve.wishes(given, tmp_path))
    assert plan.cpu is not None
    assert plan.gpu.settings == {
        "log_level": "info", "drain_grace_seconds": 10.0, "model": "smollm2", "offload": "always",
        "host_kv_gib": 1.5, "lease_seconds": 2, "cpu_services": [plan.cpu.address],
    }  # fmt: skip
    assert plan.cpu.settings["threads"] == 3
    assert plan.cpu.settings["runtime_dir"] == str(tmp_path)
    assert plan.router.settings["backends"] == [plan.gpu.address]
    assert not plan.router.address.endswith(":0")
    assert len({plan.cpu.address, plan.gpu.address, plan.router.address}) == 3


def test_serve_passes_on_where_to_listen_for_http(tmp_path: Path) -> None:
    def where(*flags: str) -> str | None:
        given = arguments("serve", "--model", "x", *flags)
        settings = make_plan(serve.wishes(given, tmp_path)).router.settings
        found: str | None = settings.get("http_listen")
        return found

    assert where() is None
    assert where("--http-listen", "127.0.0.1:8000") == "127.0.0.1:8000"
    assert str(where("--http-listen", "127.0.0.1:0")).rpartition(":")[2] not in ("", "0")
    last = where("--http-listen", "127.0.0.1:8000", "--set", "router.http_listen=127.0.0.1:8001")
    assert last == "127.0.0.1:8001"


def test_without_offload_there_is_no_cpu_service(tmp_path: Path) -> None:
    plan = make_plan(
        serve.wishes(arguments("serve", "--model", "x", "--offload", "never"), tmp_path)
    )
    assert plan.cpu is None
    assert "cpu_services" not in plan.gpu.settings


def test_a_model_that_is_a_path_is_made_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "m.gguf").touch()
    monkeypatch.chdir(tmp_path)
    assert serve.absolute("m.gguf") == str(tmp_path / "m.gguf")
    assert serve.absolute("smollm2") == "smollm2"


@pytest.mark.parametrize("text", ["gpu.x", "x=1", "gpu=1", "disk.x=1", ".x=1", "gpu.=1", ""])
def test_bad_overrides(text: str) -> None:
    with pytest.raises(ValueError, match=r"^set must be cpu.NAME=VALUE"):
        parse_override(text)


def test_overrides_are_yaml() -> None:
    assert parse_override("router.max-calls=7") == ("router", "max_calls", 7)
    assert parse_override("cpu_service.cpus=[1, 2]") == ("cpu_service", "cpus", [1, 2])


@pytest.mark.parametrize("address", ["nowhere", ":1", "a:b", "host:"])
def test_bad_listen(address: str) -> None:
    with pytest.raises(ValueError, match=r"^listen must be HOST:PORT"):
        with_port(address)


def test_listening_where_this_machine_is_not() -> None:
    with pytest.raises(ValueError, match=r"^listen: nowhere.invalid is no address of this machine"):
        with_port("nowhere.invalid:0")
    with pytest.raises(ValueError, match=r"^listen: 192.0.2.1 is no address of this machine"):
        with_port("192.0.2.1:0")
    assert int(with_port("127.0.0.1:0").rpartition(":")[2]) > 0


def test_an_override_that_is_no_yaml() -> None:
    with pytest.raises(ValueError, match=r"^set: the value of gpu.threads is not YAML"):
        parse_override("gpu.threads={")


def message(tokens: int, usage: types_pb2.Usage | None = None) -> inference.GenerateStreamResponse:
    delta = inference.Choice(token_ids=[0] * tokens)
    return inference.GenerateStreamResponse(deltas=[delta], usage=usage)


def test_statistics() -> None:
    stats = StreamStats(started=10.0)
    stats.take(message(1), 10.5)
    stats.take(message(2), 10.7)
    stats.take(message(0), 10.75)
    usage = types_pb2.Usage(
        prompt_tokens=4, prefix_hit_tokens=3, gpu_tokens=1, host_tokens=2, demotions=1
    )
    stats.take(message(1, usage), 10.8)
    assert stats.line() == (
        "TTFT 500.0 ms | TPOT 100.0 ms | 4 tokens | decoded on GPU tier 1 / host tier 2 | "
        "prompt 4 (3 cached) | 1 migrations"
    )
    assert StreamStats(0.0).line() == "TTFT - ms | TPOT - ms | 0 tokens"


def test_a_row_of_the_load_table() -> None:
    snapshot = engine.LoadSnapshot(
        state=engine.ENGINE_STATE_SERVING, host_tier_state=engine.HOST_TIER_STATE_DEGRADED,
        gpu=engine.TierLoad(total_blocks=10, free_blocks=4, running_requests=2),
        host=engine.TierLoad(running_requests=1), waiting_requests=3, iteration_seconds=0.0125,
        output_tokens_per_second=80.0, demotions_total=5, promotions_total=6,
    )  # fmt: skip
    backend = router.Backend(
        address="x:1", state=router.BACKEND_STATE_UP, load=snapshot, load_age_seconds=0.25
    )
    assert load.row(backend) == [
        "x:1", "[green]up[/]", "2+1", "3", "60%+-", "80.0", "12.5", "5/6", "degraded", "0.2",
    ]  # fmt: skip
    down = router.Backend(address="y:1", state=router.BACKEND_STATE_DOWN, problem="refused")
    assert load.row(down)[:3] == ["y:1", "[red]down[/]", "-"]
    assert len(load.row(down)) == len(load.row(backend)) == len(load.COLUMNS)


def test_the_load_table_fits_into_a_terminal() -> None:
    """Nothing cut: `neo drain` wants the address as it stands there."""
    tier = engine.TierLoad(total_blocks=1000, free_blocks=10, running_requests=128)
    snapshot = engine.LoadSnapshot(
        state=engine.ENGINE_STATE_SERVING, host_tier_state=engine.HOST_TIER_STATE_UP,
        gpu=tier, host=tier, waiting_requests=1024, iteration_seconds=0.1234,
        output_tokens_per_second=2321.5, demotions_total=100, promotions_total=100,
    )  # fmt: skip
    busy = router.Backend(
        address="127.0.0.1:47459", state=router.BACKEND_STATE_UP, load=snapshot,
        load_age_seconds=0.25,
    )  # fmt: skip
    busy.load.state, busy.state = engine.ENGINE_STATE_DRAINING, router.BACKEND_STATE_DRAINING
    down = router.Backend(
        address="10.0.0.1:65535", state=router.BACKEND_STATE_DOWN, problem="UNAVAILABLE: [x]"
    )
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(load.table([busy, down]))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    (row,) = [line for line in lines if line.startswith("127.0.0.1:47459")]
    assert row.split() == [
        "127.0.0.1:47459", "draining", "128+128", "1024", "99%+99%", "2321.5", "123.4",
        "100/100", "up", "0.2",
    ]  # fmt: skip
    assert "10.0.0.1:65535: UNAVAILABLE: [x]" in lines


def test_an_error_is_named_once() -> None:
    class Refused(grpc.RpcError):
        reason = Reason.INVALID_ARGUMENT

        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.INVALID_ARGUMENT

        def details(self) -> str:
            return "text is empty"

        def trailing_metadata(self) -> object:
            return ServiceError(self.reason, self.details()).to_status().trailing_metadata

    assert explain(Refused()) == "text is empty [INVALID_ARGUMENT]"
    other = Refused()
    other.reason = Reason.UNKNOWN_MODEL
    assert explain(other) == "text is empty [INVALID_ARGUMENT, UNKNOWN_MODEL]"


def test_log_lines_are_trimmed_for_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    demo.say(
        "gpu_service", "2026-11-23 03:54:50,477 INFO    gpu_service __main__: weights: 5 of 9 MiB"
    )
    demo.say("gpu_service", "2026-11-23 03:54:50,477 DEBUG   gpu_service x: noise")
    demo.say("gpu_service", "Traceback")
    lines = [re.sub(" +", " ", line) for line in capsys.readouterr().err.splitlines()]
    assert lines == [" gpu_service weights: 5 of 9 MiB", " gpu_service Traceback"]


async def neo(*words: str) -> int:
    return await asyncio.to_thread(cli.main, list(words))


async def test_commands_against_a_router(capsys: pytest.CaptureFixture[str]) -> None:
    async with fake_backends(1) as (backend,):
        config = RouterConfig(listen="127.0.0.1:0", backends=(backend.address,))
        async with running(config) as front:
            news = asyncio.Event()
            front.registry.on_change(news.set)
            async with asyncio.timeout(10):
                await news.wait()
            assert front.registry.usable()
            at = ("--address", front.server.address)
            assert await neo("generate", "hi", *at, "--placement", "gpu-only") == 0
            assert capsys.readouterr().out == "a0 a1 a2 \n"
            assert backend.requests[0].scheduling.placement == types_pb2.PLACEMENT_GPU_ONLY
            assert await neo("generate", "1 x", *at, "--token-ids") == 2
            assert "prompt must be token ids" in capsys.readouterr().err
            assert await neo("load", "--once", *at) == 0
            assert "up" in capsys.readouterr().out
            assert await neo("load", "--once", "--address", backend.address) == 0
            assert await neo("load", "--interval", "0", *at) == 2
            assert await neo("drain", *at) == 2
            assert "name its backend with --backend" in capsys.readouterr().err
            assert await neo("drain", *at, "--backend", "nobody:1") == 1
            assert "UNKNOWN_BACKEND" in capsys.readouterr().err
            assert await neo("drain", *at, "--backend", backend.address, "--wait") == 0
            assert "has finished" in capsys.readouterr().out
            assert backend.drained == 1
            assert await neo("drain", "--address", backend.address) == 0
    assert await neo("generate", "hi", *at, "--raw") == 1
    assert "cannot be reached" in capsys.readouterr().err
