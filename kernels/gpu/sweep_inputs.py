"""The first kernels of a sweep: block tables laid out, and the embeddings of its tokens.

The host sends the block ids of all sequences one behind the other, as many bytes as there are
blocks; attention wants a table of fixed width, whose address and stride a CUDA graph can keep.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.tensors import FLOATS, check

_CHUNK = 1024


@triton.jit
def _expand_tables_kernel(
    blocks_ptr,  # int32, all sequences' block ids
    starts_ptr,  # int32 [sequences]
    counts_ptr,  # int32 [sequences]
    tables_ptr,  # int32 [sequences, width]
    width,
    CHUNK: tl.constexpr,
):
    sequence = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
    ok = at < tl.load(counts_ptr + sequence)
    block = tl.load(blocks_ptr + tl.load(starts_ptr + sequence) + at, mask=ok)
    tl.store(tables_ptr + sequence * width + at, block, mask=ok)


def expand_tables(
    blocks: torch.Tensor, starts: torch.Tensor, counts: torch.Tensor, tables: torch.Tensor
) -> None:
    """`tables[s, i] = blocks[starts[s] + i]` for `i < counts[s]`; the rest is left as it is.

    All int32: blocks `[any]`, starts and counts `[sequences]`, tables `[sequences, width]` with
    `counts <= width`.
    """
    sequences, width = tables.shape
    check("blocks", blocks, (-1,), torch.int32)
    check("starts", starts, (sequences,), torch.int32)
    check("counts", counts, (sequences,), torch.int32)
    check("tables", tables, (-1, -1), torch.int32)
    chunk = min(_CHUNK, triton.next_power_of_2(width))
    grid = (sequences, triton.cdiv(width, chunk))
    _expand_tables_kernel[grid](blocks, starts, counts, tables, width, CHUNK=chunk, num_warps=4)


@triton.jit
def _embed_kernel(
    token_ids_ptr,  # int64 [rows]
    sources_ptr,  # int32 [rows]; -1: the id is known
    drawn_ptr,  # int64: tokens that the sweep before drew
    table_ptr,  # [vocabulary, WIDTH]
    out_ptr,  # [rows, WIDTH]
    WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(sources_ptr + row)
    known = tl.load(token_ids_ptr + row)
    drawn = tl.load(drawn_ptr + tl.maximum(source, 0))
    # A draw that failed is -1; its row runs on any token, and its result is not looked at.
    token = tl.maximum(tl.where(source < 0, known, drawn), 0)
    at = tl.arange(0, WIDTH_PAD)
    ok = at < WIDTH
    tl.store(out_ptr + row * WIDTH + at, tl.load(table_ptr + token * WIDTH + at, mask=ok), mask=ok)


def embed(
    token_ids: torch.Tensor,
    sources: torch.Tensor,
    drawn: torch.Tensor,
    table: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`out[r] = table[token]`, where token is `token_ids[r]`, or `drawn[sources[r]]` unless
    `sources[r]` is -1.

    token_ids: int64 `[rows]`. sources: int32 `[rows]`. drawn: int64 `[any]`. table: `[vocabulary,
    width]`. out: `[rows, width]`. Ids must be within the vocabulary; negative ones read row 0.
    """
    rows, width = out.shape
    check("token_ids", token_ids, (rows,), torch.int64)
    check("sources", sources, (rows,), torch.int32)
    check("drawn", drawn, (-1,), torch.int64)
    check("table", table, (-1, width), *FLOATS)
    check("out", out, (rows, width), table.dtype)
    padded = triton.next_power_of_2(width)
    _embed_kernel[(rows,)](
        token_ids, sources, drawn, table, out, WIDTH=width, WIDTH_PAD=padded, num_warps=4
    )
