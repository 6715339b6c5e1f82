"""Files that the benchmark and the planner read: traces, lengths, prompts, profiles, results."""

from __future__ import annotations

import json

from neo_client.bench.load import read_prompts
from neo_client.bench.result import read as read_result
from neo_client.workloads import read_workload
from neo_client.workloads.traces import read_trace
from neo_common.machine.report import load as load_report
from neo_plan.demand import demand_of
from neo_plan.simulator.profile import PROFILES, read_profile
from tests.fuzz import files
from tests.fuzz.target import Target, clear

_HEAD = b"TIMESTAMP,ContextTokens,GeneratedTokens\n"


def _one(data: bytes) -> None:
    path = str(files.file("bench.txt", data[1:]))
    kind = data[:1]
    try:
        if kind == b"t":
            read_trace(path)
            demand_of(None, "1x1", path, 0, 4096)[0].part(2.0, 5)
        elif kind == b"w":
            read_workload(path, 2)
        elif kind == b"n":
            read_workload(data[1:].decode("latin-1"), 3)
        elif kind == b"p":
            for shape in read_prompts(path):
                assert isinstance(shape.prompt, str | list)
        elif kind == b"r":
            read_result(path)
        elif kind == b"m":
            load_report(path)
        else:
            profile = read_profile(path)
            profile.gpu.dense_ms.at(17)
    except ValueError as error:
        clear(error)


def seeds() -> list[bytes]:
    rows = b"2023-11-16 18:17:03.9799600,374,44\n2023-11-16 18:17:04.0319600,396,109\n"
    prompts = [
        {"text": "a b", "max_tokens": 4},
        {"token_ids": [1, 2], "max_tokens": 2},
        {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2},
    ]
    lines = "\n".join(json.dumps(each) for each in prompts)
    return [
        b"t" + _HEAD + rows,
        b"t" + _HEAD + rows[:35] * 3,
        b"w[[1, 2], [3, 4], [5, 6]]",
        b"n1000x200",
        b"p" + lines.encode(),
        b"r" + json.dumps({"schema": "neo-bench/1", "requests": []}).encode(),
        b"m{}",
        b"P" + (PROFILES / "t4.json").read_bytes(),
    ]


_WORDS = (b"1e999", b"9" * 400, b"\0", b"\r", b'"', b"0001-01-01", b"+23:59", b"2e308", b"x")
TARGET = Target("bench_files", _one, seeds, "text", _WORDS, max_bytes=8192)
