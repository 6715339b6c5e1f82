"""What is on the dashboards."""

from __future__ import annotations

from deploy.observability.panels import Dashboard, Panel, Query, Row

MODEL = '{model_name=~"$model"}'
HOST = '{instance=~"$instance"}'
ROUTER = '{instance=~"$instance"}'


def rate(metric: str, selector: str = MODEL) -> str:
    return f"rate({metric}{selector}[$__rate_interval])"


def by(label: str, expression: str) -> str:
    return f"sum by ({label}) ({expression})"


def quantiles(histogram: str, selector: str = MODEL) -> tuple[Query, ...]:
    buckets = by("le", rate(f"{histogram}_bucket", selector))
    return tuple(
        Query(f"histogram_quantile({q}, {buckets})", f"p{100 * q:g}") for q in (0.5, 0.95, 0.99)
    )


def one(expression: str, legend: str) -> tuple[Query, ...]:
    return (Query(expression, legend),)


def _rates(metric: str, label: str, selector: str = MODEL) -> tuple[Query, ...]:
    """A line for each value of the label."""
    return one(by(label, rate(metric, selector)), f"{{{{{label}}}}}")


def _processes(value: str) -> tuple[Query, ...]:
    named = f"{value} * on (job, instance) group_left (service) neo_build_info"
    return one(f"sum by (service, instance) ({named})", "{{service}} {{instance}}")


OVERVIEW = Dashboard(
    "neo-overview",
    "NEO Serving: requests",
    (("model", "label_values(vllm:num_requests_running, model_name)"),),
    (
        Row(
            "Now",
            (
                Panel(
                    "Running", one(f"sum(vllm:num_requests_running{MODEL})", "choices"), kind="stat"
                ),
                Panel(
                    "Waiting",
                    one(f"sum(vllm:num_requests_waiting{MODEL})", "requests"),
                    kind="stat",
                ),
                Panel(
                    "Output tokens per second",
                    one(f"sum({rate('vllm:generation_tokens_total')})", "tokens"),
                    kind="stat",
                ),
                Panel(
                    "GPU KV in use",
                    one(f"max(vllm:kv_cache_usage_perc{MODEL})", "fullest"),
                    unit="percentunit",
                    kind="stat",
                ),
            ),
        ),
        Row(
            "What clients see",
            (
                Panel(
                    "Time to first token", quantiles("vllm:time_to_first_token_seconds"), unit="s"
                ),
                Panel(
                    "Between tokens",
                    quantiles("vllm:inter_token_latency_seconds"),
                    unit="s",
                    help="Requests on the host tier are slower: see tokens by tier.",
                ),
                Panel("End to end", quantiles("vllm:e2e_request_latency_seconds"), unit="s"),
            ),
        ),
        Row(
            "Where the time goes",
            (
                Panel("In the queue", quantiles("vllm:request_queue_time_seconds"), unit="s"),
                Panel("Prefill", quantiles("vllm:request_prefill_time_seconds"), unit="s"),
                Panel("Decode", quantiles("vllm:request_decode_time_seconds"), unit="s"),
            ),
        ),
        Row(
            "Load",
            (
                Panel(
                    "Tokens per second",
                    (
                        Query(f"sum({rate('vllm:prompt_tokens_total')})", "prompt"),
                        Query(f"sum({rate('vllm:generation_tokens_total')})", "output"),
                    ),
                ),
                Panel(
                    "Requests",
                    (
                        Query(f"sum(vllm:num_requests_running{MODEL})", "running"),
                        Query(f"sum(vllm:num_requests_waiting{MODEL})", "waiting"),
                    ),
                ),
                Panel(
                    "Ends",
                    _rates("vllm:request_success_total", "finished_reason"),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "Errors by reason",
                    _rates("neo_request_errors_total", "reason"),
                    unit="reqps",
                    stacked=True,
                    help="The reasons are those of neo_common/errors.py, which clients get, too.",
                ),
            ),
        ),
        Row(
            "Sizes",
            (
                Panel("Prompt", quantiles("vllm:request_prompt_tokens")),
                Panel("Output", quantiles("vllm:request_generation_tokens")),
                Panel("Tokens of an iteration", quantiles("vllm:iteration_tokens_total")),
            ),
        ),
    ),
)

TIERS = Dashboard(
    "neo-tiers",
    "NEO Serving: tiers",
    (
        ("model", "label_values(vllm:num_requests_running, model_name)"),
        ("instance", "label_values(neo_host_sessions, instance)"),
    ),
    (
        Row(
            "Who decodes where",
            (
                Panel(
                    "Tokens per second by tier",
                    _rates("neo_decoded_tokens_total", "tier"),
                    stacked=True,
                ),
                Panel(
                    "Choices by tier",
                    (Query(by("tier", f"neo_running_requests{MODEL}"), "{{tier}}"),),
                    stacked=True,
                ),
                Panel(
                    "KV in use by tier",
                    (Query(f"max by (tier) (neo_kv_usage_ratio{MODEL})", "{{tier}}"),),
                    unit="percentunit",
                    most=1,
                ),
                Panel(
                    "KV bytes by tier",
                    (Query(by("tier", f"neo_kv_used_bytes{MODEL}"), "{{tier}}"),),
                    unit="bytes",
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Sweeps",
            (
                Panel(
                    "Time by mode",
                    _rates("neo_mode_seconds_total", "mode"),
                    unit="percentunit",
                    stacked=True,
                    help="Of each second; what is missing to 1 per engine is idle.",
                ),
                Panel("Sweeps per second by mode", _rates("neo_iterations_total", "mode")),
                Panel(
                    "Decode rows per second", _rates("neo_decode_rows_total", "kind"), stacked=True
                ),
                Panel(
                    "Prompt tokens computed by tier",
                    _rates("neo_prefill_tokens_total", "tier"),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Moves",
            (
                Panel("Migrations per second", _rates("neo_migrations_total", "direction")),
                Panel("Bytes moved", _rates("neo_migrated_bytes_total", "direction"), unit="Bps"),
                Panel(
                    "Tokens kept or thrown away",
                    (
                        Query(
                            f"sum({rate('neo_recompute_avoided_tokens_total')})",
                            "kept by moving them",
                        ),
                        Query(f"sum({rate('neo_recomputed_tokens_total')})", "computed again"),
                    ),
                    help="The second line should be flat at 0: it rises when both tiers are full.",
                ),
            ),
        ),
        Row(
            "Who waits for whom",
            (
                Panel(
                    "Engine, per second",
                    (
                        Query(f"sum({rate('neo_device_busy_seconds_total')})", "device busy"),
                        Query(
                            f"sum({rate('neo_device_wait_seconds_total')})", "waits for the device"
                        ),
                        Query(
                            f"sum({rate('neo_host_wait_seconds_total')})", "waits for the host tier"
                        ),
                    ),
                    unit="percentunit",
                ),
                Panel(
                    "Host tier, per second",
                    (
                        Query(
                            by("instance", rate("neo_host_busy_seconds_total", HOST)),
                            "{{instance}} attends",
                        ),
                        Query(
                            by("instance", rate("neo_host_doorbell_wait_seconds_total", HOST)),
                            "{{instance}} waits for the engine",
                        ),
                    ),
                    unit="percentunit",
                    help="What is missing to 1 per session is time without a sweep.",
                ),
                Panel(
                    "Void rows per second",
                    one(f"sum({rate('neo_void_rows_total')})", "rows"),
                    help="Rows that were repeated: stalls of the host tier.",
                ),
            ),
        ),
        Row(
            "CPU attention",
            (
                Panel(
                    "Bandwidth while attending",
                    one(
                        rate("neo_host_kv_read_bytes_total", HOST)
                        + " / "
                        + rate("neo_host_busy_seconds_total", HOST),
                        "{{instance}}",
                    ),
                    unit="Bps",
                    help="Compare with what `neo doctor` says this machine reads.",
                ),
                Panel(
                    "KV read",
                    one(rate("neo_host_kv_read_bytes_total", HOST), "{{instance}}"),
                    unit="Bps",
                ),
                Panel(
                    "One layer's attention", quantiles("neo_host_attention_seconds", HOST), unit="s"
                ),
                Panel("Backlog in layers", one(f"neo_host_backlog_layers{HOST}", "{{instance}}")),
            ),
        ),
        Row(
            "Host pools",
            (
                Panel("Sessions", one(f"neo_host_sessions{HOST}", "{{instance}}")),
                Panel("Pools", one(f"neo_host_pool_bytes{HOST}", "{{instance}}"), unit="bytes"),
                Panel(
                    "Times that a worker slept",
                    one(rate("neo_host_parks_total", HOST), "{{instance}}"),
                ),
                Panel(
                    "State",
                    (Query(f"max by (state) (neo_host_tier_state{MODEL})", "{{state}}"),),
                    most=1,
                ),
            ),
        ),
    ),
)

FLEET = Dashboard(
    "neo-router",
    "NEO Serving: routers",
    (("instance", "label_values(neo_router_messages_total, instance)"),),
    (
        Row(
            "Calls",
            (
                Panel(
                    "Calls by status",
                    _rates("neo_router_calls_total", "code", ROUTER),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "To the first message",
                    quantiles("neo_router_first_message_seconds", ROUTER),
                    unit="s",
                ),
                Panel(
                    "Messages relayed",
                    one(by("instance", rate("neo_router_messages_total", ROUTER)), "{{instance}}"),
                ),
            ),
        ),
        Row(
            "Backends",
            (
                Panel(
                    "Calls sent",
                    _rates("neo_router_attempts_total", "backend", ROUTER),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "Calls open",
                    (Query(by("backend", f"neo_router_backend_in_flight{ROUTER}"), "{{backend}}"),),
                    stacked=True,
                ),
                Panel(
                    "Backends by state",
                    (Query(by("state", f"neo_router_backend_state{ROUTER}"), "{{state}}"),),
                    stacked=True,
                ),
                Panel(
                    "Retries",
                    (
                        Query(f"sum({rate('neo_router_retries_total', ROUTER)})", "made"),
                        Query(
                            f"sum({rate('neo_router_retries_over_budget_total', ROUTER)})",
                            "over budget",
                        ),
                    ),
                    unit="reqps",
                ),
            ),
        ),
        Row(
            "Processes",
            (
                Panel(
                    "CPU",
                    _processes("rate(process_cpu_seconds_total[$__rate_interval])"),
                    help="Without the engine core, which is a process of its own.",
                ),
                Panel("Memory", _processes("process_resident_memory_bytes"), unit="bytes"),
                Panel(
                    "Version",
                    one("count by (service, version) (neo_build_info)", "{{service}} {{version}}"),
                    stacked=True,
                ),
            ),
        ),
    ),
)

DASHBOARDS = (OVERVIEW, TIERS, FLEET)
