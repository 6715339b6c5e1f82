"""What router, front end and client leave of the engine's throughput: many streams through the
real services.

    python -m benchmarks.services --model llama3-8b --streams 256 --workload 1000x200 \
        --requests 600 -- --load-format dummy

A client of its own process keeps `--streams` requests under way through the router until all are
done, and reads every token. What follows `--` goes to `neo serve`. To compare:
`python -m benchmarks.engine --max-running-requests 256` with the same workload.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from benchmarks.stack import one_stream, stack
from neo_client.fingerprint import fingerprint
from neo_client.workloads import Lengths, read_workload
from neo_plan.catalog import model_folder
from protos.neo.v1 import inference_pb2_grpc


async def drive(
    address: str, lengths: Sequence[Lengths], streams: int, vocabulary: int, seed: int
) -> dict[str, Any]:
    """Requests per second of the whole run and its middle 60%, as in benchmarks.engine."""
    draw = random.Random(seed)
    prompts = [[3 + draw.randrange(vocabulary) for _ in range(at.prompt)] for at in lengths]
    todo = iter(zip(prompts, lengths, strict=True))
    ends: list[float] = []

    async def client(stub: inference_pb2_grpc.InferenceServiceStub) -> None:
        for prompt, request in todo:
            tokens, _ = await one_stream(stub, prompt, request.output)
            assert tokens == request.output, f"{tokens} tokens instead of {request.output}"
            ends.append(time.perf_counter() - started)

    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        started, busy = time.perf_counter(), time.process_time()
        await asyncio.gather(*(client(stub) for _ in range(streams)))
    seconds, fifth = ends[-1], len(ends) // 5
    first, last = ends[fifth], ends[-fifth - 1]
    return {
        "requests": len(lengths),
        "streams": streams,
        "seconds": round(seconds, 3),
        "requests_per_second": round(len(lengths) / seconds, 3),
        "middle_requests_per_second": round((len(ends) - 2 * fifth - 1) / (last - first), 3),
        "output_tokens_per_second": round(sum(at.output for at in lengths) / seconds, 1),
        "client_busy": round((time.process_time() - busy) / seconds, 3),
    }


def give_tokenizer(folder: str) -> int:
    """A model of neo_plan/models has none, and the services want one: a word for each id.
    Returns the vocabulary's size."""
    size = int(json.loads((Path(folder) / "config.json").read_text())["vocab_size"])
    path = Path(folder) / "tokenizer.json"
    if not path.exists():
        words = {f"t{number}": number for number in range(size)}
        Tokenizer(WordLevel(words, unk_token="t0")).save(str(path))
    return size


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="llama3-8b", help="of neo_plan/models, or a path")
    parser.add_argument("--workload", default="1000x200", help="INxOUT or lengths")
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("serve_flags", nargs="*", help="after `--`: for `neo serve`")
    args = parser.parse_args(argv)
    lengths = read_workload(args.workload, args.requests, args.seed)
    with model_folder(args.model) as folder:
        vocabulary = min(30_000, give_tokenizer(folder) - 3)
        with stack(folder, ["--offload", "never", *args.serve_flags]) as address:
            warm_up = read_workload("64x8", 32)
            asyncio.run(drive(address, warm_up, args.streams, vocabulary, args.seed + 1))
            figures = asyncio.run(drive(address, lengths, args.streams, vocabulary, args.seed))
    print(f"{args.model} {args.workload}: {json.dumps(figures)}", flush=True)
    if args.json:
        options = {name: str(value) for name, value in vars(args).items()}
        found = {"machine": fingerprint(), "options": options, "figures": figures}
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
