"""KV blocks that hold NaN while nobody has written to them: whoever reads what another request has
left, or what is not there yet, gives NaN away in its output."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import torch

from gpu_service.engine.core import EngineCore
from gpu_service.model.adjust import SamplingRow
from gpu_service.offload.host_tier import HostTierState
from gpu_service.scheduling.plan import IterationPlan, Tier
from tests.support.engine import host_of


class Poison:
    """Of both tiers of a `local_core`, before each sweep: blocks that are free without a name, and
    those handed out since the last one. What the sweep's migrations read or fill is left alone."""

    def __init__(self, core: EngineCore) -> None:
        self.blocks = dict.fromkeys(Tier, 0)
        """How many were filled."""
        self._core = core
        self._new: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        for tier, pool in core.scheduler.state.pools.items():
            self._listen(tier, pool)
        self._launch = core._runner.launch
        core._runner.launch = self.launch  # type: ignore[method-assign]

    def _listen(self, tier: Tier, pool: Any) -> None:
        allocate = pool.allocate

        def allocated(count: int) -> list[int]:
            taken: list[int] = allocate(count)
            self._new[tier].update(taken)
            return taken

        pool.allocate = allocated

    def launch(self, plan: IterationPlan, sampling: Mapping[int, SamplingRow]) -> Any:
        moved: dict[Tier, set[int]] = {tier: set() for tier in Tier}
        for migration in plan.migrations:
            other = Tier.GPU if migration.target is Tier.HOST else Tier.HOST
            moved[migration.target].update(migration.target_blocks.tolist())
            moved[other].update(migration.source_blocks.tolist())
        for tier, pool in self._core.scheduler.state.pools.items():
            blocks = (self._new[tier] | set(pool._free)) - moved[tier]
            self._new[tier].clear()
            self._fill(tier, sorted(blocks))
        return self._launch(plan, sampling)

    def _fill(self, tier: Tier, blocks: list[int]) -> None:
        if not blocks or (tier is Tier.HOST and host_of(self._core).state is not HostTierState.UP):
            return
        self.blocks[tier] += len(blocks)
        parts = self._core._runner._parts  # type: ignore[attr-defined]
        geometry, size = parts.geometry, parts.geometry.block_tokens
        slots = torch.tensor(
            [*itertools.chain(*(range(b * size, b * size + size) for b in blocks))]
        )
        nan = torch.full((len(slots), geometry.kv_heads, geometry.head_dim), float("nan"))
        for layer in range(geometry.layers):
            if tier is Tier.HOST:
                host_of(self._core).write_kv(layer, slots, nan, nan)
            else:
                parts.gpu.write(layer, slots, nan, nan)
