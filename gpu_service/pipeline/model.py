"""What a pipeline asks of a model: the dense layers, cut at attention (gpu_service.model.CausalLM
is one)."""

from __future__ import annotations

from typing import Protocol

import torch

from neo_common.model_spec import ModelSpec


class DenseModel(Protocol):
    """See `gpu_service.model.model.CausalLM` for shapes. Works within `torch.inference_mode()`."""

    spec: ModelSpec
    dtype: torch.dtype
    device: torch.device

    def embed(self, token_ids: torch.Tensor) -> torch.Tensor: ...

    def pre_projection(
        self, layer: int, state: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

    def post_projection(self, layer: int, state: torch.Tensor, o: torch.Tensor) -> torch.Tensor: ...

    def logits(self, state: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor: ...
