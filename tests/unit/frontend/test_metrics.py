"""What a front end tells Prometheus: vLLM's names, types and labels, and requests as they were."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.openmetrics.exposition import generate_latest as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.counters import WorkCounters
from gpu_service.engine.messages import Load, Mark, Ready, SamplingSpec, Submit, TierLoad
from gpu_service.frontend.dispatch import Update
from gpu_service.frontend.metrics import FrontendMetrics, token_bounds
from gpu_service.frontend.observed import count_errors, observe
from gpu_service.scheduling.decision import Decision
from gpu_service.scheduling.plan import (
    DecodeRow,
    IterationPlan,
    Migration,
    Mode,
    PrefillRow,
    SubBatch,
    SweepResult,
    Tier,
)
from gpu_service.scheduling.predictor import Phases
from gpu_service.scheduling.steering import Accounts
from neo_common.errors import Reason, ServiceError
from neo_common.tracing import Attribute, Span
from protos.neo.v1 import inference_pb2 as inference
from protos.neo.v1 import types_pb2 as types

LISTED = Path(__file__).resolve().parents[3] / "deploy/observability/vllm_metrics.yaml"
BLOCKS = np.arange(3, dtype=np.int32)


def load(**changes: Any) -> Load:
    values: dict[str, Any] = {
        "host_tier_state": "up",
        "gpu": TierLoad(100, 25, 3, 40, cached_blocks=9), "host": TierLoad(200, 150, 2, 7),
        "waiting_requests": 4, "waiting_prompt_tokens": 99, "block_tokens": 16,
        "demotions_total": 5, "promotions_total": 1, "recomputations_total": 2,
        "iterations_total": 11, "iteration_seconds": 0.25, "output_tokens_per_second": 8.0,
        "prefix_query_tokens_total": 90, "prefix_hit_tokens_total": 48,
        "prefix_host_hit_tokens_total": 16,
    }  # fmt: skip
    return Load(**(values | changes))


READY = Ready(
    max_context_tokens=4096, gpu_blocks=100, host_blocks=200, block_tokens=16, device="cpu",
    device_name="", dtype="bfloat16", offload_transport="shm",
    gpu_block_bytes=1024, host_block_bytes=512,
)  # fmt: skip


BLIND: Any = SimpleNamespace(predictor=None)
FORESEEING: Any = SimpleNamespace(
    predictor=object(),
    accounts=Accounts(predicted=Phases(1e3, 2e3, 3e3, 4e3), actual_ms=5e3, error=0.25),
    decision=Decision(way="deferred", rate=3.0, gpu_only_rate=2.0),
)
"""A `Steering` without and with a predictor."""


def plan(mode: Mode, *batches: SubBatch, migrations: tuple[Migration, ...] = ()) -> IterationPlan:
    return IterationPlan(number=1, mode=mode, migrations=migrations, batches=batches)


def row(key: int) -> DecodeRow:
    return DecodeRow(key, 5, 20, BLOCKS)


def chunk(key: int, tier: Tier, tokens: int) -> PrefillRow:
    return PrefillRow(key, tier, 0, tuple(range(tokens)), BLOCKS, True)


def full_metrics() -> FrontendMetrics:
    """After some work of every kind."""
    metrics = FrontendMetrics("tiny", 100)
    metrics.engine.ready(READY, GpuServiceConfig(model="tiny"))
    metrics.engine.load = load()
    work = WorkCounters()
    moved = Migration(1, Tier.HOST, 40, BLOCKS, BLOCKS)
    lost = Migration(2, Tier.GPU, 7, BLOCKS[:1], BLOCKS[:1])
    found = Migration(5, Tier.GPU, 16, BLOCKS[:1], BLOCKS[:1], reuse=True)
    first = SubBatch(prefill=(chunk(1, Tier.GPU, 9),), gpu_decode=(row(2), row(3)))
    work.count(plan(Mode.INLINE, first), SweepResult(), 0.5)
    second = SubBatch(host_decode=(row(4),), streamed=(row(5), row(6)))
    result = SweepResult(lost=frozenset({2}), void=frozenset({4}), host_wait_seconds=0.125)
    work.count(plan(Mode.INLINE, second, migrations=(moved, lost, found)), result, 1.0)
    timed = SweepResult(device_seconds=0.25, waited_seconds=0.0625)
    work.count(plan(Mode.DEFERRED, SubBatch(prefill=(chunk(7, Tier.HOST, 3),))), timed, 2.0)
    metrics.engine.counters = work.report(1.0, 30, FORESEEING, idle=True)
    return metrics


def samples(metrics: FrontendMetrics) -> dict[str, float]:
    text = generate_latest(metrics.registry).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")}
            found["/".join([sample.name, *labels.values()])] = sample.value
    return found


def test_names_types_and_labels_are_vllms() -> None:
    listed = yaml.safe_load(LISTED.read_text())
    expected = {
        name: (entry["type"], set(entry.get("labels", listed["labels"])))
        for name, entry in listed["metrics"].items()
        if entry.get("exported", True)
    }
    seen: dict[str, tuple[str, set[str]]] = {}
    text = generate_latest(full_metrics().registry).decode()
    for family in text_string_to_metric_families(text):
        if family.name.startswith("vllm:") and not family.name.endswith("_created"):
            name = family.name + ("_total" if family.type == "counter" else "")
            names: set[str] = set().union(*(s.labels for s in family.samples))
            seen[name] = (family.type, names - {"le"})
    assert seen == expected
    assert all(entry.get("why") for entry in listed["metrics"].values() if "exported" in entry)


def test_buckets_of_token_counts_follow_the_context() -> None:
    assert token_bounds(100) == (1, 2, 5, 10, 20, 50, 100)
    assert token_bounds(99) == (1, 2, 5, 10, 20, 50)


def test_the_engines_words_are_what_is_served() -> None:
    found = samples(full_metrics())
    expected = {
        "vllm:num_requests_running": 5,
        "vllm:kv_cache_usage_perc": 0.75,
        "vllm:num_preemptions_total": 2,
        "vllm:iteration_tokens_total_count": 3,
        "vllm:iteration_tokens_total_sum": 11 + 3 + 3,
        "vllm:iteration_tokens_total_bucket/8.0": 2,
        "neo_kv_usage_ratio/host": 0.25,
        "neo_kv_used_bytes/gpu": 75 * 1024,
        "neo_kv_used_bytes/host": 50 * 512,
        "neo_decoded_tokens_total/host": 7,
        "neo_migrations_total/demote": 5,
        "neo_iterations_total/gpu_only": 1,
        "neo_iterations_total/inline": 1,
        "neo_mode_seconds_total/deferred": 2.0,
        "neo_prefill_tokens_total/gpu": 9,
        "neo_prefill_tokens_total/host": 3,
        "neo_decode_rows_total/gpu": 2,
        "neo_decode_rows_total/host": 1,
        "neo_decode_rows_total/streamed": 2,
        "neo_migrated_bytes_total/demote": 3 * 512,
        "neo_migrated_tokens_total/promote": 0,
        "neo_migrated_tokens_total/reuse": 16,
        "neo_recompute_avoided_tokens_total": 40,
        "vllm:prefix_cache_queries_total": 90,
        "vllm:prefix_cache_hits_total": 48,
        "neo_prefix_hit_tokens_total/gpu": 32,
        "neo_prefix_hit_tokens_total/host": 16,
        "neo_kv_cached_blocks/gpu": 9,
        "neo_recomputed_tokens_total": 30,
        "neo_void_rows_total": 1,
        "neo_host_wait_seconds_total": 0.125,
        "neo_device_wait_seconds_total": 0.0625,
        "neo_device_busy_seconds_total": 0.5 + 0.875 + 0.25,
        "neo_host_tier_state/up": 1,
        "neo_predicted_seconds_total/sweep": 4.0,
        "neo_predicted_seconds_total/cpu": 2.0,
        "neo_actual_seconds_total": 5.0,
        "neo_prediction_error_ratio": 0.25,
        "neo_decision/deferred": 1,
        "neo_decision/inline": 0,
        "neo_decision_tokens_per_second/decision": 3000,
        "neo_decision_tokens_per_second/gpu_only": 2000,
        "neo_host_tier_state/degraded": 0,
    }
    assert {name: found.get(name) for name in expected} == expected


def test_reports_are_rare_and_the_last_one_is_not_lost() -> None:
    work = WorkCounters()
    batch = plan(Mode.INLINE, SubBatch(gpu_decode=(row(1),)))
    work.count(batch, SweepResult(), 0.1)
    assert work.report(1.0, 0, BLIND, idle=False) is not None
    work.count(batch, SweepResult(), 0.1)
    assert work.report(1.05, 0, BLIND, idle=False) is None
    last = work.report(1.06, 0, BLIND, idle=True)
    assert last is not None
    assert last.iterations["gpu_only"] == 2
    assert last.foresight is None
    assert work.report(2.0, 0, BLIND, idle=True) is None


class Traced(Span):
    """Keeps what it is told."""

    recording = True
    trace_id = "ab"

    def __init__(self) -> None:
        self.children: list[Any] = []
        self.attributes: dict[str, Any] = {}

    def child(
        self, name: str, start: float, end: float, attributes: Mapping[str, Attribute]
    ) -> None:
        self.children.append((name, start, end, attributes))

    def set(self, **attributes: Attribute) -> None:
        self.attributes |= attributes


def submit(n: int = 1) -> Submit:
    sampling = SamplingSpec(max_tokens=9, n=n)
    return Submit(request_id="a", prompt_token_ids=[1, 2, 3], sampling=sampling, arrival=0.0)


def update(*choices: inference.Choice, usage: types.Usage | None = None) -> Update:
    return Update(list(choices), usage=usage)


def test_a_request_from_arrival_to_usage() -> None:
    metrics, clock = FrontendMetrics("tiny", 100), iter([1.0, 1.5, 2.5])
    span = Traced()
    with observe(metrics, submit(), span) as observed:
        observed._clock = lambda: next(clock)
        observed.take_in(update(inference.Choice(token_ids=[1])))
        observed.take_in(update(inference.Choice(token_ids=[2, 3])))
        last = inference.Choice(token_ids=[4], finish_reason=types.FINISH_REASON_LENGTH)
        usage = types.Usage(
            prompt_tokens=3, completion_tokens=4, queue_seconds=0.5, ttft_seconds=0.75
        )
        marks = [Mark("decode", 0.75, 2.5, {"by": "host", "tokens": 4})]
        observed.take_in(Update([last], usage=usage, marks=marks))
    assert span.children == [
        ("queue", 0.0, 0.5, {}),
        ("decode", 0.75, 2.5, {"neo.by": "host", "neo.tokens": 4}),
    ]
    assert span.attributes["gen_ai__usage__output_tokens"] == 4
    found = samples(metrics)
    expected = {
        "vllm:time_to_first_token_seconds_sum": 1.0,
        "vllm:inter_token_latency_seconds_sum": 0.25 + 1.0,
        "vllm:e2e_request_latency_seconds_sum": 2.5,
        "vllm:request_queue_time_seconds_sum": 0.5,
        "vllm:request_prefill_time_seconds_sum": 0.25,
        "vllm:request_decode_time_seconds_sum": 1.75,
        "vllm:request_inference_time_seconds_sum": 2.0,
        "vllm:request_time_per_output_token_seconds_sum": 1.75 / 3,
        "vllm:request_prompt_tokens_sum": 3,
        "vllm:request_generation_tokens_sum": 4,
        "vllm:request_max_num_generation_tokens_sum": 4,
        "vllm:request_params_max_tokens_sum": 9,
        "vllm:prompt_tokens_total": 3,
        "vllm:generation_tokens_total": 4,
        "vllm:request_success_total/length": 1,
        "vllm:request_success_total/abort": 0,
    }
    assert {name: found.get(name) for name in expected} == pytest.approx(expected)
    text = openmetrics(metrics.registry).decode()
    assert '# {trace_id="ab"} 1.0' in text


def test_how_a_request_ends_is_counted_per_choice() -> None:
    metrics = FrontendMetrics("tiny")
    with pytest.raises(ServiceError), count_errors(metrics), observe(metrics, submit(n=2)):
        raise ServiceError(Reason.QUEUE_FULL, "no")

    def leave() -> None:
        stop = inference.Choice(finish_reason=types.FINISH_REASON_STOP)
        with observe(metrics, submit(n=3)) as observed:
            observed.take_in(update(stop))
            raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        leave()
    found = samples(metrics)
    assert found["vllm:request_success_total/error"] == 2
    assert found["vllm:request_success_total/stop"] == 1
    assert found["vllm:request_success_total/abort"] == 2
    assert found["neo_request_errors_total/QUEUE_FULL"] == 1
