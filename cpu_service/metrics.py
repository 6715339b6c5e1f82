"""Prometheus metrics of the host tier, read from the session table at each scrape."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from cpu_service.sessions import SessionTable


class SessionCollector(Collector):
    def __init__(self, table: SessionTable) -> None:
        self._table = table

    def collect(self) -> Iterator[Metric]:
        table, totals = self._table, self._table.totals()
        gauges = {
            "neo_host_sessions": ("Open sessions.", len(table)),
            "neo_host_pool_bytes": ("Host KV pools.", table.budget.used_bytes),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        counters = {
            "neo_host_sweeps": ("Sweeps served.", totals.sweeps),
            "neo_host_rows": ("Rows times layers attended.", totals.rows),
            "neo_host_kv_read_bytes": ("KV bytes read by attention.", totals.kv_bytes_read),
            "neo_host_busy_seconds": ("Time in attention.", totals.busy_seconds),
        }
        for name, (text, total) in counters.items():
            yield CounterMetricFamily(name, text, value=total)
