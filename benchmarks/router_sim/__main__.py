"""`python -m benchmarks.router_sim`: the router's policies against each other, as tables.

waits: the 99th percentile of the time in queues over that of one queue for all engines, first come,
first served, each request to the fastest engine that can start it. Its policies know requests'
lengths about (a router sees bytes) and never those of answers.
turns: how much of conversations' prompts four engines find in their caches, over what one engine
finds that is as large as they are together.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.router_sim import multi_turn, queues
from benchmarks.router_sim.engines import Machine
from router.policies import POLICIES

FLEETS: dict[str, tuple[Machine, ...]] = {
    "mixed": queues.EIGHT,
    "compute": tuple(replace(m, kv_tokens=10 * m.kv_tokens) for m in queues.EIGHT),
    "memory": tuple(replace(m, kv_tokens=m.kv_tokens // 3) for m in queues.EIGHT),
}
"""What requests wait for: either, prompts of others (KV in plenty), KV."""
CACHES = (30_000, 60_000, 200_000)


def waits(args: argparse.Namespace) -> None:
    for fleet in args.fleets:
        machines = FLEETS[fleet]
        capacity = queues.capacity(machines)
        print(f"\n{fleet}: capacity {capacity:.0f} requests/s\n")
        columns = [(load, routers) for load in args.loads for routers in args.routers]
        heads = [f"{load:.0%}, {routers} router(s)" for load, routers in columns]
        print(f"| policy | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}")
        single = {
            load: [one(machines, load, seed, args) for seed in args.seeds] for load in args.loads
        }
        shown = [f"{statistics.mean(single[load]):.3f} s" for load, _ in columns]
        print(f"| one queue, p99 | {' | '.join(shown)} |", flush=True)
        for name in args.policies:
            cells = []
            for load, routers in columns:
                found = [
                    one(machines, load, seed, args, name, routers) / best
                    for seed, best in zip(args.seeds, single[load], strict=True)
                ]
                cells.append(f"{statistics.mean(found):.2f} ({min(found):.2f}-{max(found):.2f})")
            print(f"| {name} | {' | '.join(cells)} |", flush=True)


def one(
    machines: Sequence[Machine],
    load: float,
    seed: int,
    args: argparse.Namespace,
    policy: str = "",
    routers: int = 1,
) -> float:
    """The 99th percentile of the wait; of one queue without a policy."""
    jobs = queues.workload(args.requests, load * queues.capacity(machines), seed)
    if policy:
        queues.routed(
            machines, jobs, POLICIES[policy], routers=routers, interval=args.interval_ms / 1e3
        )
    else:
        queues.single_queue(machines, jobs)
    return queues.percentile(jobs, 0.99)


def turns(args: argparse.Namespace) -> None:
    machines = (queues.MEDIUM,) * 4
    workload = multi_turn.Conversations(count=args.conversations)
    print(f"\nconversations over 4 engines: {workload}\n")
    heads = [f"cache of {cache:,} tokens each" for cache in CACHES]
    print(f"| policy | {' | '.join(heads)} |\n|{' --- |' * (len(heads) + 1)}")
    whole = [
        multi_turn.run(workload, [multi_turn.pooled(machines)], 4 * cache, POLICIES["round-robin"])
        for cache in CACHES
    ]
    print(f"| one engine, hit rate | {' | '.join(f'{o.hit_rate:.3f}' for o in whole)} |")
    for name in args.policies:
        cells = []
        for cache, best in zip(CACHES, whole, strict=True):
            found = multi_turn.run(workload, machines, cache, POLICIES[name])
            cells.append(
                f"{found.hit_rate / best.hit_rate:.2f}, p99 wait {found.p99_wait:.2f} s, "
                f"shares {min(found.shares):.2f}-{max(found.shares):.2f}"
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.router_sim", description=__doc__)
    parser.add_argument("what", nargs="?", choices=("waits", "turns", "all"), default="all")
    parser.add_argument("--policies", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--fleets", nargs="+", choices=list(FLEETS), default=list(FLEETS))
    parser.add_argument("--loads", nargs="+", type=float, default=[0.8, 0.9])
    parser.add_argument("--routers", nargs="+", type=int, default=[1, 3])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--interval-ms", type=float, default=200.0, help="between snapshots")
    parser.add_argument("--conversations", type=int, default=400)
    args = parser.parse_args()
    if args.what in ("waits", "all"):
        waits(args)
    if args.what in ("turns", "all"):
        turns(args)


if __name__ == "__main__":
    main()
