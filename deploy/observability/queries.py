"""PromQL that dashboards have in common. Grafana fills in `$model`, `$instance` and
`$__rate_interval`."""

from __future__ import annotations

from deploy.observability.panels import Query

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


def rates(metric: str, label: str, selector: str = MODEL) -> tuple[Query, ...]:
    """A line for each value of the label."""
    return one(by(label, rate(metric, selector)), f"{{{{{label}}}}}")


def processes(value: str) -> tuple[Query, ...]:
    named = f"{value} * on (job, instance) group_left (service) neo_build_info"
    return one(f"sum by (service, instance) ({named})", "{{service}} {{instance}}")
