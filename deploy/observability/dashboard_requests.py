"""The dashboard of what clients see."""

from __future__ import annotations

from deploy.observability.panels import Dashboard, Panel, Query, Row
from deploy.observability.queries import MODEL, by, one, quantiles, rate, rates

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
                    rates("vllm:request_success_total", "finished_reason"),
                    unit="reqps",
                    stacked=True,
                ),
                Panel(
                    "Errors by reason",
                    rates("neo_request_errors_total", "reason"),
                    unit="reqps",
                    stacked=True,
                    help="The reasons are those of neo_common/errors.py, which clients get, too.",
                ),
            ),
        ),
        Row(
            "Prefix cache",
            (
                Panel(
                    "Prompt tokens found",
                    one(
                        f"sum({rate('vllm:prefix_cache_hits_total')}) / "
                        f"sum({rate('vllm:prefix_cache_queries_total')})",
                        "of those looked up",
                    ),
                    unit="percentunit",
                    most=1,
                ),
                Panel(
                    "Prompt tokens found, by tier",
                    rates("neo_prefix_hit_tokens_total", "tier"),
                    stacked=True,
                ),
                Panel(
                    "Blocks that can be found",
                    one(by("tier", f"neo_kv_cached_blocks{MODEL}"), "{{tier}}"),
                    stacked=True,
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
