"""What stands between a layer's QKV projection and attention."""

from __future__ import annotations

import torch

from gpu_service.model.model import CausalLM
from kernels.gpu.kv_cache import GpuKvLayout
from kernels.gpu.rope_store import rope_store


class RopeStore:
    """Q's and K's norm, their rotation, and K and V stored: one launch, whoever's rows they are."""

    def __init__(self, model: CausalLM) -> None:
        spec = model.spec
        half = spec.head_dim // 2
        # The kernel wants cos and sin once each; the table holds cos twice and sin with both signs.
        cos, sin = model.rope[:, 0, :half], model.rope[:, 1, half:]
        self._cos_sin = torch.stack((cos, sin), dim=1).contiguous()
        rotated = (spec.query_heads - 1, spec.query_heads)
        self._qk_norms = [
            None if layer.qk_norm is None else layer.qk_norm[list(rotated)].contiguous()
            for layer in model.layers
        ]
        self._eps = spec.norm_eps

    def __call__(
        self,
        layer: int,
        qkv: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        q: torch.Tensor,
        kv: torch.Tensor,
        layout: GpuKvLayout,
        staging_layer: int = 0,
    ) -> None:
        """Tensors as `kernels.gpu.rope_store` wants them. `staging_layer`: where slots name
        staging."""
        rope_store(
            qkv,
            self._cos_sin,
            positions,
            slots,
            q,
            kv,
            layout,
            qk_norm=self._qk_norms[layer],
            eps=self._eps,
            layer=staging_layer,
        )
