"""Who of the host's rows attends on the device."""

from __future__ import annotations

import msgspec
import pytest

from gpu_service.scheduling.request import Choice, Request
from gpu_service.scheduling.streaming import streamed
from tests.support.fake_model import submit


def choices(*lengths: int, tpot_ms: dict[int, float] | None = None) -> list[Choice]:
    made = []
    for i, length in enumerate(lengths):
        asked = msgspec.structs.replace(
            submit(f"r{i}", length, 8, arrival=float(i)), tpot_ms=(tpot_ms or {}).get(i)
        )
        made += Request(asked, (), 1000, i).choices
    return made


def keys(found: set[Choice]) -> list[int]:
    return sorted(choice.key for choice in found)


@pytest.mark.parametrize(
    ("blocks", "expected"),
    [(0, []), (1, [1]), (2, [0]), (3, [0, 1]), (6, [0, 1, 2]), (9, [0, 1, 2])],
)
def test_the_oldest_that_fit(blocks: int, expected: list[int]) -> None:
    assert keys(streamed(choices(5, 4, 9), blocks, 4, None)) == expected


def test_promises_that_the_host_does_not_keep_come_first() -> None:
    ready = choices(4, 4, 4, tpot_ms={1: 50.0, 2: 5.0})
    assert keys(streamed(ready, 1, 4, 20.0)) == [2]
    assert keys(streamed(ready, 2, 4, 20.0)) == [0, 2]
    # Nobody knows what the host keeps.
    assert keys(streamed(ready, 2, 4, None)) == [1, 2]


def test_too_long_a_one_holds_nobody_back() -> None:
    assert keys(streamed(choices(40, 4, 4), 2, 4, None)) == [1, 2]
