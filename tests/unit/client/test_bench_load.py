"""What `neo bench` asks for: sessions from options."""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from neo_client.bench.load import Wishes, fitted, longest, make_sessions, read_prompts
from neo_client.bench.prompts import PromptMaker
from neo_client.workloads import Lengths


def sessions(**wishes: Any) -> list[Any]:
    made = make_sessions(Wishes(**wishes))
    assert isinstance(made, list)
    return made


def test_an_open_loop_knows_when_each_request_is_due() -> None:
    made = sessions(rate=10.0, requests=30, workload="50x5", seed=4)
    assert made == sessions(rate=10.0, requests=30, workload="50x5", seed=4)
    assert made != sessions(rate=10.0, requests=30, workload="50x5", seed=5)
    assert [each.number for each in made] == list(range(30))
    assert all(45 <= each.turns[0].prompt <= 55 for each in made)
    dues = [each.due for each in made]
    assert dues == sorted(dues)


def test_a_rate_for_a_time_has_no_number_of_requests() -> None:
    made = sessions(rate=100.0, duration=3.0)
    assert 200 < len(made) < 400
    assert max(each.due for each in made) < 3
    assert len(sessions(rate=100.0, duration=3.0, requests=7)) == 7


def test_a_trace_gives_times_and_lengths_or_times_alone() -> None:
    own = sessions(trace="azure_conv_2023", requests=50, speed=2.0)
    assert own[0].turns == (Lengths(374, 44),)
    other = sessions(trace="azure_conv_2023", requests=50, speed=2.0, workload="10x2")
    assert [each.due for each in own] == [each.due for each in other]
    assert all(each.turns[0].prompt <= 11 for each in other)
    assert len(sessions(trace="azure_conv_2023", duration=60.0)) < 2000


def test_a_closed_loop_has_no_times_and_ends_by_number_or_by_time() -> None:
    made = sessions(requests=5)
    assert [each.due for each in made] == [None] * 5
    endless = make_sessions(Wishes(duration=1.0, workload="4x2"))
    taken = list(islice(endless, 500))
    assert [each.number for each in taken] == list(range(500))


def test_turns_and_shared_prefixes() -> None:
    made = sessions(requests=6, turns=3, prefix_tokens=20, prefixes=2, workload="10x4")
    assert all(len(each.turns) == 3 for each in made)
    assert Counter(each.prefix for each in made) == {0: 3, 1: 3}
    assert longest(made[0], 20) == 20 + sum(t.prompt + t.output for t in made[0].turns)


@pytest.mark.parametrize(
    ("wishes", "problem"),
    [
        ({"rate": 1.0, "trace": "azure_conv_2023"}, "exclude"),
        ({"ramp": (1.0, 2.0)}, "duration"),
        ({"rate": 1.0, "duration": 0.0}, "duration"),
        ({"rate": 1e-9, "duration": 1.0}, "no request"),
        ({"requests": 0}, "requests"),
        ({"turns": 0}, "turns"),
        ({"prefix_tokens": 4, "prefixes": 0}, "prefixes"),
        ({"prompts": "x", "workload": "1x1"}, "prompts"),
        ({"prompts": "x", "turns": 2}, "prompts"),
        ({"prompts": "no-such-file"}, "cannot read"),
    ],
)
def test_wishes_that_cannot_be(wishes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        make_sessions(Wishes(**wishes))


# -- prompts ---------------------------------------------------------------------------------


def test_prompts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    chat = [{"role": "user", "content": "Hi"}]
    lines = [
        {"text": "Once", "max_tokens": 3},
        {"messages": chat, "max_tokens": 4},
        {"token_ids": [5, 6], "max_tokens": 2},
    ]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    made = sessions(prompts=str(path))
    assert [each.prompt for each in made] == ["Once", chat, [5, 6]]
    assert [each.turns[0].output for each in made] == [3, 4, 2]
    assert [each.prompt for each in sessions(prompts=str(path), requests=4)][3] == "Once"


@pytest.mark.parametrize(
    "line",
    ["", "nonsense", '{"text": "a"}', '{"max_tokens": 1}', '{"text": "", "max_tokens": 1}',
     '{"text": "a", "token_ids": [1], "max_tokens": 1}', '{"text": "a", "max_tokens": 0}', "[1]"],
)  # fmt: skip
def test_files_that_are_no_prompts(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match="prompts"):
        read_prompts(str(path))


def test_made_up_prompts_depend_on_seed_and_place_alone() -> None:
    one, two = (PromptMaker(1000, [300, 301], 8, seed) for seed in (1, 2))
    again = PromptMaker(1000, [300, 301], 8, 1)
    assert one.turn(3, 0, 50) == again.turn(3, 0, 50) != two.turn(3, 0, 50)
    assert one.turn(3, 0, 50) != one.turn(3, 1, 50) != one.turn(4, 0, 50)
    assert one.prefix(0) == again.prefix(0) != one.prefix(1)
    assert len(one.prefix(0)) == 8
    every = {token for number in range(200) for token in one.turn(number, 0, 50)}
    assert every == set(range(256, 1000)) - {300, 301}


def test_small_vocabularies_are_used_almost_whole() -> None:
    assert set(PromptMaker(8, [2], 0, 0).turn(0, 0, 500)) == {1, 3, 4, 5, 6, 7}
    PromptMaker(0, [], 0, 0)  # of no use, and no error: prompts may come from a file


# -- requests that do not fit ----------------------------------------------------------------


def test_what_is_too_long_is_refused_left_out_or_shortened() -> None:
    made = sessions(requests=40, workload="100x20", turns=2, prefix_tokens=10)
    limit = 250
    long = [each for each in made if longest(each, 10) > limit]
    assert 0 < len(long) < 40
    with pytest.raises(ValueError, match=f"{len(long)} of 40 .*--too-long"):
        fitted(made, limit, 10, "fail")
    left, count = fitted(made, limit, 10, "skip")
    assert (len(left), count) == (40 - len(long), len(long))
    short, count = fitted(made, limit, 10, "clip")
    assert (len(short), count) == (40, len(long))
    assert all(longest(each, 10) <= limit for each in short)
    assert [each for each in short if each in made] == left
    assert fitted(made, 10_000, 10, "fail") == (made, 0)


def test_nothing_is_left() -> None:
    made = sessions(requests=3, workload="100x20")
    with pytest.raises(ValueError, match="every request"):
        fitted(made, 10, 0, "skip")
    with pytest.raises(ValueError, match="no room"):
        fitted(made, 1, 0, "clip")
