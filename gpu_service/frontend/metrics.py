"""Metrics of a gpu_service: vLLM's names for what vLLM has, `neo_*` for the tiers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from gpu_service.engine.messages import Load, TierLoad

_SECONDS = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class FrontendMetrics:
    """One registry per process; nothing global."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        labels = {"model_name": model_name}

        def gauge(name: str, text: str, *extra: str) -> Gauge:
            return Gauge(name, text, ["model_name", *extra], registry=self.registry)

        def histogram(name: str, text: str) -> Histogram:
            metric = Histogram(name, text, ["model_name"], buckets=_SECONDS, registry=self.registry)
            return metric.labels(**labels)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model_name"], registry=self.registry).labels(**labels)

        self._labels = labels
        self._running = gauge("vllm:num_requests_running", "Choices that run").labels(**labels)
        self._waiting = gauge("vllm:num_requests_waiting", "Choices that wait").labels(**labels)
        self._usage = gauge("vllm:kv_cache_usage_perc", "GPU KV in use, 0 to 1").labels(**labels)
        self.ttft = histogram("vllm:time_to_first_token_seconds", "Arrival to first token")
        self.itl = histogram("vllm:inter_token_latency_seconds", "Between tokens of a choice")
        self.e2e = histogram("vllm:e2e_request_latency_seconds", "Arrival to last token")
        self.prompt_tokens = counter("vllm:prompt_tokens", "Prompt tokens of finished requests")
        self.output_tokens = counter("vllm:generation_tokens", "Tokens delivered")
        self._tier_usage = gauge("neo_kv_usage_ratio", "KV blocks in use, 0 to 1", "tier")
        self._tier_running = gauge("neo_running_requests", "Choices by tier", "tier")
        self._tier_tokens = gauge("neo_decoded_tokens", "Tokens since start by tier", "tier")
        self._migrations = gauge("neo_migrations", "Moves between tiers since start", "direction")
        self._recomputations = gauge("neo_recomputations", "KV computed again").labels(**labels)
        self._iteration = gauge("neo_iteration_seconds", "Moving average").labels(**labels)
        self._host_up = gauge("neo_host_tier_up", "1 while the host tier is up").labels(**labels)

    def observe_load(self, load: Load) -> None:
        tiers = {"gpu": load.gpu, "host": load.host}
        self._running.set(sum(tier.running_requests for tier in tiers.values()))
        self._waiting.set(load.waiting_requests)
        self._usage.set(_used(load.gpu))
        for name, tier in tiers.items():
            labels = {**self._labels, "tier": name}
            self._tier_usage.labels(**labels).set(_used(tier))
            self._tier_running.labels(**labels).set(tier.running_requests)
            self._tier_tokens.labels(**labels).set(tier.tokens_total)
        for direction, count in (
            ("demote", load.demotions_total),
            ("promote", load.promotions_total),
        ):
            self._migrations.labels(**self._labels, direction=direction).set(count)
        self._recomputations.set(load.recomputations_total)
        self._iteration.set(load.iteration_seconds)
        self._host_up.set(load.host_tier_state == "up")


def _used(tier: TierLoad) -> float:
    return 1 - tier.free_blocks / tier.total_blocks if tier.total_blocks else 0.0
