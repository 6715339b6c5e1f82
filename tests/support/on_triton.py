"""Engine cores in Triton's interpreter whose sweeps deal with a real cpu_service."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Submit
from gpu_service.model.model import load_model
from tests.support.engine import Answers, config, local_core, run, triton_core
from tests.support.stack import Service


@contextmanager
def served_core(directory: Path, service: Service, **changes: Any) -> Iterator[EngineCore]:
    """With the engine's settings `changes`."""
    settings = {
        "offload": "auto",
        "max_running_requests": 8,
        "force_migration_every": 3,
        "max_batch_tokens": 24,
        "host_kv_gib": 0.01,
        "sweep_deadline_ms": 30_000,
        **changes,
    }
    made = config(directory, cpu_services=(service.address,), **settings)
    core = triton_core(made, load_model(directory, dtype="float32"))
    try:
        yield core
    finally:
        core.close()


def check_draws(directory: Path, asked: Sequence[Submit], answers: Answers) -> None:
    """Tokens and their log probabilities' are those of the CPU device alone."""
    plain = config(directory, offload="never")
    expected = run(local_core(plain, load_model(directory, dtype="float32")), list(asked))
    for request in asked:
        key = (request.request_id, 0)
        assert answers.tokens[key] == expected.tokens[key]
        assert [x.token_id for x in answers.logprobs[key]] == expected.tokens[key]
