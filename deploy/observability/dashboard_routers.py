"""The dashboard of routers, and of all processes."""

from __future__ import annotations

from deploy.observability.panels import Dashboard, Panel, Query, Row
from deploy.observability.queries import ROUTER, by, one, processes, quantiles, rate, rates

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
                    rates("neo_router_calls_total", "code", ROUTER),
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
                    rates("neo_router_attempts_total", "backend", ROUTER),
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
                    "Second tries",
                    (
                        Query(f"sum({rate('neo_router_retries_total', ROUTER)})", "retries"),
                        Query(
                            f"sum({rate('neo_router_retries_over_budget_total', ROUTER)})",
                            "retries over budget",
                        ),
                        Query(f"sum({rate('neo_router_hedges_total', ROUTER)})", "hedges"),
                        Query(
                            f"sum({rate('neo_router_ejections_total', ROUTER)}) or vector(0)",
                            "ejections",
                        ),
                    ),
                    unit="reqps",
                ),
            ),
        ),
        Row(
            "Admission",
            (
                Panel(
                    "Waiting in routers",
                    one(f"sum(neo_router_admission_waiting{ROUTER}) or vector(0)", "requests"),
                    help="0 where routers have no file of tenants.",
                ),
                Panel(
                    "Refused",
                    one(
                        f"{by('reason', rate('neo_router_admission_refusals_total', ROUTER))} "
                        "or vector(0)",
                        "{{reason}}",
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
                    processes("rate(process_cpu_seconds_total[$__rate_interval])"),
                    help="Without the engine core, which is a process of its own.",
                ),
                Panel("Memory", processes("process_resident_memory_bytes"), unit="bytes"),
                Panel(
                    "Version",
                    one("count by (service, version) (neo_build_info)", "{{service}} {{version}}"),
                    stacked=True,
                ),
            ),
        ),
    ),
)
