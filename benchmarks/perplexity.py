"""What int8 KV costs in quality: perplexity of a text, every token decoded over a host KV pool.

    python -m benchmarks.perplexity --model smollm2 --rows 48 --context 512

The text is the Python distribution's own language reference (`pydoc_data.topics`, PSF licence), cut
into rows of `context` tokens that are decoded side by side, teacher-forced: each token's attention
runs in the CPU kernel over K and V of the pool's dtype, and its logits predict the next token of
the text. Models quantised by others keep their weights here; only the pool's dtype differs.
"""

from __future__ import annotations

import argparse
import json
import math
import mmap
import os
import pydoc_data.topics
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from gpu_service.engine.build import geometry_of
from gpu_service.model.model import CausalLM, load_model
from gpu_service.model.tokenizer import load_tokenizer
from kernels.cpu import DType, KvLayout, KvPool, ThreadPool, decode_attention
from neo_client.fingerprint import fingerprint

BLOCK_TOKENS = 16
KV_DTYPES = {"bfloat16": DType.BFLOAT16, "int8": DType.INT8, "float32": DType.FLOAT32}


def text_rows(model: str, rows: int, context: int) -> torch.Tensor:
    """`[rows, context + 1]` int64 token ids. ValueError if the text is too short."""
    topics = pydoc_data.topics.topics
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ids = load_tokenizer(model).encode(text, add_special_tokens=False)
    wanted = rows * (context + 1)
    if len(ids) < wanted:
        raise ValueError(f"the text has {len(ids)} tokens, and {wanted} were asked for")
    return torch.tensor(ids[:wanted]).view(rows, context + 1)


class Decoder:
    """All rows a token at a time, over a pool of its own."""

    def __init__(self, model: CausalLM, kv: DType, rows: int, context: int) -> None:
        geometry = geometry_of(model.spec, BLOCK_TOKENS)
        width = -(-context // BLOCK_TOKENS)
        layout = KvLayout(geometry.layers, geometry.kv_heads, geometry.head_dim, BLOCK_TOKENS, kv)
        memory = mmap.mmap(-1, layout.pool_bytes(rows * width))
        self._model = model
        self._geometry = geometry
        self._pool = KvPool(layout, rows * width, memory)
        self._threads = ThreadPool(len(os.sched_getaffinity(0)))
        self._tables = np.arange(rows * width, dtype=np.int32).reshape(rows, width)

    @torch.inference_mode()
    def step(self, ids: torch.Tensor, position: int) -> torch.Tensor:
        """fp32 logits `[rows, vocabulary]` after the tokens `ids` `[rows]` at `position`."""
        model, geometry = self._model, self._geometry
        rows = len(ids)
        lengths = np.full(rows, position + 1, dtype=np.int32)
        state = model.embed(ids)
        positions = torch.full((rows,), position)
        for layer in range(geometry.layers):
            q, k, v = model.pre_projection(layer, state, positions)
            out = torch.empty_like(q)
            decode_attention(
                self._threads, self._pool, layer, q, k, v, self._tables, lengths, out,
                scale=geometry.scale, window=geometry.windows[layer],
            )  # fmt: skip
            state = model.post_projection(layer, state, out)
        return model.logits(state)


def mean_nll(model: CausalLM, rows: torch.Tensor, kv: DType) -> float:
    """Negative log-likelihood a token, over all tokens but each row's first."""
    count, length = rows.shape
    decoder = Decoder(model, kv, count, length - 1)
    total = 0.0
    for position in range(length - 1):
        logits = decoder.step(rows[:, position], position)
        loss = torch.nn.functional.cross_entropy(logits, rows[:, position + 1], reduction="sum")
        total += float(loss)
    return total / (count * (length - 1))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16", help="of the model")
    parser.add_argument("--kv", nargs="+", default=["bfloat16", "int8"], choices=list(KV_DTYPES))
    parser.add_argument("--rows", type=int, default=48)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--json", type=Path, help="write all figures here")
    args = parser.parse_args(argv)
    rows = text_rows(args.model, args.rows, args.context)
    model = load_model(args.model, dtype=args.dtype)
    tokens = args.rows * args.context
    figures: dict[str, float] = {}
    for name in args.kv:
        began = time.perf_counter()
        figures[name] = math.exp(mean_nll(model, rows, KV_DTYPES[name]))
        ratio = figures[name] / figures[args.kv[0]]
        print(
            f"{args.model} {args.dtype}, KV {name}: perplexity {figures[name]:.4f} over {tokens} "
            f"tokens ({100 * (ratio - 1):+.3f}% of {args.kv[0]}; "
            f"{time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    if args.json:
        found = {"machine": fingerprint(), "tokens": tokens, "perplexity": figures}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
