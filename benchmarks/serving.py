"""The whole stack against transformers in one run: router -> gpu_service -> cpu_service, here.

    python -m benchmarks.serving --model smollm2 --concurrency 1,8

Cases, interleaved `--rounds` times so that a noisy machine treats them alike:

- `transformers`: `model.generate`, greedy, one static batch of prompts of equal length;
- `stack/never`:  `neo serve --offload never`, as many streams at once through the router;
- `stack/always`: `neo serve --offload always`: every decode attention in the cpu_service, over
  shared memory.

Only one case's processes are alive at a time. Prints output tokens per second (median, best) and
the ratios that count.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path

import grpc

from benchmarks.stack import one_stream, stack
from protos.neo.v1 import inference_pb2_grpc


def prompts(count: int, tokens: int, vocab_size: int, seed: int) -> list[list[int]]:
    """Random prompts, so that no prefix is shared."""
    draw = random.Random(seed)
    return [[draw.randrange(1000, vocab_size - 1000) for _ in range(tokens)] for _ in range(count)]


async def drive(address: str, batch: list[list[int]], output: int) -> dict[str, float]:
    async with grpc.aio.insecure_channel(address) as channel:
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        started = time.perf_counter()
        results = await asyncio.gather(*(one_stream(stub, prompt, output) for prompt in batch))
        seconds = time.perf_counter() - started
    tokens = sum(t for t, _ in results)
    assert tokens == len(batch) * output, f"{tokens} tokens instead of {len(batch) * output}"
    return {
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "host_tokens": sum(h for _, h in results),
    }


def run_stack(args: argparse.Namespace, offload: str, seed: int) -> dict[int, dict[str, float]]:
    figures = {}
    flags = ["--offload", offload, "--dtype", args.dtype, *args.serve_flag]
    with stack(args.model, flags) as address:
        asyncio.run(
            drive(address, prompts(2, args.prompt_tokens, args.vocab, seed + 99), 8)
        )  # warm up
        for concurrency in args.concurrency:
            batch = prompts(concurrency, args.prompt_tokens, args.vocab, seed)
            figures[concurrency] = asyncio.run(drive(address, batch, args.output_tokens))
            if offload == "always":
                assert figures[concurrency]["host_tokens"] > 0, "nothing ran on the host tier"
    return figures


def run_transformers(args: argparse.Namespace, seed: int) -> dict[int, dict[str, float]]:
    """In a process of its own, so that its threads and memory are gone before the next case."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.serving",
        "--transformers-child",
        "--seed",
        str(seed),
    ]
    command += ["--model", args.model, "--dtype", args.dtype]
    command += [
        "--prompt-tokens",
        str(args.prompt_tokens),
        "--output-tokens",
        str(args.output_tokens),
    ]
    command += ["--concurrency", ",".join(map(str, args.concurrency)), "--vocab", str(args.vocab)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return {int(k): v for k, v in json.loads(out.splitlines()[-1]).items()}


def transformers_child(args: argparse.Namespace) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from gpu_service.model.spec import resolve_model

    path = Path(resolve_model(args.model))
    dtype = getattr(torch, args.dtype)
    if path.suffix == ".gguf":
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model = model.eval()
    figures = {}
    with torch.inference_mode():
        for concurrency in [1, *args.concurrency]:  # the first one warms up
            ids = torch.tensor(prompts(concurrency, args.prompt_tokens, args.vocab, args.seed))
            started = time.perf_counter()
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=args.output_tokens,
                max_new_tokens=args.output_tokens,
                pad_token_id=0,
            )
            seconds = time.perf_counter() - started
            tokens = (out.shape[1] - args.prompt_tokens) * concurrency
            figures[concurrency] = {"seconds": seconds, "tokens_per_second": tokens / seconds}
    print(json.dumps(figures))


def report(
    args: argparse.Namespace, results: dict[str, list[dict[int, dict[str, float]]]]
) -> dict[str, object]:
    table: dict[str, object] = {}
    for concurrency in args.concurrency:
        rates = {
            case: [r[concurrency]["tokens_per_second"] for r in runs]
            for case, runs in results.items()
        }
        median = {case: statistics.median(values) for case, values in rates.items()}
        line = "  ".join(
            f"{case} {median[case]:7.1f} (best {max(rates[case]):.1f})" for case in rates
        )
        print(f"concurrency {concurrency:3d}  output tok/s: {line}")
        ratios = {
            "never / transformers": median["stack/never"] / median["transformers"],
            "always / transformers": median["stack/always"] / median["transformers"],
            "always / never": median["stack/always"] / median["stack/never"],
        }
        print(
            "               " + "  ".join(f"{name} {value:.2f}" for name, value in ratios.items())
        )
        table[str(concurrency)] = {"rates": rates, "ratios": ratios}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument(
        "--concurrency", type=lambda s: [int(x) for x in s.split(",")], default=[1, 8]
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vocab", type=int, default=49152, help="vocabulary to draw prompts from")
    parser.add_argument(
        "--serve-flag", action="append", default=[], help="passed on to `neo serve`; repeatable"
    )
    parser.add_argument("--json", type=Path, help="write all figures here")
    parser.add_argument("--transformers-child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.transformers_child:
        transformers_child(args)
        return
    results: dict[str, list[dict[int, dict[str, float]]]] = {
        "transformers": [],
        "stack/never": [],
        "stack/always": [],
    }
    for round_number in range(args.rounds):
        seed = args.seed + round_number
        results["transformers"].append(run_transformers(args, seed))
        results["stack/never"].append(run_stack(args, "never", seed))
        results["stack/always"].append(run_stack(args, "always", seed))
        print(f"round {round_number + 1} of {args.rounds} done", file=sys.stderr, flush=True)
    table = report(args, results)
    if args.json:
        args.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
