"""When somebody should look. What to do then is in docs/alerts.md, one section for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

RUNBOOK = "docs/alerts.md"


@dataclass(frozen=True)
class Alert:
    """Fires when `value` `is_` for `minutes`. `value` alone has data whenever the system runs,
    unless `silent` says why not: a test asks a live system."""

    name: str
    value: str
    is_: str
    """Such as "> 0.5"; "" where the value itself is the condition."""
    minutes: int
    severity: str
    """`page`: somebody must look now. `ticket`: in working hours."""
    summary: str
    """May use {{ $labels.x }} and {{ $value }}."""
    silent: str = ""

    def render(self) -> dict[str, Any]:
        return {
            "alert": self.name,
            "expr": f"{self.value} {self.is_}".strip(),
            "for": f"{self.minutes}m",
            "labels": {"severity": self.severity},
            "annotations": {
                "summary": self.summary,
                "runbook_url": f"{RUNBOOK}#{self.name.lower()}",
            },
        }


def _quantile(q: float, histogram: str) -> str:
    return f"histogram_quantile({q}, sum by (le, model_name) (rate({histogram}_bucket[5m])))"


OURS = (
    "INTERNAL_ERROR|ENGINE_LOST|HOST_TIER_LOST|NUMERICAL|OUT_OF_MEMORY|BACKEND_LOST|LAYOUT_MISMATCH"
)
"""Reasons that no client can be blamed for."""
SERVING = 'sum by (job, instance) (neo_router_backend_state{state=~"up|suspect"})'

ALERTS = (
    Alert(
        "NeoRouterGone", 'absent(neo_build_info{service="router"})', "", 2, "page",
        "No router is scraped: clients cannot reach anything.",
        silent="empty while there is one",
    ),
    Alert(
        "NeoEngineGone", 'absent(neo_build_info{service="gpu_service"})', "", 2, "page",
        "No gpu_service is scraped.",
        silent="empty while there is one",
    ),
    Alert(
        "NeoNoBackend", SERVING, "== 0", 1, "page",
        "Router {{ $labels.instance }} has no backend that can take calls.",
    ),
    Alert(
        "NeoBackendAway",
        'max by (job, instance, backend) (neo_router_backend_state{state=~"suspect|down"})',
        "== 1", 5, "ticket",
        "Router {{ $labels.instance }} cannot rely on backend {{ $labels.backend }}.",
    ),
    Alert(
        "NeoHostTierAway",
        'max by (job, instance, model_name) (neo_host_tier_state{state=~"degraded|lost"})',
        "== 1", 1, "page",
        "Engine {{ $labels.instance }} has lost its cpu_service: requests on the host tier wait.",
    ),
    Alert(
        "NeoEngineStuck",
        "(sum by (job, instance, model_name) (rate(neo_iterations_total[2m])) and "
        "sum by (job, instance, model_name) (vllm:num_requests_running) > 0)",
        "== 0", 2, "page",
        "Engine {{ $labels.instance }} has running requests and does no sweeps.",
        silent="empty while nothing runs",
    ),
    Alert(
        "NeoRestarts",
        "max by (job, instance, service) (changes(process_start_time_seconds[30m]) "
        "* on (job, instance) group_left (service) neo_build_info)",
        "> 2", 1, "ticket",
        "{{ $labels.service }} {{ $labels.instance }} has restarted {{ $value }} times in 30 "
        "minutes.",
    ),
    Alert(
        "NeoErrors",
        f'sum by (model_name) (rate(neo_request_errors_total{{reason=~"{OURS}"}}[5m])) / '
        "sum by (model_name) (rate(vllm:request_success_total[5m]))",
        "> 0.01", 5, "page",
        "{{ $value | humanizePercentage }} of the requests for {{ $labels.model_name }} fail.",
    ),
    Alert(
        "NeoRefusing",
        'sum by (model_name) (rate(neo_request_errors_total{reason=~"QUEUE_FULL|OVERLOADED"}[5m]))',
        "> 0", 5, "ticket",
        "Requests for {{ $labels.model_name }} are refused: the queue is full.",
    ),
    Alert(
        "NeoSlowFirstToken", _quantile(0.95, "vllm:time_to_first_token_seconds"), "> 10", 10,
        "ticket",
        "One request in 20 for {{ $labels.model_name }} waits {{ $value | humanizeDuration }} for "
        "its first token.",
    ),
    Alert(
        "NeoLongQueue", _quantile(0.95, "vllm:request_queue_time_seconds"), "> 10", 10, "ticket",
        "One request in 20 for {{ $labels.model_name }} queues {{ $value | humanizeDuration }}.",
    ),
    Alert(
        "NeoKvFull",
        "min by (job, instance, model_name) (neo_kv_usage_ratio and (neo_kv_blocks > 0))",
        "> 0.95", 10, "ticket",
        "Engine {{ $labels.instance }}: every tier is full.",
    ),
    Alert(
        "NeoRecomputing",
        "sum by (job, instance, model_name) (rate(neo_recomputed_tokens_total[10m])) / "
        "sum by (job, instance, model_name) (rate(neo_prefill_tokens_total[10m]))",
        "> 0.1", 10, "ticket",
        "Engine {{ $labels.instance }} computes {{ $value | humanizePercentage }} of its prompts "
        "a second time.",
    ),
    Alert(
        "NeoMigrationThrash",
        "sum by (job, instance, model_name) (rate(neo_migrated_tokens_total[10m])) / "
        "sum by (job, instance, model_name) (rate(neo_decoded_tokens_total[10m]))",
        "> 50", 10, "ticket",
        "Engine {{ $labels.instance }} moves {{ $value | humanize }} tokens of KV for each one it "
        "decodes.",
    ),
    Alert(
        "NeoHostStalls", "sum by (job, instance, model_name) (rate(neo_void_rows_total[10m]))",
        "> 0.1", 10, "ticket",
        "Engine {{ $labels.instance }} repeats rows: its cpu_service answers too late.",
    ),
    Alert(
        "NeoPredictionOff", "max by (job, instance, model_name) (neo_prediction_error_ratio)",
        "> 0.5", 15, "ticket",
        "Engine {{ $labels.instance }} mispredicts its sweeps by "
        "{{ $value | humanizePercentage }}.",
    ),
    Alert(
        "NeoHostBound",
        "sum by (job, instance, model_name) (rate(neo_host_wait_seconds_total[10m])) / "
        "sum by (job, instance, model_name) (rate(neo_mode_seconds_total[10m]))",
        "> 0.5", 15, "ticket",
        "Engine {{ $labels.instance }} spends {{ $value | humanizePercentage }} of its sweeps "
        "waiting for CPU attention.",
    ),
)  # fmt: skip


def rules() -> dict[str, Any]:
    return {"groups": [{"name": "neo-serving", "rules": [alert.render() for alert in ALERTS]}]}
