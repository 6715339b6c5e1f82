"""Files as parsers want them, in a folder of this process's own."""

from __future__ import annotations

import atexit
import json
import shutil
import struct
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

CONFIG: dict[str, Any] = {
    "model_type": "llama", "num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "intermediate_size": 32, "vocab_size": 40,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": 2,
    "bos_token_id": 1, "tie_word_embeddings": True, "torch_dtype": "float32",
}  # fmt: skip
"""config.json of a model with 1 layer."""
_U32, _I32, _F32, _BOOL, _STRING, _ARRAY, _U64 = 4, 5, 6, 7, 8, 9, 10
_F32_TENSOR = 0


@cache
def folder() -> Path:
    """In memory where there is such a place: a fuzzer writes thousands of files a second."""
    memory = Path("/dev/shm")
    made = Path(tempfile.mkdtemp(prefix="neo-fuzz-", dir=memory if memory.is_dir() else None))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def file(name: str, data: bytes) -> Path:
    path = folder() / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(data)
    return path


def shapes() -> dict[str, tuple[int, ...]]:
    """Tensors of the model of `CONFIG`, by GGUF's names; rows first."""
    inner = {
        "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32),
        "ffn_gate": (32, 32), "ffn_up": (32, 32), "ffn_down": (32, 32), "attn_norm": (32,),
        "ffn_norm": (32,),
    }  # fmt: skip
    named = {f"blk.0.{name}.weight": shape for name, shape in inner.items()}
    return {"token_embd.weight": (40, 32), **named, "output_norm.weight": (32,)}


def gguf(metadata: Mapping[str, Any], tensors: Mapping[str, tuple[int, ...]], data: bytes) -> bytes:
    """A GGUF file whose tensors, fp32, all begin with the data."""
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(metadata))
    for key, value in metadata.items():
        head += _string(key) + _value(value)
    for name, shape in tensors.items():
        head += _string(name) + struct.pack("<I", len(shape))
        head += struct.pack(f"<{len(shape)}Q", *reversed(shape))
        head += struct.pack("<IQ", _F32_TENSOR, 0)
    return head + bytes(-len(head) % 32) + data


def _string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> bytes:
    kind, payload = _typed(value)
    return struct.pack("<I", kind) + payload


def _typed(value: Any) -> tuple[int, bytes]:
    if isinstance(value, bool):
        return _BOOL, struct.pack("<?", value)
    if isinstance(value, int):
        return _U32, struct.pack("<I", value)
    if isinstance(value, float):
        return _F32, struct.pack("<f", value)
    if isinstance(value, str):
        return _STRING, _string(value)
    element = _typed(value[0])[0]
    parts = b"".join(_typed(each)[1] for each in value)
    return _ARRAY, struct.pack("<IQ", element, len(value)) + parts


def metadata(kind: str) -> dict[str, Any]:
    """Of the same model with a tokenizer of `gpt2` or `llama`."""
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "\u2581a", "Ġ", "Ġa"]
    tokens += [f"<0x{code:02X}>" for code in range(40 - len(tokens))]
    found: dict[str, Any] = {
        "general.architecture": "llama", "general.name": "tiny", "general.alignment": 32,
        "llama.block_count": 1, "llama.embedding_length": 32, "llama.attention.head_count": 2,
        "llama.attention.head_count_kv": 1, "llama.attention.key_length": 16,
        "llama.feed_forward_length": 32, "llama.context_length": 64,
        "llama.rope.freq_base": 10000.0, "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "tokenizer.ggml.model": kind, "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 3, 3] + [1] * 37, "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": True,
        "tokenizer.chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}",
    }  # fmt: skip
    if kind == "llama":
        found["tokenizer.ggml.scores"] = [float(-i) for i in range(40)]
    else:
        found |= {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.merges": ["a b", "Ġ a"]}
    return found


def safetensors(tensors: Mapping[str, tuple[int, ...]], data: bytes) -> bytes:
    """All tensors fp32, each in a place of its own."""
    header, at = {}, 0
    for name, shape in tensors.items():
        size = 4
        for each in shape:
            size *= each
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[:at].ljust(at, b"\0")
