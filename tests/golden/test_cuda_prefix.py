"""KV that is found instead of computed, as a CUDA device does it, in Triton's interpreter: sweeps
are decided ahead of what is known to be there, and tokens are those of `transformers`."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from gpu_service.engine.core import EngineCore
from gpu_service.model.model import load_model
from gpu_service.scheduling.plan import IterationPlan, SweepResult, Tier
from kernels.gpu import host_exchange
from tests.golden.test_cuda_runner import count_overlaps
from tests.support.engine import Answers, check_empty, config, greedy, run, step, triton_core
from tests.support.models import greedy_tokens, reference_model, tiny_model_dir
from tests.support.offload import cpu_service
from tests.support.stack import Service

OUTPUT = 4
OPENING = [3 + 7 * i % 250 for i in range(36)]
"""Two full blocks that all conversations begin with, and a bit of a third one."""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model_dir(tmp_path_factory.mktemp("model"), "llama", head_dim=16)


@contextmanager
def core(directory: Path, addresses: Sequence[str], **changes: Any) -> Iterator[EngineCore]:
    values = {"offload": "auto", "max_batch_tokens": 24, "host_kv_gib": 0.01, **changes}
    made = config(
        directory, cpu_services=tuple(addresses), max_running_requests=8, prefix_caching=True,
        sweep_deadline_ms=30_000, **values,
    )  # fmt: skip
    host_blocks = 64 if addresses == ["local"] and made.offload != "never" else 0
    built = triton_core(made, load_model(directory, dtype="float32"), host_blocks=host_blocks)
    try:
        yield built
    finally:
        built.close()


class Prompts:
    """Where the first rows of prompts began, by tier."""

    def __init__(self, core: EngineCore) -> None:
        self.began: list[tuple[Tier, int]] = []
        self._seen: set[int] = set()
        core.observe = self._observe

    def _observe(self, plan: IterationPlan, result: SweepResult, seconds: float) -> None:
        for chunk in (chunk for batch in plan.batches for chunk in batch.prefill):
            if chunk.key not in self._seen:
                self._seen.add(chunk.key)
                self.began.append((chunk.tier, chunk.start))


class Talk:
    """Conversations, each turn with all that was said before."""

    def __init__(self, core: EngineCore, directory: Path, count: int = 2) -> None:
        self._core = core
        self._reference = reference_model(directory)
        self._said = {f"c{n}": [*OPENING, 50 + n] for n in range(count)}
        self._there = dict.fromkeys(self._said, 0)
        """Tokens in full blocks that the turn before has left."""
        self._turns = 0

    def turn(self, placement: str = "auto", *, exactly: bool = True) -> Answers:
        self._turns += 1
        requests = {
            name: greedy(f"{name}-{self._turns}", said, OUTPUT, placement=placement)
            for name, said in self._said.items()
        }
        answers = run(self._core, list(requests.values()))
        for name, said in self._said.items():
            request_id = requests[name].request_id
            usage, tokens = answers.usages[request_id], answers.tokens[request_id, 0]
            assert tokens == greedy_tokens(self._reference, said, OUTPUT)
            if exactly and self._turns > 1:
                assert usage.prefix_hit_tokens == self._there[name]
            self._there[name] = (len(said) + OUTPUT - 1) // 16 * 16
            said += [*tokens, 99, *range(20, 28)]
        return answers


@pytest.mark.slow
@pytest.mark.parametrize(
    "how",
    [
        {"offload": "never"},
        {"force_migration_every": 3},
        {"gpu_kv_blocks": 5, "max_batch_tokens": 64},
    ],
    ids=["never", "forced", "small-pool"],
)
def test_turns_find_the_one_before(directory: Path, how: dict[str, Any]) -> None:
    with core(directory, ["local"], **how) as built:
        ahead = count_overlaps(built)
        talk = Talk(built, directory)
        for _ in range(2):
            talk.turn(exactly="gpu_kv_blocks" not in how)
        found = built.scheduler.state.prefix_tokens
    assert found.found > 0
    if how.get("offload") == "never":
        assert sum(count > 0 for count in ahead) >= 2 * (OUTPUT - 1)


@pytest.mark.slow
def test_blocks_on_the_host_come_to_the_gpu(directory: Path, service: Service) -> None:
    """Prompts start on the GPU tier alone; rows that began there went down and ended there."""
    changes = {"offload_mode": "deferred", "gpu_kv_blocks": 5}
    with core(directory, [service.address], **changes) as built:
        talk = Talk(built, directory)
        talk.turn("cpu_preferred")
        answers = talk.turn("cpu_preferred", exactly=False)
    usages = answers.usages.values()
    assert sum(usage.prefix_hit_tokens for usage in usages) > 0
    assert sum(usage.cached_host_tokens for usage in usages) > 0


def test_prompts_on_the_host_start_behind_what_is_there(directory: Path, service: Service) -> None:
    """Their chunks read it through staging, like their own earlier chunks, and so do their rows."""
    changes = {"offload_mode": "deferred", "streamed_kv_blocks": 6}
    with core(directory, [service.address], **changes) as built:
        prompts, talk = Prompts(built), Talk(built, directory)
        talk.turn("cpu_preferred")
        answers = talk.turn("cpu_preferred")
    assert prompts.began[-2:] == [(Tier.HOST, 32), (Tier.GPU, 32)]
    for usage in answers.usages.values():
        assert usage.cached_host_tokens == usage.prefix_hit_tokens == 32


@pytest.mark.slow
def test_blocks_outlive_the_cpu_service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A killed one gets the pool's memory back, and with it what prompts find there; a row that was
    under way goes on where it was."""
    monkeypatch.setattr(host_exchange, "_MOST_POLLS", 2_000)
    directory = tiny_model_dir(tmp_path / "m", "llama", head_dim=16, num_hidden_layers=2)
    changes = {"offload_mode": "deferred", "gpu_kv_blocks": 5}
    with cpu_service(tmp_path) as service, core(directory, [service.address], **changes) as built:
        talk, answers = Talk(built, directory, count=1), Answers()
        talk.turn("cpu_preferred")
        said = [*OPENING, 77]
        built.handle(greedy("killed", said, OUTPUT, placement="cpu_preferred"))
        while not built.scheduler.state.flights:
            step(built, answers)
        service.signal(signal.SIGKILL)
        service.wait_exit()
        service.start()
        while built.scheduler.live_requests or built.scheduler.state.flights:
            step(built, answers)
        check_empty(built)
        again = talk.turn("cpu_preferred")
    assert answers.tokens["killed", 0] == greedy_tokens(reference_model(directory), said, OUTPUT)
    killed = answers.usages["killed"]
    assert killed.recomputations == 0
    assert killed.host_tokens > 0
    assert sum(usage.cached_host_tokens for usage in again.usages.values()) > 0
