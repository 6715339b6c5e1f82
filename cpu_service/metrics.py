"""Prometheus metrics of the host tier, read from the session table at each scrape."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from cpu_service.epoch import EpochStats
from cpu_service.sessions import SessionTable
from kernels.cpu.dataplane import LAYER_BOUNDS_SECONDS
from neo_common.metrics import cumulative


class SessionCollector(Collector):
    """Counts nothing itself: what attention costs is counted where it runs."""

    def __init__(self, table: SessionTable, clock: Callable[[], float] = time.monotonic) -> None:
        self._table = table
        self._clock = clock
        self._started = clock()

    def collect(self) -> Iterator[Metric]:
        table, totals = self._table, self._table.totals()
        gauges = {
            "neo_host_sessions": ("Open sessions.", len(table)),
            "neo_host_pool_bytes": ("Host KV pools.", table.budget.used_bytes),
            "neo_host_threads": ("Attention threads of each session.", table.threads),
            "neo_host_backlog_layers": ("Layers submitted and not yet attended.", totals.backlog),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value=value)
        up = self._clock() - self._started
        counters = {
            "neo_host_sweeps": ("Sweeps served.", totals.sweeps),
            "neo_host_rows": ("Rows times layers attended.", totals.rows),
            "neo_host_kv_read_bytes": ("KV bytes read by attention.", totals.kv_bytes_read),
            "neo_host_busy_seconds": ("Time in attention.", totals.busy_seconds),
            "neo_host_doorbell_waits": ("Waits for the engine within a sweep.", totals.waits),
            "neo_host_doorbell_wait_seconds": ("Their time.", totals.wait_seconds),
            "neo_host_parks": ("Times that a worker slept for want of work.", totals.parks),
            "neo_host_up_seconds": ("Time since start; what is not busy is idle.", up),
        }
        for name, (text, total) in counters.items():
            yield CounterMetricFamily(name, text, value=total)
        yield _layers(totals)


def _layers(totals: EpochStats) -> Metric:
    text = "One layer of one sweep, from when it is taken up until it is done."
    family = HistogramMetricFamily("neo_host_attention_seconds", text)
    buckets = cumulative(LAYER_BOUNDS_SECONDS, totals.layers)
    family.add_metric([], buckets, sum_value=totals.layer_seconds)
    return family
