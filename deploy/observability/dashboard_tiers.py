"""The dashboard of where requests decode, and who waits for whom."""

from __future__ import annotations

from deploy.observability.panels import Dashboard, Panel, Query, Row
from deploy.observability.queries import HOST, MODEL, by, one, quantiles, rate, rates

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
                    rates("neo_decoded_tokens_total", "tier"),
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
                    rates("neo_mode_seconds_total", "mode"),
                    unit="percentunit",
                    stacked=True,
                    help="Of each second; what is missing to 1 per engine is idle.",
                ),
                Panel("Sweeps per second by mode", rates("neo_iterations_total", "mode")),
                Panel(
                    "Decode rows per second", rates("neo_decode_rows_total", "kind"), stacked=True
                ),
                Panel(
                    "Prompt tokens computed by tier",
                    rates("neo_prefill_tokens_total", "tier"),
                    stacked=True,
                ),
            ),
        ),
        Row(
            "Moves",
            (
                Panel("Migrations per second", rates("neo_migrations_total", "direction")),
                Panel("Bytes moved", rates("neo_migrated_bytes_total", "direction"), unit="Bps"),
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
            "Predictions",
            (
                Panel(
                    "Sweeps, predicted and actual",
                    (
                        Query(
                            'sum(rate(neo_predicted_seconds_total{model_name=~"$model", '
                            'part="sweep"}[$__rate_interval]))',
                            "predicted",
                        ),
                        Query(f"sum({rate('neo_actual_seconds_total')})", "actual"),
                    ),
                    unit="percentunit",
                ),
                Panel(
                    "Parts as predicted",
                    rates("neo_predicted_seconds_total", "part"),
                    unit="percentunit",
                ),
                Panel(
                    "Error",
                    one(f"max(neo_prediction_error_ratio{MODEL})", "worst engine"),
                    unit="percentunit",
                    most=1,
                ),
                Panel(
                    "Decision",
                    (
                        Query(f"sum by (mode) (neo_decision{MODEL})", "engines on {{mode}}"),
                        Query(
                            f"sum by (of) (neo_decision_tokens_per_second{MODEL})",
                            "tokens/s, {{of}}",
                        ),
                    ),
                    help="Only with offload_mode auto.",
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
