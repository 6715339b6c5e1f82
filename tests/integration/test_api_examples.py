"""The examples of docs/api.md, as a reader would run them: at a gpu_service, through the router."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stack import REPO, Stack, running_stack, stack_model

PAGE = (REPO / "docs/api.md").read_text()
EXAMPLES = re.findall(r"^## (.+?)$.*?^```python\n(.*?)^```", PAGE, re.M | re.S)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    model = stack_model(tmp_path_factory.mktemp("model"))
    with running_stack(tmp_path_factory.mktemp("stack"), model) as started:
        yield started


def test_there_are_examples() -> None:
    assert len(EXAMPLES) == PAGE.count("```python")


@pytest.mark.parametrize("where", ["gpu", "router"])
@pytest.mark.parametrize("code", [pytest.param(code, id=title) for title, code in EXAMPLES])
def test_example(stack: Stack, where: str, code: str, tmp_path: Path) -> None:
    address = stack.gpu.address if where == "gpu" else stack.router.address
    script = tmp_path / "example.py"
    # The longer names first: the shorter one is a part of them.
    for name, value in (
        ("HTTP_URL", stack.http),
        ("GPU_ADDRESS", stack.gpu.address),
        ("ROUTER_ADDRESS", stack.router.address),
        ("ADDRESS", address),
    ):
        code = code.replace(name, repr(value))
    script.write_text(code)
    done = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, cwd=REPO, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
