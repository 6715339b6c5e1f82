"""The transformer, cut where attention may leave for another tier.

    state = embed(ids)
    per layer:  q, k, v = pre_projection(layer, state, positions)      norm, QKV, (Q/K norm), rope
                o = attention over K and V, wherever they are          not here
                state = post_projection(layer, state, o)               output, residual, norm, MLP
    logits(state, rows)                                                final norm, head

Rounding follows `transformers`: norms and their sums in fp32, everything else in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as functional

from gpu_service.model import weights
from gpu_service.model.fp8 import MULTIPLE, Fp8Linear, Fp8Rows
from gpu_service.model.linear import Linear
from gpu_service.model.rope import rope_table
from gpu_service.model.spec import read_spec, resolve_model
from neo_common.model_spec import ModelSpec

Progress = Callable[[str, int, int], None]
"""`progress(stage, done_bytes, total_bytes)`; called from the thread that loads."""

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
_FP8_CAPABILITY = (8, 9)
# Reading is bound by the disk or by dequantising; each thread holds one layer's fp32 copy.
_LOAD_THREADS = 4

LayerLinear = Linear | Fp8Linear
"""All of a model's layers have the same kind."""


@dataclass(frozen=True)
class LayerWeights:
    """One layer, fused as it is multiplied: `qkv` is Q above K above V, `gate_up` gate above up."""

    input_norm: torch.Tensor
    qkv: LayerLinear
    qk_norm: torch.Tensor | None
    """`[query_heads + kv_heads, head_dim]`"""
    output: LayerLinear
    post_norm: torch.Tensor
    gate_up: LayerLinear
    down: LayerLinear


class CausalLM:
    """Weights on one device and the dense mathematics on them. Holds no state of any request.

    Tensors that it returns are inference tensors: the caller works in `torch.inference_mode()` too.
    `state` is the residual stream `[tokens, hidden]` in the model's dtype; rows are independent of
    each other, so callers may slice and concatenate states.
    """

    def __init__(
        self,
        spec: ModelSpec,
        layers: list[LayerWeights],
        embedding: torch.Tensor,
        final_norm: torch.Tensor,
        head: Linear,
    ) -> None:
        self.spec = spec
        self.dtype = embedding.dtype
        self.device = embedding.device
        self.layers = layers
        self.embedding = embedding
        self.final_norm = final_norm
        self.head = head
        self.rope = rope_table(
            spec.rope, spec.head_dim, spec.max_context_tokens, self.dtype, self.device
        )

    @torch.inference_mode()
    def embed(self, token_ids: torch.Tensor) -> torch.Tensor:
        """`token_ids` [tokens] int64 -> state."""
        return functional.embedding(token_ids, self.embedding)

    @torch.inference_mode()
    def pre_projection(
        self, layer: int, state: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What attention needs: contiguous `q` [tokens, query_heads, head_dim], `k` and `v`
        [tokens, kv_heads, head_dim], rotated. `positions` [tokens] int64 counts from 0."""
        spec, weight = self.spec, self.layers[layer]
        tokens, rotated_heads = state.shape[0], spec.query_heads + spec.kv_heads
        qkv = weight.qkv(self._norm(state, weight.input_norm))
        split = rotated_heads * spec.head_dim
        qk = qkv[:, :split].view(tokens, rotated_heads, spec.head_dim)
        v = qkv[:, split:].view(tokens, spec.kv_heads, spec.head_dim)
        if weight.qk_norm is not None:
            qk = torch.rms_norm(qk, (spec.head_dim,), None, spec.norm_eps) * weight.qk_norm
        cos_sin = self.rope.index_select(0, positions)
        swapped = qk.roll(spec.head_dim // 2, -1)
        rotated = (qk * cos_sin[:, :1]).addcmul_(swapped, cos_sin[:, 1:])
        q, k = rotated[:, : spec.query_heads], rotated[:, spec.query_heads :]
        return q.contiguous(), k.contiguous(), v.contiguous()

    @torch.inference_mode()
    def post_projection(self, layer: int, state: torch.Tensor, o: torch.Tensor) -> torch.Tensor:
        """The layer's end: `o` [tokens, query_heads, head_dim] is attention's result.

        Reuses `state`'s memory: the argument is void afterwards."""
        weight = self.layers[layer]
        state = state.add_(weight.output(o.flatten(1)))
        gate_up = weight.gate_up(self._norm(state, weight.post_norm))
        inner = self.spec.intermediate_size
        activated = functional.silu(gate_up[:, :inner]).mul_(gate_up[:, inner:])
        return state.add_(weight.down(activated))

    @torch.inference_mode()
    def logits(self, state: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
        """fp32 `[rows, vocab]` of the state after the last layer; `rows` int64, None means all."""
        chosen = state if rows is None else state.index_select(0, rows)
        return self.head(self._norm(chosen, self.final_norm)).float()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return torch.rms_norm(x, (self.spec.hidden_size,), weight, self.spec.norm_eps)


def load_model(
    path: str | Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    load_format: str = "auto",
    quantization: str = "auto",
    progress: Progress | None = None,
) -> CausalLM:
    """The model at `path`: a Hugging Face directory, a GGUF file or `smollm2`.

    dtype: "auto" is the checkpoint's own. load_format: "auto" reads weights, "dummy" makes them up.
    quantization: "fp8" quantises the layers' weights tensor by tensor as they are read, "auto"
    leaves them as the checkpoint has them.
    ValueError, one sentence, for missing, damaged or unsupported files and options.
    """
    spec = read_spec(path)
    target, place = _resolve_dtype(dtype, spec), torch.device(device)
    fp8 = "fp8" in (quantization, spec.quantization)
    if fp8:
        _check_fp8(spec, target, place)
    _check_room(spec, target, place, fp8=fp8)
    source = weights.open_source(resolve_model(path), spec, load_format, place)
    weights.check_source(source, spec)
    with torch.inference_mode():
        return _Loader(spec, source, target, place, progress or (lambda *_: None), fp8=fp8).model()


def _check_fp8(spec: ModelSpec, dtype: torch.dtype, device: torch.device) -> None:
    if device.type == "cuda" and dtype != torch.bfloat16:
        raise ValueError(
            f"quantization: fp8 weights on a CUDA device need dtype bfloat16, not {dtype}"
        )
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        raise ValueError(
            f"quantization: {torch.cuda.get_device_name(device)} cannot multiply fp8 weights; "
            "devices of compute capability 8.9 and more can"
        )
    sizes = {
        "hidden_size": spec.hidden_size,
        "intermediate_size": spec.intermediate_size,
        "query heads * head_dim": spec.query_heads * spec.head_dim,
        "(query heads + 2 * KV heads) * head_dim": spec.head_dim
        * (spec.query_heads + 2 * spec.kv_heads),
    }
    for name, size in sizes.items():
        if size % MULTIPLE:
            raise ValueError(
                f"quantization: fp8 needs {name} to be a multiple of {MULTIPLE}, but this model's"
                f" is {size}"
            )


def _check_room(spec: ModelSpec, dtype: torch.dtype, device: torch.device, *, fp8: bool) -> None:
    """Refuse weights that cannot fit before half an hour has gone into reading them."""
    if device.type != "cuda":
        return
    shapes, gib = weights.model_tensors(spec), 1 << 30
    needed, free = weights.weight_bytes(shapes, dtype, fp8=fp8), torch.cuda.mem_get_info(device)[0]
    if needed <= free:
        return
    smaller = weights.weight_bytes(shapes, torch.bfloat16, fp8=True)
    hint = f"; with quantization fp8 they take {smaller / gib:.1f} GiB" if not fp8 else ""
    raise ValueError(
        f"the weights take {needed / gib:.1f} GiB and the device has {free / gib:.1f} GiB"
        f" free{hint}"
    )


def _resolve_dtype(dtype: str | torch.dtype, spec: ModelSpec) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    name = spec.dtype if dtype == "auto" else dtype
    if name not in _DTYPES:
        raise ValueError(f"dtype: {name!r} is not known (auto, {', '.join(_DTYPES)} are)")
    return _DTYPES[name]


class _Loader:
    """Reads, fuses and lays out one layer a task."""

    def __init__(
        self,
        spec: ModelSpec,
        source: weights.TensorSource,
        dtype: torch.dtype,
        device: torch.device,
        progress: Progress,
        *,
        fp8: bool,
    ) -> None:
        self._spec = spec
        self._fp8 = fp8
        self._source = source
        self._dtype = dtype
        self._device = device
        self._progress = progress
        self._shapes = weights.model_tensors(spec)
        self._total = weights.weight_bytes(self._shapes, dtype, fp8=fp8)

    def model(self) -> CausalLM:
        self._progress("weights", 0, self._total)
        embedding = self._tensor(weights.EMBEDDING)
        final_norm = self._tensor(weights.FINAL_NORM)
        head = Linear(embedding if self._spec.tied_embeddings else self._tensor(weights.HEAD))
        done = self._total - sum(map(self._layer_bytes, range(self._spec.layers)))
        self._progress("weights", done, self._total)
        layers: list[LayerWeights] = []
        with ThreadPoolExecutor(_LOAD_THREADS, thread_name_prefix="weights") as pool:
            for index, layer in enumerate(pool.map(self._layer, range(self._spec.layers))):
                layers.append(layer)
                done += self._layer_bytes(index)
                self._progress("weights", done, self._total)
        return CausalLM(self._spec, layers, embedding, final_norm, head)

    def _layer_bytes(self, index: int) -> int:
        shapes = weights.layer_tensors(self._spec, index)
        return weights.weight_bytes(shapes, self._dtype, fp8=self._fp8)

    def _layer(self, index: int) -> LayerWeights:
        with torch.inference_mode():  # a property of the thread
            spec, prefix = self._spec, f"model.layers.{index}."
            attention, mlp = f"{prefix}self_attn.", f"{prefix}mlp."
            qkv = [f"{attention}{letter}_proj." for letter in "qkv"]
            output_bias = self._tensor(f"{attention}o_proj.bias") if spec.output_bias else None
            return LayerWeights(
                input_norm=self._tensor(f"{prefix}input_layernorm.weight"),
                qkv=self._linear(
                    *(f"{name}weight" for name in qkv),
                    bias=self._tensor(*(f"{name}bias" for name in qkv)) if spec.qkv_bias else None,
                ),
                qk_norm=self._qk_norm(attention) if spec.qk_norm else None,
                output=self._linear(f"{attention}o_proj.weight", bias=output_bias),
                post_norm=self._tensor(f"{prefix}post_attention_layernorm.weight"),
                gate_up=self._linear(f"{mlp}gate_proj.weight", f"{mlp}up_proj.weight"),
                down=self._linear(f"{mlp}down_proj.weight"),
            )

    def _linear(self, *names: str, bias: torch.Tensor | None = None) -> LayerLinear:
        if not self._fp8:
            return Linear(self._tensor(*names), bias)
        shapes = [self._shapes[name] for name in names]
        weight = Fp8Rows.empty(sum(shape[0] for shape in shapes), shapes[0][1], self._device)
        row = 0
        for name, shape in zip(names, shapes, strict=True):
            self._source.read_fp8(name, weight.part(row, row + shape[0]))
            row += shape[0]
        return Fp8Linear(weight, self._dtype, bias)

    def _qk_norm(self, attention: str) -> torch.Tensor:
        q, k = self._tensor(f"{attention}q_norm.weight"), self._tensor(f"{attention}k_norm.weight")
        heads = (self._spec.query_heads, self._spec.kv_heads)
        return torch.cat([w.expand(n, -1) for w, n in zip((q, k), heads, strict=True)])

    def _tensor(self, *names: str) -> torch.Tensor:
        """The named tensors one below the other, in the model's dtype on its device."""
        shapes = [self._shapes[name] for name in names]
        fused = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        target = torch.empty(fused, dtype=self._dtype, device=self._device)
        row = 0
        for name, shape in zip(names, shapes, strict=True):
            target[row : row + shape[0]].copy_(self._source.read(name))
            row += shape[0]
        return target
