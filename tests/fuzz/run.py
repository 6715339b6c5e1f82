"""Runs one fuzzer: `python -m tests.fuzz.run --target gguf --seconds 3600`.

With atheris (`pip install atheris`) inputs are chosen by the coverage that they reach in our
Python; without it, or with `--engine plain`, they are changes of the seeds alone. Those in C++
(`worker`, `channel`) are built with clang: libFuzzer, AddressSanitizer, UndefinedBehaviorSanitizer.

The corpus and inputs that were findings are kept in build/fuzz/TARGET; `--input FILE` runs one
again.
"""

from __future__ import annotations

import argparse
import importlib
import pkgutil
import random
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.fuzz.mutate import mutated
from tests.fuzz.target import Target

OURS = ("router", "neo_common", "neo_http", "neo_client", "neo_plan", "gpu_service", "cpu_service")
KEPT = Path(__file__).resolve().parents[2] / "build" / "fuzz"
EXTRA_MEMORY = 1 << 30
"""Address space beside what is mapped when the run begins."""
REPORT_SECONDS = 60.0
MAX_KINDS = 50
"""Of findings, told apart by where they were raised."""


def names() -> list[str]:
    from tests.fuzz import targets

    return sorted(module.name for module in pkgutil.iter_modules(targets.__path__))


def load(name: str) -> Target:
    target: Target = importlib.import_module(f"tests.fuzz.targets.{name}").TARGET
    return target


def bound_memory() -> None:
    """An input that wants without end gets a MemoryError, which is a finding."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + EXTRA_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def changes(target: Target, seed: int) -> Callable[[], bytes]:
    """The plain engine: each call gives another input, the same ones for the same seed."""
    dice = random.Random(seed)
    corpus = list(target.seeds())
    return lambda: mutated(target, dice.choice(corpus), corpus, dice)


def run_plain(target: Target, seconds: float, seed: int) -> int:
    """Goes on behind findings; each place in the code is told once."""
    folder = KEPT / target.name
    folder.mkdir(parents=True, exist_ok=True)
    make, begin, runs = changes(target, seed), time.monotonic(), 0
    found: set[str] = set()
    while time.monotonic() - begin < seconds and len(found) < MAX_KINDS:
        data = make()
        runs += 1
        try:
            target.run(data)
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                break
            frames = traceback.extract_tb(error.__traceback__)[-1:]
            place = f"{type(error).__name__} {frames[0].filename}:{frames[0].lineno}"
            if place not in found:
                found.add(place)
                path = folder / f"finding-{len(found)}"
                path.write_bytes(data)
                print(f"--- {path}: {place}: {str(error)[:300]}", flush=True)
                traceback.print_exc(limit=-4)
    took = time.monotonic() - begin
    print(f"{target.name}: plain, seed {seed}: {runs} runs in {took:.0f} s, {len(found)} findings")
    return int(bool(found))


def run_guided(name: str, seconds: float, extra: Sequence[str]) -> None:
    """Ends at the first finding. Does not return."""
    import atheris

    with atheris.instrument_imports(include=list(OURS)):
        target = load(name)
        seeds = target.seeds()
        for seed in seeds:
            target.run(seed)  # what is imported within functions, too
    folder = KEPT / name / "corpus"
    folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (folder / f"seed-{number}").write_bytes(seed)

    def change(data: bytes, most: int, seed: int) -> bytes:
        dice = random.Random(seed)
        if dice.random() < 0.5:
            guided: bytes = atheris.Mutate(data, most)
            return guided
        return mutated(target, data, seeds, dice)[:most]

    arguments = [
        sys.argv[0],
        str(folder),
        f"-max_total_time={seconds:.0f}",
        f"-max_len={target.max_bytes}",
        f"-artifact_prefix={folder.parent}/",
        "-print_final_stats=1",
        "-rss_limit_mb=0",
        "-timeout=60",
        *extra,
    ]
    bound_memory()
    atheris.Setup(arguments, target.run, custom_mutator=change)
    atheris.Fuzz()


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run")
    parser.add_argument("--target", help=f"one of {', '.join([*names(), *_native().NAMES])}")
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--engine", choices=("guided", "plain"), default="guided")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--input", type=Path, help="run this file alone")
    given, extra = parser.parse_known_args(argv)
    if given.target in _native().NAMES:
        return int(_native().run(given.target, given.seconds, KEPT, given.input, extra))
    if given.target not in names():
        parser.error(f"--target must be one of {', '.join([*names(), *_native().NAMES])}")
    if given.input is not None:
        load(given.target).run(given.input.read_bytes())
        return 0
    if given.engine == "guided":
        run_guided(given.target, given.seconds, extra)
    target = load(given.target)
    for seed in target.seeds():
        target.run(seed)
    bound_memory()
    return run_plain(target, given.seconds, given.seed)


def _native() -> Any:
    return importlib.import_module("tests.fuzz.native")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
