"""A client's own deadline, with the real processes."""

from __future__ import annotations

from pathlib import Path

import grpc

from tests.support.load import Job, assert_idle_and_whole, run_job
from tests.support.stack import running_stack, stack_model


async def test_deadline_frees_blocks(tmp_path: Path) -> None:
    """A deadline that passes mid-stream ends the request and gives its blocks back."""
    model = stack_model(tmp_path / "m")
    endless = Job(prompt=tuple(range(3, 40)), output_tokens=3000)
    with running_stack(tmp_path, model, max_context_tokens=4096) as stack:
        answer = await run_job(stack.router.address, endless, seconds=1.0)
        assert answer.error == grpc.StatusCode.DEADLINE_EXCEEDED
        assert answer.tokens
        await assert_idle_and_whole(stack.gpu.address)
