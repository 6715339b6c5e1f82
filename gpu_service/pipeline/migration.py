"""Moving a choice's KV between the tiers: whole blocks where both pools are mapped here, else layer
by layer."""

from __future__ import annotations

import numpy as np
import torch

from gpu_service.kv.table import slots_of
from gpu_service.offload.host_tier import HostTierStalled
from gpu_service.pipeline.cpu_kv import CpuDeviceKv
from gpu_service.pipeline.parts import EngineParts
from gpu_service.scheduling.plan import Migration, Tier
from kernels.cpu import KvPool, ThreadPool


class Migrator:
    """Runs migrations before a sweep, one after the other, in the engine core's thread."""

    def __init__(
        self,
        parts: EngineParts,
        threads: ThreadPool | None,
    ) -> None:
        """`threads`: for copies between mapped pools; None copies in the calling thread."""
        self._geometry = parts.geometry
        self._gpu = parts.gpu
        self._host = parts.host
        self._device = parts.model.device
        self._threads = threads

    def run(self, migration: Migration) -> bool:
        """False if the host tier went away in between: the choice's KV is then on neither tier."""
        try:
            if not self._copy_blocks(migration):
                self._copy_layers(migration)
        except HostTierStalled:
            return False
        return True

    def _copy_blocks(self, migration: Migration) -> bool:
        pools = self._mapped_pools()
        if pools is None:
            return False
        gpu, host = pools
        source, target = (gpu, host) if migration.target is Tier.HOST else (host, gpu)
        target.copy_from(
            source,
            migration.source_blocks.astype(np.int64),
            migration.target_blocks.astype(np.int64),
            threads=self._threads,
        )
        return True

    def _mapped_pools(self) -> tuple[KvPool, KvPool] | None:
        """Both pools, if pieces of one mean the same in the other."""
        host = self._host.mapped_pool
        if host is None or not isinstance(self._gpu, CpuDeviceKv):
            return None
        gpu = self._gpu.pool
        return (gpu, host) if gpu.layout == host.layout else None

    def _copy_layers(self, migration: Migration) -> None:
        size, tokens = self._geometry.block_tokens, migration.tokens
        source = torch.from_numpy(slots_of(migration.source_blocks, 0, tokens, size))
        target = torch.from_numpy(slots_of(migration.target_blocks, 0, tokens, size))
        if migration.target is Tier.HOST:
            source = source.to(self._device)
            for layer in range(self._geometry.layers):
                self._host.write_kv(layer, target, *self._gpu.read(layer, source))
            return
        target = target.to(self._device)
        for layer in range(self._geometry.layers):
            k, v = self._host.read_kv(layer, source)
            self._gpu.write(layer, target, k.to(self._device), v.to(self._device))
