"""Checkpoint tensors by their Hugging Face names, whatever they are stored in.

A *source* knows names and shapes and reads one tensor at a time, from any thread; nothing is read
before it is asked for. `check_source` compares all of it with what the model needs.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from safetensors import SafetensorError, safe_open

from gpu_service.model.fp8 import Fp8Rows, quantise_weight, random_weight
from gpu_service.model.gguf_file import GgufFile
from neo_common.documents import from_json
from neo_common.model_spec import ModelSpec

EMBEDDING = "model.embed_tokens.weight"
FINAL_NORM = "model.norm.weight"
HEAD = "lm_head.weight"
_FLOATS = {"F32", "F16", "BF16"}
_FP8 = "F8_E4M3"
_FP8_SCALES = ".weight_scale"
_FP8_UNUSED = (".input_scale", ".k_scale", ".v_scale")
"""Scales of activations and of KV, which our rows and pools do without."""
_DUMMY_DEVIATION = 0.02


class TensorSource(Protocol):
    """Read-only; all methods may be called from several threads."""

    @property
    def where(self) -> Path:
        """What to name in errors."""
        ...

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor, by its Hugging Face name."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """A floating-point tensor on any device. ValueError if it is damaged."""
        ...

    def read_fp8(self, name: str, out: Fp8Rows) -> None:
        """The same into `out`, of the tensor's shape: codes as stored, or made of what is."""
        ...


def layer_tensors(spec: ModelSpec, layer: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of one layer's tensors."""
    hidden, inner = spec.hidden_size, spec.intermediate_size
    queries, keys = spec.query_heads * spec.head_dim, spec.kv_heads * spec.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, hidden),
        "self_attn.k_proj.weight": (keys, hidden),
        "self_attn.v_proj.weight": (keys, hidden),
        "self_attn.o_proj.weight": (hidden, queries),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if spec.qkv_bias:
        shapes["self_attn.q_proj.bias"] = (queries,)
        shapes["self_attn.k_proj.bias"] = (keys,)
        shapes["self_attn.v_proj.bias"] = (keys,)
    if spec.output_bias:
        shapes["self_attn.o_proj.bias"] = (hidden,)
    if spec.qk_norm:
        shapes["self_attn.q_norm.weight"] = (spec.head_dim,)
        shapes["self_attn.k_norm.weight"] = (spec.head_dim,)
    return {f"model.layers.{layer}.{name}": shape for name, shape in shapes.items()}


def model_tensors(spec: ModelSpec) -> dict[str, tuple[int, ...]]:
    """Names and shapes of all tensors of the model."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (spec.vocab_size, spec.hidden_size)}
    for layer in range(spec.layers):
        shapes |= layer_tensors(spec, layer)
    shapes[FINAL_NORM] = (spec.hidden_size,)
    if not spec.tied_embeddings:
        shapes[HEAD] = (spec.vocab_size, spec.hidden_size)
    return shapes


def is_fp8(name: str, *, fp8: bool) -> bool:
    """Whether that tensor is e4m3 in a model with fp8 weights: the layers' matrices are."""
    return fp8 and name.endswith("_proj.weight")


def weight_bytes(shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, *, fp8: bool) -> int:
    """What the tensors take on the device."""
    total = 0
    for name, shape in shapes.items():
        elements = math.prod(shape)
        if is_fp8(name, fp8=fp8):
            total += elements + shape[0] * torch.float32.itemsize
        else:
            total += elements * dtype.itemsize
    return total


def check_source(source: TensorSource, spec: ModelSpec) -> None:
    """ValueError naming the first tensor that is missing, misshapen or unknown."""
    found, wanted = source.shapes(), model_tensors(spec)
    for name, shape in wanted.items():
        if name not in found:
            raise ValueError(f"{source.where} lacks the tensor {name}")
        if found[name] != shape:
            raise ValueError(
                f"{source.where}: tensor {name} has shape {list(found[name])}, not {list(shape)}"
            )
    for name in found:
        # Old checkpoints store the rotary frequencies; tied ones may repeat the embedding.
        if name not in wanted and name != HEAD and not name.endswith("rotary_emb.inv_freq"):
            raise ValueError(f"{source.where} has the tensor {name}, which the model does not use")


class SafetensorsSource:
    """`model.safetensors`, or the shards that its index lists; memory-mapped.

    With `fp8`, tensors may be e4m3 beside a `weight_scale` of one value or one a row; all others
    are as ever.
    """

    def __init__(self, directory: Path, *, fp8: bool = False) -> None:
        self.where = directory
        self._fp8 = fp8
        self._codes: set[str] = set()
        self._local = threading.local()
        self._shard_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._scales: dict[str, tuple[int, ...]] = {}
        for shard, promised in _shards(directory).items():
            self._scan(shard, promised)
        for name in self._codes:
            self._check_scale(name)

    def _scan(self, shard: Path, promised: set[str]) -> None:
        with _one_sentence(shard), safe_open(shard, framework="pt") as file:
            names = set(file.keys())
            if missing := promised - names:
                name = min(missing)
                raise ValueError(f"{shard} lacks the tensor {name}, which the index promises")
            for name in names:
                piece = file.get_slice(name)
                kind, shape = piece.get_dtype(), tuple(piece.get_shape())
                if self._fp8 and name.endswith(_FP8_UNUSED):
                    continue
                if self._fp8 and kind == _FP8:
                    self._codes.add(name)
                elif kind not in _FLOATS and not name.endswith("rotary_emb.inv_freq"):
                    raise ValueError(
                        f"{shard}: tensor {name} is {kind}; F32, F16 and BF16 are supported, and"
                        f" {_FP8} where config.json has a quantization_config of fp8"
                    )
                self._shard_of[name] = shard
                if self._fp8 and name.endswith(_FP8_SCALES):
                    self._scales[name] = shape
                else:
                    self._shapes[name] = shape

    def _check_scale(self, name: str) -> None:
        scale = _scale_name(name)
        if scale not in self._scales:
            raise ValueError(f"{self.where} lacks the tensor {scale}, which {name} needs")
        if not self._shapes[name]:
            raise ValueError(f"{self.where}: tensor {name} has no rows that {scale} could be of")
        shape, rows = self._scales[scale], self._shapes[name][0]
        if shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
            raise ValueError(
                f"{self.where}: tensor {scale} has shape {list(shape)}; one value, or one for each"
                f" of the {rows} rows of {name}, are supported"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> torch.Tensor:
        if name in self._codes:  # elsewhere than in layers, for instance the head
            return self._stored(name).float() * self._stored(_scale_name(name)).float().view(-1, 1)
        return self._stored(name)

    def read_fp8(self, name: str, out: Fp8Rows) -> None:
        if name not in self._codes:
            quantise_weight(self._stored(name), out)
            return
        out.codes.copy_(self._stored(name))
        out.scales.copy_(self._stored(_scale_name(name)).view(-1).expand(out.scales.shape[0]))

    def _stored(self, name: str) -> torch.Tensor:
        shard = self._shard_of[name]
        # One handle a thread and shard: opening again for each tensor would parse the header again.
        handles = self._local.__dict__
        with _one_sentence(shard):
            if str(shard) not in handles:
                handles[str(shard)] = safe_open(shard, framework="pt")
            tensor: torch.Tensor = handles[str(shard)].get_tensor(name)
        return tensor


def _scale_name(name: str) -> str:
    return name.removesuffix(".weight") + _FP8_SCALES


@contextmanager
def _one_sentence(shard: Path) -> Iterator[None]:
    """Turns what safetensors raises into a ValueError."""
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{shard} is missing, damaged or truncated: {error}") from error


def _shards(directory: Path) -> dict[Path, set[str]]:
    """Shard files with the tensors that the index promises in each (without an index, none)."""
    index = directory / "model.safetensors.index.json"
    if not index.is_file():
        single = directory / "model.safetensors"
        if single.is_file():
            return {single: set()}
        raise ValueError(f"{directory} has no model.safetensors (nor an index of shards)")
    try:
        weight_map = from_json(index.read_text(encoding="utf-8"))["weight_map"]
        shards: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            shards.setdefault(directory / file, set()).add(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index} is damaged: it has no usable weight_map") from error
    for shard in shards:
        if shard.parent != directory or not shard.is_file():
            raise ValueError(f"{index} names {shard.name}, which is not in {directory}")
    return shards


_GGUF_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_HF_NAMES = {gguf: hf for hf, gguf in _GGUF_NAMES.items()}
_GGUF_TOP = {
    "token_embd.weight": EMBEDDING,
    "output_norm.weight": FINAL_NORM,
    "output.weight": HEAD,
}


class GgufSource:
    """A GGUF file, dequantised tensor by tensor."""

    def __init__(self, file: GgufFile, spec: ModelSpec) -> None:
        self.where = file.path
        self._file = file
        stored = (name for name in file.tensors if name != "rope_freqs.weight")
        self._names = {_hf_name(name): name for name in stored}
        # llama.cpp rotates neighbouring pairs for this architecture: Q and K rows are permuted.
        permuted = spec.family == "llama"
        self._heads = {"attn_q": spec.query_heads, "attn_k": spec.kv_heads} if permuted else {}

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {hf: self._file.tensors[name].shape for hf, name in self._names.items()}

    def read(self, name: str) -> torch.Tensor:
        stored = self._names[name]
        values = self._file.dequantised(stored)
        heads = self._heads.get(stored.split(".")[-2])
        if heads:
            # [heads, pairs, 2] -> [heads, 2, pairs]: neighbours become halves.
            values = values.reshape(heads, -1, 2, *values.shape[1:]).swapaxes(1, 2)
            values = values.reshape(-1, *values.shape[3:])
        # fp32 and fp16 tensors are views of a read-only file; torch wants to own what it wraps.
        return torch.from_numpy(values if values.flags.writeable else values.copy())

    def read_fp8(self, name: str, out: Fp8Rows) -> None:
        quantise_weight(self.read(name), out)


def _hf_name(name: str) -> str:
    """The Hugging Face name; GGUF's own where there is none, for the error message."""
    if name in _GGUF_TOP:
        return _GGUF_TOP[name]
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _HF_NAMES:
        return f"model.layers.{parts[1]}.{_HF_NAMES[parts[2]]}.{parts[3]}"
    return name


class DummySource:
    """Random weights from the shape alone, the same at every start on the same kind of device."""

    def __init__(self, spec: ModelSpec, where: Path, device: torch.device) -> None:
        self.where = where
        self._shapes = model_tensors(spec)
        self._device = device

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return self._shapes

    def read(self, name: str) -> torch.Tensor:
        shape = self._shapes[name]
        if "norm" in name:
            return torch.ones(shape, device=self._device)
        generator = torch.Generator(device=self._device).manual_seed(zlib.crc32(name.encode()))
        return torch.randn(shape, generator=generator, device=self._device) * _DUMMY_DEVIATION

    def read_fp8(self, name: str, out: Fp8Rows) -> None:
        random_weight(out, zlib.crc32(name.encode()), _DUMMY_DEVIATION)


def open_source(
    path: Path, spec: ModelSpec, load_format: str, device: torch.device
) -> TensorSource:
    """The source at `path` (a directory or a GGUF file) for `load_format` "auto" or "dummy"."""
    if load_format == "dummy":
        return DummySource(spec, path, device)
    if load_format != "auto":
        raise ValueError(f"load_format: {load_format!r} is not known (auto and dummy are)")
    if path.is_dir():
        return SafetensorsSource(path, fp8=spec.quantization == "fp8")
    return GgufSource(GgufFile(path), spec)
