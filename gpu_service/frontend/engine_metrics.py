"""What the engine core reports, as Prometheus metrics: made at each scrape from its newest words,
so that nothing is done per token. vLLM's names for what vLLM has, `neo_*` for the tiers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.messages import (
    ITERATION_TOKEN_BOUNDS,
    EngineCounters,
    Foresight,
    Load,
    Ready,
    TierLoad,
)
from neo_common.metrics import cumulative

MODES = ("gpu_only", "inline", "asymmetric", "deferred")
HOST_STATES = ("off", "up", "degraded", "lost")


class EngineCollector(Collector):
    """The dispatcher sets `load` and `counters`; None until the engine has said something."""

    def __init__(self, model_name: str) -> None:
        self.load: Load | None = None
        self.counters: EngineCounters | None = None
        self._model = model_name
        self._ready: Ready | None = None
        self._cache_info: dict[str, str] = {}

    def ready(self, ready: Ready, config: GpuServiceConfig) -> None:
        """The engine has its pools."""
        self._ready = ready
        self._cache_info = {
            "engine": "0",
            "block_size": str(ready.block_tokens),
            "num_gpu_blocks": str(ready.gpu_blocks),
            "num_cpu_blocks": str(ready.host_blocks),
            "gpu_memory_utilization": str(config.gpu_memory_utilization),
            "cache_dtype": ready.dtype,
        }

    def collect(self) -> Iterator[Metric]:
        if self._ready is not None:
            info = GaugeMetricFamily(
                "vllm:cache_config_info", "Sizes of the pools.", labels=list(self._cache_info)
            )
            info.add_metric(list(self._cache_info.values()), 1)
            yield info
        if self.load is not None:
            yield from self._of_load(self.load)
        if self.counters is not None:
            yield from self._of_counters(self.counters)

    def _of_load(self, load: Load) -> Iterator[Metric]:
        tiers = {"gpu": load.gpu, "host": load.host}
        running = sum(tier.running_requests for tier in tiers.values())
        yield self._vllm("vllm:num_requests_running", "Choices that run.", running)
        yield self._vllm("vllm:num_requests_waiting", "Requests that wait.", load.waiting_requests)
        yield self._vllm("vllm:kv_cache_usage_perc", "GPU KV in use, 0 to 1.", _used(load.gpu))
        yield self._vllm(
            "vllm:num_preemptions", "KV thrown away, to be computed again.",
            load.recomputations_total, counter=True,
        )  # fmt: skip
        yield self._vllm(
            "vllm:prefix_cache_queries", "Prompt tokens that were looked up.",
            load.prefix_query_tokens_total, counter=True,
        )  # fmt: skip
        yield self._vllm(
            "vllm:prefix_cache_hits", "Prompt tokens whose KV was there.",
            load.prefix_hit_tokens_total, counter=True,
        )  # fmt: skip
        gauges: dict[str, tuple[str, str, Mapping[str, float]]] = {
            "neo_kv_usage_ratio": (
                "KV blocks in use, 0 to 1.", "tier", {k: _used(v) for k, v in tiers.items()}
            ),
            "neo_kv_blocks": (
                "KV blocks.", "tier", {k: v.total_blocks for k, v in tiers.items()}
            ),
            "neo_kv_cached_blocks": (
                "Free KV blocks that can be found by their contents.", "tier",
                {k: v.cached_blocks for k, v in tiers.items()},
            ),
            "neo_kv_used_bytes": ("KV in use.", "tier", self._used_bytes(tiers)),
            "neo_running_requests": (
                "Choices by tier.", "tier", {k: v.running_requests for k, v in tiers.items()}
            ),
            "neo_host_tier_state": (
                "1 for the state that the host tier is in.", "state",
                {state: state == load.host_tier_state for state in HOST_STATES},
            ),
        }  # fmt: skip
        for name, (text, label, values) in gauges.items():
            yield self._labelled(GaugeMetricFamily, name, text, label, values)
        single = {
            "neo_iteration_seconds": ("Moving average.", load.iteration_seconds),
            "neo_output_tokens_per_second": ("Moving average.", load.output_tokens_per_second),
            "neo_waiting_prompt_tokens": ("Prompts in the queue.", load.waiting_prompt_tokens),
        }
        for name, (text, value) in single.items():
            yield self._labelled(GaugeMetricFamily, name, text, "", {"": value})
        yield self._labelled(
            CounterMetricFamily, "neo_decoded_tokens", "Tokens by the tier that attended.", "tier",
            {name: tier.tokens_total for name, tier in tiers.items()},
        )  # fmt: skip
        host_hits = load.prefix_host_hit_tokens_total
        yield self._labelled(
            CounterMetricFamily, "neo_prefix_hit_tokens", "Prompt tokens found, by tier.", "tier",
            {"gpu": load.prefix_hit_tokens_total - host_hits, "host": host_hits},
        )  # fmt: skip
        moves = {"demote": load.demotions_total, "promote": load.promotions_total}
        yield self._labelled(
            CounterMetricFamily, "neo_migrations", "Moves between tiers.", "direction", moves
        )

    def _of_counters(self, it: EngineCounters) -> Iterator[Metric]:
        assert self._ready is not None, "it says so first"
        bytes_moved = {k: v * self._ready.host_block_bytes for k, v in it.moved_blocks.items()}
        labelled: dict[str, tuple[str, str, Mapping[str, float]]] = {
            "neo_iterations": ("Sweeps by mode.", "mode", it.iterations),
            "neo_mode_seconds": ("Time of sweeps by mode.", "mode", it.seconds),
            "neo_prefill_tokens": ("Prompt tokens computed, by tier.", "tier", it.prefill_tokens),
            "neo_decode_rows": ("Decode rows, by who attends.", "kind", it.decode_rows),
            "neo_migrated_tokens": ("KV moved.", "direction", it.moved_tokens),
            "neo_migrated_bytes": ("KV moved over the link.", "direction", bytes_moved),
        }
        for name, (text, label, values) in labelled.items():
            yield self._labelled(CounterMetricFamily, name, text, label, values)
        plain = {
            "neo_recompute_avoided_tokens": (
                "KV that was moved to the host where an engine without one throws it away.",
                it.moved_tokens["demote"],
            ),
            "neo_recomputed_tokens": ("KV thrown away.", it.recomputed_tokens),
            "neo_void_rows": ("Rows repeated after a stall or without memory.", it.void_rows),
            "neo_host_wait_seconds": ("Engine waits for the host tier.", it.host_wait_seconds),
            "neo_device_wait_seconds": ("Engine waits for the device.", it.device_wait_seconds),
            "neo_device_busy_seconds": ("Device at work on sweeps.", it.device_busy_seconds),
        }
        for name, (text, value) in plain.items():
            yield self._labelled(CounterMetricFamily, name, text, "", {"": value})
        if it.foresight is not None:
            yield from self._of_foresight(it.foresight)
        sizes = HistogramMetricFamily(
            "vllm:iteration_tokens_total",
            "Tokens of an iteration.",
            labels=["model_name", "engine"],
        )
        buckets = cumulative(ITERATION_TOKEN_BOUNDS, it.iteration_sizes)
        sizes.add_metric([self._model, "0"], buckets, sum_value=it.iteration_tokens)
        yield sizes

    def _of_foresight(self, it: Foresight) -> Iterator[Metric]:
        yield self._labelled(
            CounterMetricFamily, "neo_predicted_seconds", "Predicted time of sweeps.",
            "part", it.predicted_seconds,
        )  # fmt: skip
        yield self._labelled(
            CounterMetricFamily, "neo_actual_seconds", "Time that the same sweeps took.", "",
            {"": it.actual_seconds},
        )  # fmt: skip
        yield self._labelled(
            GaugeMetricFamily, "neo_prediction_error_ratio", "Moving average, 0 to 1.", "",
            {"": it.error},
        )  # fmt: skip
        if it.mode:
            yield self._labelled(
                GaugeMetricFamily, "neo_decision", "1 for the mode that is decided on.", "mode",
                {mode: mode == it.mode for mode in MODES},
            )  # fmt: skip
            yield self._labelled(
                GaugeMetricFamily, "neo_decision_tokens_per_second", "What is predicted.", "of",
                {"decision": it.tokens_per_second, "gpu_only": it.gpu_only_tokens_per_second},
            )  # fmt: skip

    def _used_bytes(self, tiers: Mapping[str, TierLoad]) -> dict[str, float]:
        assert self._ready is not None, "it says so first"
        sizes = {"gpu": self._ready.gpu_block_bytes, "host": self._ready.host_block_bytes}
        return {k: (v.total_blocks - v.free_blocks) * sizes[k] for k, v in tiers.items()}

    def _vllm(self, name: str, text: str, value: float, *, counter: bool = False) -> Metric:
        kind = CounterMetricFamily if counter else GaugeMetricFamily
        family = kind(name, text, labels=["model_name", "engine"])
        family.add_metric([self._model, "0"], value)
        return family

    def _labelled(
        self,
        kind: type[CounterMetricFamily] | type[GaugeMetricFamily],
        name: str,
        text: str,
        label: str,
        values: Mapping[str, float],
    ) -> Metric:
        """label: "" where the model's is the only one."""
        family = kind(name, text, labels=["model_name", *([label] if label else [])])
        for key, value in values.items():
            family.add_metric([self._model, *([key] if label else [])], value)
        return family


def _used(tier: TierLoad) -> float:
    return 1 - tier.free_blocks / tier.total_blocks if tier.total_blocks else 0.0
