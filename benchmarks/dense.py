"""The dense layers alone against transformers: one decode sweep without context, batch by batch.

    python -m benchmarks.dense --model smollm2 --batches 1,8,32 --threads 2

Ours is embed, every layer's two projections and the logits, with the queries in the place of
attention's result; transformers is one forward pass over one token a row without a cache. Rounds
are interleaved, so that a noisy machine treats both alike. Prints milliseconds (median, best) and
the ratio of medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers

from gpu_service.model.model import CausalLM, load_model
from gpu_service.model.spec import resolve_model


@torch.inference_mode()
def sweep(model: CausalLM, rows: int) -> torch.Tensor:
    positions = torch.full((rows,), 100)
    state = model.embed(torch.arange(rows))
    for layer in range(model.spec.layers):
        q, _, _ = model.pre_projection(layer, state, positions)
        state = model.post_projection(layer, state, q)
    return model.logits(state)


@torch.inference_mode()
def forward(reference: Any, rows: int) -> torch.Tensor:
    logits: torch.Tensor = reference(torch.arange(rows)[:, None], use_cache=False).logits
    return logits


def load_reference(model: str, dtype: torch.dtype) -> Any:
    path = resolve_model(model)
    load: Any = transformers.AutoModelForCausalLM.from_pretrained
    if path.is_dir():
        return load(path, dtype=dtype).eval()
    plain = transformers.GgufConfig(dequantize=True)
    return load(path.parent, gguf_file=path.name, dtype=dtype, quantization_config=plain).eval()


def milliseconds(work: Callable[[], object], repeats: int) -> list[float]:
    found = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        found.append(1e3 * (time.perf_counter() - started))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2", help="directory, GGUF file or smollm2")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 or float16")
    parser.add_argument("--batches", default="1,8,32", help="rows, separated by commas")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = load_model(args.model, dtype=args.dtype)
    reference = load_reference(args.model, model.dtype)
    for rows in map(int, args.batches.split(",")):
        ours: list[float] = []
        theirs: list[float] = []
        milliseconds(partial(sweep, model, rows), 2)
        milliseconds(partial(forward, reference, rows), 2)
        for _ in range(args.rounds):
            ours += milliseconds(partial(sweep, model, rows), 6)
            theirs += milliseconds(partial(forward, reference, rows), 3)
        mine, other = statistics.median(ours), statistics.median(theirs)
        print(
            f"rows {rows:4}: ours {mine:7.2f} ({min(ours):7.2f}) ms,"
            f" transformers {other:7.2f} ({min(theirs):7.2f}) ms, ratio {other / mine:.2f}"
        )


if __name__ == "__main__":
    main()
