"""The client where nothing else is: a clean environment without torch."""

from __future__ import annotations

import asyncio
import subprocess
import venv
from pathlib import Path

import pytest

from tests.support.fake_backend import fake_backends
from tests.support.stack import REPO

SCRIPT = """
import asyncio, importlib.util, sys

for name in ("torch", "transformers", "tokenizers"):
    assert importlib.util.find_spec(name) is None, name

import grpc
from neo_client import AsyncClient, Client, Retries, Sampling
from neo_common.errors import ErrorDetails

address = sys.argv[1]
with Client(address, retries=Retries(generations=2)) as client:
    with client.stream("hi", sampling=Sampling(max_tokens=3), deadline_seconds=30) as messages:
        print("".join(delta.text for message in messages for delta in message.deltas))
    try:
        client.tokenize("")
    except grpc.RpcError as error:
        assert ErrorDetails(error) is not None

async def main():
    async with AsyncClient(f"{address},{address}") as client:
        print((await client.generate("hi")).model)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_it_installs_and_calls_without_torch(tmp_path: Path) -> None:
    """From the source tree, as `pip install neo-serving` would: the extension is built."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv/bin/python"
    (tmp_path / "script.py").write_text(SCRIPT)

    def run(*command: str | Path) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    await asyncio.to_thread(run, python, "-m", "pip", "install", "--quiet", REPO)
    async with fake_backends(1) as (a,):
        said = await asyncio.to_thread(run, python, tmp_path / "script.py", a.address)
    assert said.split() == ["a0", "a1", "a2", "a"]
    assert "generate" in await asyncio.to_thread(run, tmp_path / "venv/bin/neo", "--help")
    for service in ("router", "cpu_service"):
        await asyncio.to_thread(run, python, "-m", service, "--help")
