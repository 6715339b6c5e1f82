"""Metrics of requests as clients see them, under vLLM's names; see `engine_metrics` for the
engine's."""

from __future__ import annotations

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram

from gpu_service.frontend.engine_metrics import EngineCollector
from neo_common.errors import Reason
from neo_common.metrics import service_registry

FIRST_TOKEN_SECONDS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40,
    80, 160, 640, 2560,
)  # fmt: skip
TOKEN_SECONDS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80,
)  # fmt: skip
REQUEST_SECONDS = (
    0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680,
)  # fmt: skip
"""vLLM's, so that quantiles of both can be laid side by side."""
CHOICES = (1, 2, 5, 10, 20)
FINISHED = ("stop", "length", "abort", "error")


def token_bounds(most: int) -> tuple[int, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `most`."""
    powers = (10**exponent for exponent in range(len(str(most))))
    return tuple(m * p for p in powers for m in (1, 2, 5) if m * p <= most)


class _Maker:
    """Makes metrics that have vLLM's labels."""

    def __init__(self, registry: CollectorRegistry, model_name: str) -> None:
        self._registry = registry
        self._labels = {"model_name": model_name, "engine": "0"}

    def histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        names = list(self._labels)
        metric = Histogram(name, text, names, buckets=buckets, registry=self._registry)
        return metric.labels(**self._labels)

    def counter(self, name: str, text: str) -> Counter:
        metric = Counter(name, text, list(self._labels), registry=self._registry)
        return metric.labels(**self._labels)

    def counters(
        self, name: str, text: str, label: str, values: Iterable[str]
    ) -> dict[str, Counter]:
        """One for each value of a further label."""
        metric = Counter(name, text, [*self._labels, label], registry=self._registry)
        return {value: metric.labels(**self._labels, **{label: value}) for value in values}


class FrontendMetrics:
    """One registry per process; nothing global. `engine` is fed by the dispatcher, the rest by
    `Observed`."""

    def __init__(self, model_name: str, max_context_tokens: int = 4096) -> None:
        self.registry = service_registry("gpu_service")
        self.engine = EngineCollector(model_name)
        self.registry.register(self.engine)
        make = _Maker(self.registry, model_name)
        self._make_latencies(make)
        self._make_lengths(make, token_bounds(max_context_tokens))
        self.prompt_tokens = make.counter("vllm:prompt_tokens", "Prompt tokens taken in.")
        self.output_tokens = make.counter("vllm:generation_tokens", "Tokens delivered.")
        self.finished = make.counters(
            "vllm:request_success", "Choices that ended, by why.", "finished_reason", FINISHED
        )
        errors = Counter(
            "neo_request_errors", "Requests that ended with an error, by its reason.",
            ["model_name", "reason"], registry=self.registry,
        )  # fmt: skip
        # All from the start: Prometheus sees no rate in a series that begins with its first error.
        self.errors = {reason: errors.labels(model_name, reason) for reason in Reason}

    def _make_latencies(self, make: _Maker) -> None:
        self.ttft = make.histogram(
            "vllm:time_to_first_token_seconds", "Arrival to first token.", FIRST_TOKEN_SECONDS
        )
        self.itl = make.histogram(
            "vllm:inter_token_latency_seconds", "Between tokens of a choice.", TOKEN_SECONDS
        )
        self.tpot = make.histogram(
            "vllm:request_time_per_output_token_seconds", "A request's mean.", TOKEN_SECONDS
        )
        self.e2e = make.histogram(
            "vllm:e2e_request_latency_seconds", "Arrival to last token.", REQUEST_SECONDS
        )
        self.queue = make.histogram(
            "vllm:request_queue_time_seconds", "Arrival to first chunk.", REQUEST_SECONDS
        )
        self.prefill = make.histogram(
            "vllm:request_prefill_time_seconds", "First chunk to first token.", REQUEST_SECONDS
        )
        self.decode = make.histogram(
            "vllm:request_decode_time_seconds", "First token to last one.", REQUEST_SECONDS
        )
        self.inference = make.histogram(
            "vllm:request_inference_time_seconds", "First chunk to last token.", REQUEST_SECONDS
        )

    def _make_lengths(self, make: _Maker, bounds: tuple[int, ...]) -> None:
        self.prompt_length = make.histogram(
            "vllm:request_prompt_tokens", "Prompt's tokens.", bounds
        )
        self.output_length = make.histogram(
            "vllm:request_generation_tokens", "Tokens of a request's choices.", bounds
        )
        self.max_output = make.histogram(
            "vllm:request_max_num_generation_tokens", "Longest choice of a request.", bounds
        )
        self.asked_n = make.histogram("vllm:request_params_n", "Choices asked for.", CHOICES)
        self.asked_tokens = make.histogram(
            "vllm:request_params_max_tokens", "max_tokens asked for.", bounds
        )
