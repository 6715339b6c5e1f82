"""Each fuzzer for a moment: its seeds, then the same changes of them in every run. Long runs are
`python -m tests.fuzz.run`; what they found is in test_findings.py."""

from __future__ import annotations

import pytest

from tests.fuzz.run import changes, load, names

SLOW = 5.0
"""CPU seconds: machines that run tests may be slow ones."""


@pytest.mark.parametrize("name", names())
def test_no_input_is_a_finding(name: str) -> None:
    target = load(name)
    for seed in target.seeds():
        target.run(seed, SLOW)
    make = changes(target, seed=1)
    for _ in range(target.smoke):
        target.run(make(), SLOW)
