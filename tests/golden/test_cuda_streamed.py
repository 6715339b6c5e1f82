"""Rows that attend on the device over the host's KV, as a CUDA device does it, in Triton's
interpreter and with a real cpu_service: tokens are those of `transformers`."""

from __future__ import annotations

import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import Abort, Submit
from gpu_service.model.model import load_model
from gpu_service.offload.host_tier import HostTierState
from gpu_service.pipeline.cuda import inputs, staging, streamed
from gpu_service.scheduling.plan import Tier
from kernels.cpu import DType
from kernels.gpu import host_exchange
from tests.support.engine import (
    Answers,
    check_empty,
    config,
    greedy,
    local_core,
    run,
    step,
)
from tests.support.models import FAMILIES, greedy_tokens, reference_model
from tests.support.mutants import mutated
from tests.support.offload import cpu_service
from tests.support.on_triton import served_core
from tests.support.stack import Service

OUTPUT = 5
LENGTHS = (1, 30)
streaming = partial(served_core, offload_mode="deferred", streamed_kv_blocks=6)


def requests(**sampling: Any) -> list[Submit]:
    prompts = ([3 + (7 * i + 13 * n) % 250 for i in range(n)] for n in LENGTHS)
    return [greedy(f"r{i}", prompt, OUTPUT, **sampling) for i, prompt in enumerate(prompts)]


class Rows:
    """How many rows ran where."""

    def __init__(self, core: EngineCore) -> None:
        self.streamed = self.host = self.gpu = self.chunks = 0
        core.observe = self._observe

    def _observe(self, plan: Any, result: Any, seconds: float) -> None:
        chunks = (chunk for batch in plan.batches for chunk in batch.prefill)
        self.chunks += sum(chunk.tier is Tier.HOST for chunk in chunks)
        self.streamed += sum(len(batch.streamed) for batch in plan.batches)
        self.host += sum(len(batch.host_decode) for batch in plan.batches)
        self.gpu += sum(len(batch.gpu_decode) for batch in plan.batches)


def check_tokens(directory: Path, asked: list[Submit], answers: Answers) -> None:
    reference = reference_model(directory)
    for request in asked:
        tokens = answers.tokens[request.request_id, 0]
        assert tokens == greedy_tokens(reference, request.prompt_token_ids, len(tokens))


@pytest.mark.parametrize(
    ("family", "every", "blocks"),
    [
        ("mistral", 2, 2),
        pytest.param("llama", 3, 6, marks=pytest.mark.slow),
        *(pytest.param(f, n, 3, marks=pytest.mark.slow) for f in FAMILIES for n in (1, 4)),
    ],
)
def test_tokens_are_those_of_transformers(
    directories: dict[str, Path], service: Service, family: str, every: int, blocks: int
) -> None:
    """Choices change between the GPU tier, the link and the host from sweep to sweep."""
    directory, changes = directories[family], {"force_migration_every": every}
    with streaming(directory, service, streamed_kv_blocks=blocks, **changes) as core:
        rows, asked = Rows(core), requests()
        check_tokens(directory, asked, run(core, asked))
    assert rows.streamed > 0
    assert rows.gpu > 0
    assert (rows.host > 0) == (blocks < 6)


def test_prompts_for_the_host_that_the_gpu_tier_has_no_room_for(
    directories: dict[str, Path], service: Service
) -> None:
    """Their KV leaves layer by layer, and later chunks read it back; the GPU tier has one block."""
    asked = [greedy(f"r{n}", [3 + (7 * i + n) % 250 for i in range(n)], 4) for n in (41, 20)]
    changes = {"gpu_kv_blocks": 9, "force_migration_every": 0, "max_batch_tokens": 17}
    with streaming(directories["mistral"], service, **changes) as core:
        assert core.scheduler.limits.gpu_blocks == 1
        rows = Rows(core)
        check_tokens(directories["mistral"], asked, run(core, asked))
    assert rows.chunks >= 5
    assert rows.streamed + rows.host == 6


def test_draws_on_the_device_and_aborts(directories: dict[str, Path], service: Service) -> None:
    sampling = {"temperature": 0.9, "seed": 3, "repetition_penalty": 1.3, "logprobs": 2}
    kept = requests(**sampling)[1:]
    with streaming(directories["llama"], service, host_kv_gib=0.0002) as core:
        rows, answers = Rows(core), Answers()
        for request in (*kept, greedy("gone", [5] * 25, 30)):
            core.handle(request)
        while not rows.streamed or ("gone", 0) not in answers.tokens:
            step(core, answers)
        core.handle(Abort("gone"))
        while core.scheduler.live_requests or core.scheduler.state.flights:
            step(core, answers)
            core.scheduler.state.check_integrity()
        check_empty(core)
    plain = config(directories["llama"], offload="never")
    expected = run(local_core(plain, load_model(directories["llama"], dtype="float32")), kept)
    for request in kept:
        key = (request.request_id, 0)
        assert answers.tokens[key] == expected.tokens[key]


def test_an_int8_pool(directories: dict[str, Path], service: Service) -> None:
    """The log probabilities are those of `--device cpu`, which reads and writes with other code."""
    directory = directories["llama"]
    prompt = [3 + 7 * i % 250 for i in range(20)]
    asked = [greedy("a", prompt, 4, placement="cpu_preferred", logprobs=0)]
    changes = {"host_kv_dtype": "int8", "force_migration_every": 0}
    with streaming(directory, service, **changes) as core:
        rows, answers = Rows(core), run(core, asked)
    assert rows.streamed == 3  # the prompt draws the first token
    made = config(directory, offload="auto", cpu_services=("local",), streamed_kv_blocks=6)
    model = load_model(directory, dtype="float32")
    told = [torch.tensor([entry.logprob for entry in answers.logprobs["a", 0]])]
    for kind in (DType.INT8, None):
        core = local_core(made, model, host_blocks=16, kv_dtype=kind)
        entries = run(core, asked).logprobs["a", 0]
        told.append(torch.tensor([entry.logprob for entry in entries]))
    ours, theirs, exact = told
    torch.testing.assert_close(ours[1:], theirs[1:], atol=2e-4, rtol=0)
    assert (ours[1:] - exact[1:]).abs().max() > 1e-3


@pytest.mark.slow
def test_a_killed_cpu_service(
    directories: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sweeps that were planned go on over the link: they need the memory alone. Then streamed rows
    wait with the host's, and nobody else does."""
    monkeypatch.setattr(host_exchange, "_MOST_POLLS", 2_000)
    hosts = [greedy(f"h{i}", [9 + i] * 20, 8, placement="cpu_preferred") for i in range(3)]
    changes = {"streamed_kv_blocks": 4, "force_migration_every": 0}
    with (
        cpu_service(tmp_path) as service,
        streaming(directories["llama"], service, **changes) as core,
    ):
        rows, answers = Rows(core), Answers()
        core.handle(greedy("gpu", [7] * 12, 40))
        for request in hosts:
            core.handle(request)
        while rows.streamed < 3 or not rows.host:
            step(core, answers)
        service.signal(signal.SIGKILL)
        while core.host.state is HostTierState.UP:
            step(core, answers)
        step(core, answers)  # what was planned before
        step(core, answers)
        said, before = len(answers.tokens["gpu", 0]), rows.streamed
        for _ in range(3):
            step(core, answers)
        assert rows.streamed == before
        assert len(answers.tokens["gpu", 0]) >= said + 3
        service.wait_exit()
        service.start()
        while core.scheduler.live_requests or core.scheduler.state.flights:
            step(core, answers)
        check_empty(core)
    check_tokens(directories["llama"], hosts, answers)
    assert all(answers.usages[r.request_id].recomputations == 0 for r in hosts)


def test_a_pool_that_cannot_be_reached(
    directories: dict[str, Path], service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Registering it may fail after a restart: rows that need it are computed again."""
    asked = [greedy("a", [4] * 12, 4, placement="cpu_preferred")]
    with streaming(directories["llama"], service, force_migration_every=0) as core:
        rows, answers = Rows(core), Answers()
        core.handle(asked[0])
        while not rows.streamed:
            step(core, answers)
        side = core._runner._host  # type: ignore[attr-defined]
        with monkeypatch.context() as patch:
            patch.setattr(side, "pool", lambda: None)
            step(core, answers)
        while core.scheduler.live_requests:
            step(core, answers)
        check_empty(core)
    check_tokens(directories["llama"], asked, answers)
    assert answers.usages["a"].recomputations == 1


MUTANTS = [
    (staging, "= host[:read], staged[:read]", "= host[:read][::-1], staged[:read]"),
    (staging, "read = blocks_for(known, size)", "read = known // size"),
    (staging, "staged[fresh:], host[fresh:count]", "staged[fresh:], host[:count - fresh]"),
    (streamed, "self._unpack(layer + 2)", "pass"),
]


@pytest.mark.parametrize(("module", "old", "new"), MUTANTS)
def test_what_is_read_or_put_elsewhere_shows(
    directories: dict[str, Path],
    service: Service,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    module: Any,
    old: str,
    new: str,
) -> None:
    mutant = mutated(module, old, new, tmp_path)
    if module is staging:
        monkeypatch.setattr(inputs, "StagedSequences", mutant.StagedSequences)
    else:
        monkeypatch.setattr(
            "gpu_service.pipeline.cuda.forward.StreamedLayers", mutant.StreamedLayers
        )
    asked = [greedy("a", [3 + 7 * i % 250 for i in range(30)], 5, placement="cpu_preferred")]
    with streaming(
        directories["llama"], service, force_migration_every=0, max_batch_tokens=64
    ) as core:
        answers = run(core, asked, steps=40)
    with pytest.raises(AssertionError):
        check_tokens(directories["llama"], asked, answers)
