"""What prefix caching costs the engine's thread, and what it saves a conversation.

    python -m benchmarks.prefix                        # costs: no model
    python -m benchmarks.prefix --model smollm2        # time to first token too

Costs: naming a prompt's blocks and looking them up (the best of several), the two done once for a
request that starts; and what an iteration of decode rows takes to be decided and taken in, with and
without the cache in turn, in CPU time, so that others on the machine do not count.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Sequence

from gpu_service.config import GpuServiceConfig
from gpu_service.engine.build import build_core
from gpu_service.engine.core import EngineCore
from gpu_service.engine.messages import SamplingSpec, Submit
from gpu_service.kv.allocator import BlockAllocator
from gpu_service.kv.keys import SECRET_BYTES, BlockKeys, root_key
from gpu_service.scheduling.limits import SchedulerLimits
from gpu_service.scheduling.plan import IterationPlan, SampledToken, SweepResult
from gpu_service.scheduling.scheduler import Scheduler

BLOCK_TOKENS = 16
VOCABULARY = 40_000


def submit(name: str, prompt: Sequence[int], output: int) -> Submit:
    sampling = SamplingSpec(temperature=0.0, max_tokens=output, ignore_eos=True)
    return Submit(
        request_id=name, prompt_token_ids=list(prompt), sampling=sampling, arrival=time.monotonic()
    )


def words(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(100, VOCABULARY) for _ in range(count)]


def best(action: Callable[[], object], times: int = 30) -> float:
    """Microseconds."""
    taken = []
    for _ in range(times):
        begin = time.perf_counter()
        action()
        taken.append(time.perf_counter() - begin)
    return 1e6 * min(taken)


# -- what it costs --------------------------------------------------------------------------------


def name_and_find(tokens: int) -> tuple[float, float]:
    """Microseconds to name a prompt's blocks, and to find all of them."""
    prompt = words(random.Random(1), tokens)
    blocks, root = tokens // BLOCK_TOKENS, root_key(bytes(SECRET_BYTES), "")

    def name() -> list[bytes]:
        return BlockKeys(root, BLOCK_TOKENS).of(lambda start, end: prompt[start:end], blocks)

    pool, keys = BlockAllocator(blocks), name()
    for block, key in zip(pool.allocate(blocks), keys, strict=True):
        pool.publish(block, key)
    assert len(pool.find(keys)) == blocks
    return best(name), best(lambda: pool.find(keys))


def scheduler(caching: bool, rows: int, context: int) -> Scheduler:
    limits = SchedulerLimits(
        gpu_blocks=rows * (context // BLOCK_TOKENS + 1),
        host_blocks=0,
        block_tokens=BLOCK_TOKENS,
        max_context_tokens=context,
        max_batch_tokens=8192,
        max_running=rows,
        prefix_caching=caching,
    )
    return Scheduler(limits)


def advance(made: Scheduler) -> IterationPlan:
    plan = made.schedule(0.0)
    made.launched(plan)
    keys = [key for batch in plan.batches for key in batch.sampled_keys]
    made.update(plan, SweepResult(tokens={key: SampledToken(7) for key in keys}), 0.0)
    made.take_news()
    return plan


def iterations(rows: int, prompt_tokens: int = 200, count: int = 320) -> dict[bool, list[float]]:
    """Microseconds of the scheduler's part of decode iterations, with and without the cache, which
    take turns. Every 16th fills a block of each row."""
    draw = random.Random(2)
    prompts = [words(draw, prompt_tokens) for _ in range(rows)]
    made = {on: scheduler(on, rows, prompt_tokens + count + 64) for on in (False, True)}
    for each in made.values():
        for number, prompt in enumerate(prompts):
            each.submit(submit(f"r{number}", prompt, count + 60), 0.0)
        while any(not choice.is_decoding for choice in each.state.running) or each.waiting_requests:
            advance(each)
    taken: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(count):
        for on, each in made.items():
            begin = time.thread_time()
            advance(each)
            taken[on].append(1e6 * (time.thread_time() - begin))
    return taken


def show_costs() -> None:
    for tokens in (1000, 2000, 4000, 8000):
        named, found = name_and_find(tokens)
        print(f"prompt of {tokens} tokens: named in {named:.0f} us, found in {found:.0f} us")
    taken = iterations(rows := 256)
    for label, pick in (("median", statistics.median), ("mean", statistics.fmean), ("most", max)):
        off, on = pick(taken[False]), pick(taken[True])
        print(f"iteration of {rows} decode rows, {label}: {off:.0f} us without, {on:.0f} us with")


# -- what it saves --------------------------------------------------------------------------------


def answer(core: EngineCore, name: str, prompt: list[int], output: int) -> tuple[float, list[int]]:
    """Seconds to the first token, and the tokens."""
    begin, first, tokens = time.perf_counter(), 0.0, list[int]()
    core.handle(submit(name, prompt, output))
    while core.scheduler.live_requests:
        out = core.step()
        for delta in out.deltas if out else ():
            first = first or time.perf_counter() - begin
            tokens += delta.token_ids
    return first, tokens


def show_conversation(arguments: argparse.Namespace) -> None:
    cores = {}
    for on in (False, True):
        config = GpuServiceConfig(
            model=arguments.model,
            offload="never",
            gpu_kv_blocks=arguments.gpu_kv_blocks,
            prefix_caching=on,
            threads=arguments.threads,
        )
        cores[on] = build_core(config).core
    draw = random.Random(3)
    times: dict[tuple[bool, int], list[float]] = {}
    shares: dict[int, float] = {}
    for talk in range(arguments.talks):
        said = words(draw, arguments.opening)
        for turn in range(arguments.turns):
            said += words(draw, arguments.question)
            answers = {}
            for on in (talk % 2 == 0, talk % 2 == 1):  # neither always goes first
                found = cores[on].scheduler.state.prefix_tokens.found
                first, answers[on] = answer(cores[on], f"{talk}-{turn}", said, arguments.output)
                times.setdefault((on, turn), []).append(first)
                if on:
                    now = cores[on].scheduler.state.prefix_tokens.found
                    shares[turn] = (now - found) / len(said)
            said += answers[False]
    for turn in range(arguments.turns):
        off, on = (1e3 * statistics.median(times[each, turn]) for each in (False, True))
        print(
            f"turn {turn + 1}: TTFT {off:.0f} ms without, {on:.0f} ms with the cache "
            f"({off / on:.1f} times), {100 * shares[turn]:.0f}% of the prompt found"
        )
    for core in cores.values():
        core.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="", help="also time a conversation with this model")
    parser.add_argument("--talks", type=int, default=3, help="conversations (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=4, help="of each (default: %(default)s)")
    parser.add_argument("--opening", type=int, default=400, help="tokens before the first question")
    parser.add_argument("--question", type=int, default=40, help="tokens of each question")
    parser.add_argument("--output", type=int, default=40, help="tokens of each answer")
    parser.add_argument("--gpu-kv-blocks", type=int, default=400)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()
    show_costs()
    if arguments.model:
        show_conversation(arguments)


if __name__ == "__main__":
    main()
