"""Deferred mode's host rows between sweeps: which of them are at which layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gpu_service.kv.table import blocks_for
from gpu_service.offload.host_tier import HostRows
from gpu_service.pipeline.device_kv import DecodeTables
from gpu_service.scheduling.plan import Flight


@dataclass(frozen=True)
class Cohort:
    """Host rows, maybe none, that are at the same layer."""

    flights: tuple[Flight, ...]
    tables: DecodeTables


def no_tables() -> DecodeTables:
    return DecodeTables(np.empty(0, np.int32), np.empty((0, 0), np.int32))


def host_rows(submitting: Sequence[Cohort], block_tokens: int) -> HostRows:
    """The rows of all cohorts, one behind the other; cohort i submits at layer i."""
    lengths = np.concatenate([cohort.tables.lengths for cohort in submitting])
    width = blocks_for(int(lengths.max(initial=1)), block_tokens)
    tables = np.zeros((len(lengths), width), np.int32)
    ranges = np.empty((len(submitting), 2), np.int32)
    end = 0
    for layer, cohort in enumerate(submitting):
        begin, end = end, end + len(cohort.flights)
        ranges[layer] = begin, end
        known = cohort.tables.block_tables
        tables[begin:end, : known.shape[1]] = known
    return HostRows(lengths, tables, ranges)
