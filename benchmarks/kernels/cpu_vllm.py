"""vLLM's CPU paged attention on the cases of `cpu_attention`, timed by vLLM's own interpreter.

`cpu_attention --vllm-python PATH` runs this file there (the two need different torch builds), one
case as JSON on stdin, one answer as JSON on stdout. Nothing of this repository is imported.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
import time
from typing import Any

import torch

BLOCK_TOKENS = 128  # vLLM's default on CPUs


def measure(case: dict[str, int], dtype: torch.dtype, repeats: int) -> dict[str, object]:
    # By name: nothing of vLLM is installed where this file is checked.
    ops: Any = importlib.import_module("vllm._custom_ops")
    backend: Any = importlib.import_module("vllm.v1.attention.backends.cpu_attn")
    rows, context, dim = case["rows"], case["context"], case["head_dim"]
    heads, kv_heads = case["query_heads"], case["kv_heads"]
    per_row = math.ceil(context / BLOCK_TOKENS)
    # The layout of its backend: K and V of one head of one block side by side.
    cache = torch.zeros(rows * per_row, kv_heads, 2 * BLOCK_TOKENS, dim, dtype=dtype)
    key_cache, value_cache = cache.chunk(2, dim=2)
    isa = backend._get_attn_isa(dtype, BLOCK_TOKENS, dim)
    tables = torch.randperm(rows * per_row, dtype=torch.int32).view(rows, per_row)
    for row in range(rows):
        k, v = torch.randn(2, context, kv_heads, dim).to(dtype).unbind()
        at = torch.arange(context)
        slots = tables[row, at // BLOCK_TOKENS].long() * BLOCK_TOKENS + at % BLOCK_TOKENS
        ops.cpu_attn_reshape_and_cache(k, v, key_cache, value_cache, slots, isa)
    query = torch.randn(rows, heads, dim).to(dtype)
    output = torch.empty_like(query)
    lengths = torch.full((rows,), context, dtype=torch.int32)
    starts = torch.arange(rows + 1, dtype=torch.int32)
    # Once for all layers of a forward pass, so not part of what is timed.
    plan = ops.cpu_attn_get_scheduler_metadata(
        num_reqs=rows, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, seq_lens=lengths,
        dtype=dtype, query_start_loc=starts, causal=True, sliding_window_size=-1, isa=isa,
        enable_kv_split=True,
    )  # fmt: skip
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        ops.cpu_attention_with_kv_cache(
            query=query, key_cache=key_cache, value_cache=value_cache, output=output,
            query_start_loc=starts, seq_lens=lengths, scale=dim**-0.5, causal=True,
            alibi_slopes=None, sliding_window=-1, block_table=tables, softcap=0.0,
            scheduler_metadata=plan, s_aux=None,
        )  # fmt: skip
        times.append(time.perf_counter() - start)
    return {"us": min(times) * 1e6, "isa": isa, "finite": bool(output.isfinite().all())}


def main() -> None:
    case = json.load(sys.stdin)
    torch.set_num_threads(case["threads"])
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[case["dtype"]]
    print(json.dumps(measure(case, dtype, case["repeats"])))


if __name__ == "__main__":
    main()
