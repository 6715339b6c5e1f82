"""`neo chat`, `neo keys`, and the flags that say how to reach a server."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from neo_client import Client, cli
from neo_client.commands import chat, flags
from neo_client.connect import Tls
from neo_common.errors import Reason, ServiceError
from neo_common.grpc.keys import load_keys
from protos.neo.v1 import inference_pb2 as inference
from tests.support.fake_backend import FakeBackend


class Talker(FakeBackend):
    """A model with a chat template."""

    async def GetModel(self, request: inference.GetModelRequest, context: Any) -> Any:
        model = inference.Model(name=self.name, has_chat_template=True)
        return inference.GetModelResponse(model=model)


@pytest.fixture
async def talker() -> AsyncIterator[Talker]:
    server = Talker("a")
    await server.start()
    yield server
    await server.stop()


def arguments(*words: str) -> Any:
    return cli.parser().parse_args(words)


async def converse(server: Talker, *lines: str, words: tuple[str, ...] = ()) -> None:
    """Say `lines`, then end the input."""
    given = arguments("chat", "--address", server.address, *words)
    left: Iterator[str] = iter(lines)

    def use() -> None:
        with Client(server.address) as client:
            chat.converse(client, given, lambda: next(left, None))

    await asyncio.to_thread(use)


def said(request: inference.GenerateRequest) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in request.chat.messages]


async def test_the_whole_conversation_is_sent_each_time(
    talker: Talker, capsys: pytest.CaptureFixture[str]
) -> None:
    await converse(
        talker, "hello", "", "again", "/reset", "new", "/exit", "never",
        words=("--system", "Be brief.", "--max-tokens", "7", "--temperature", "0"),
    )  # fmt: skip
    system, answer = ("system", "Be brief."), ("assistant", "a0 a1 a2 ")
    assert [said(request) for request in talker.requests] == [
        [system, ("user", "hello")],
        [system, ("user", "hello"), answer, ("user", "again")],
        [system, ("user", "new")],
    ]
    sampling = talker.requests[0].sampling
    assert (sampling.max_tokens, sampling.temperature) == (7, 0)
    assert capsys.readouterr().out == "a0 a1 a2 \n" * 3


async def test_a_message_whose_answer_failed_is_taken_back(
    talker: Talker, capsys: pytest.CaptureFixture[str]
) -> None:
    given = arguments("chat", "--address", talker.address)
    lines = iter(["too long", "short"])

    def ask() -> str | None:
        line = next(lines, None)
        if line == "too long":
            talker.fail_with = ServiceError(Reason.INVALID_ARGUMENT, "too many tokens")
        else:
            talker.fail_with = None
        return line

    def use() -> None:
        with Client(talker.address) as client:
            chat.converse(client, given, ask)

    await asyncio.to_thread(use)
    assert said(talker.requests[-1]) == [("user", "short")]
    assert "too many tokens" in capsys.readouterr().err


async def test_lines_from_a_pipe(
    talker: Talker, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = iter(["one\n", "two"])

    class Piped:
        isatty = staticmethod(lambda: False)
        readline = staticmethod(lambda: next(lines, ""))

    monkeypatch.setattr("sys.stdin", Piped)
    assert await asyncio.to_thread(cli.main, ["chat", "--address", talker.address, "--stats"]) == 0
    seen = capsys.readouterr()
    assert seen.out == "a0 a1 a2 \n" * 2
    assert seen.err.count("TTFT") == 2
    assert [said(request)[-1] for request in talker.requests] == [("user", "one"), ("user", "two")]


def test_a_new_key_is_what_a_server_accepts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "keys:\n"
    for words in (("--name", "ci"), ("--name", "ops", "--tenant", "t", "--role", "admin")):
        assert cli.main(["keys", "new", *words]) == 0
        seen = capsys.readouterr()
        (key,) = re.findall(r"neo_\w+", seen.err)
        assert key not in seen.out
        text += seen.out
    path = tmp_path / "keys.yaml"
    path.write_text(text)
    assert {r.principal.name: r.principal.tenant for r in load_keys(str(path)).values()} == {
        "ci": "ci", "ops": "t",
    }  # fmt: skip
    assert [entry["roles"] for entry in yaml.safe_load(text)["keys"]] == [["inference"], ["admin"]]
    assert cli.main(["keys", "new", "--name", "x", "--tenant", "\n"]) == 2


def test_how_to_reach_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def settings(*words: str) -> dict[str, Any]:
        return flags.connection_settings(arguments("chat", *words))

    monkeypatch.delenv(flags.TOKEN_VARIABLE, raising=False)
    assert settings() == {"address": flags.DEFAULT_ADDRESS, "tls": None, "token": None}
    assert settings("--tls")["tls"] == Tls()
    assert settings("--tls-ca", "f", "--tls-name", "n")["tls"] == Tls(ca="f", name="n")
    monkeypatch.setenv(flags.TOKEN_VARIABLE, "from-variable")
    assert settings()["token"] == "from-variable"
    (tmp_path / "token").write_text("from-file\n")
    assert settings("--token-file", str(tmp_path / "token"))["token"] == "from-file"
    with pytest.raises(ValueError, match="token-file: cannot read"):
        settings("--token-file", str(tmp_path / "absent"))
