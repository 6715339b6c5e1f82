"""The data plane's and the session's protocol (docs/protocol.md) as models, all of whose states are
looked at; and each property is broken by a mutant of the model."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.spin import search

HERE = Path(__file__).parent

MODELS = {
    "bells": ("bells", ()),
    "sweeps, inline": ("sweeps", ("MODE=INLINE", "LAYERS=1")),
    "sweeps, deferred": ("sweeps", ("MODE=DEFERRED", "LAYERS=2")),
    "sweeps, rung by a device": ("sweeps", ("MODE=BY_DEVICE", "LAYERS=1")),
    "session": ("session", ("FAULTS=2", "LAST=5")),
}
LARGER = {
    "sweeps, rung by a device": ("sweeps", ("MODE=BY_DEVICE", "LAYERS=2")),
}
QUICK = {
    "no fence before parking", "abort only wakes", "a worker that stops does not ring",
    "slots are filled too early", "records are written too early",
    "a launch fails and the epoch goes on",
    "nobody waits for the tether", "the tether ends before the worker", "a loss is not told",
}  # fmt: skip
"""Mutants of the default tier; the others are in the slow one."""
Change = tuple[str, str]
MUTANTS: dict[str, tuple[str, list[Change]]] = {
    # bells
    "no fence before parking": ("bells", [("    FENCE(WORKER); /* park */\n", "")]),
    "no fence in the engine's wait": ("bells", [("    FENCE(ENGINE); /* wait_until */\n", "")]),
    "no fence before looking who is parked": (
        "bells",
        [("(by, parked, whose) {\n  FENCE(by);", "(by, parked, whose) {")],
    ),
    "no second look before sleeping": ("bells", [(":: !STOPPING && !HAS_WORK ->", ":: true ->")]),
    "the bell is looked at too late": (
        "bells",
        [
            ("rung[WORKER] = false; /* observed */", "skip;"),
            (
                ":: !STOPPING && !HAS_WORK -> futex_wait",
                ":: !STOPPING && !HAS_WORK -> rung[WORKER] = false; futex_wait",
            ),
        ],
    ),
    "abort only wakes": ("bells", [("aborted = true; RING(OTHER, ENGINE);", "aborted = true;")]),
    "revoke does not ring": (
        "bells", [("ring_if_parked(OTHER, WORKER_PARKED, WORKER); /* revoke */", "skip;")],
    ),
    "a worker that stops does not ring": (
        "bells",
        [("    ring_if_parked(WORKER, ENGINE_PARKED, ENGINE) /* stopped */\n", "    skip\n")],
    ),
    "the worker parks while a device rings": (
        "bells", [(":: !(loaded && plan == BY_DEVICE) ->", ":: true ->")],
    ),
    # sweeps
    "slots are filled too early": ("DEFERRED", [("(2); /* kSlots */", "(3);")]),
    "records are written too early": ("BY_DEVICE", [("(RECORDS); /* kRingRecords */", "(5);")]),
    "one slot": ("DEFERRED", [("* 2 + (n) % 2)", "* 2)")]),
    "done is set before o is there": (
        "INLINE",
        [
            ("out[SLOT(lane, layer, n)] = n; done[BELL(lane, layer)] = n }", "skip };"
             " done[BELL(lane, layer)] = n; out[SLOT(lane, layer, n)] = n;"),
        ],
    ),
    "submitted before q, k, v are there": (
        "INLINE",
        [
            ("d_step { slot[SLOT(lane, layer, n)] = n; submitted[BELL(lane, layer)] = n }",
             "submitted[BELL(lane, layer)] = n; slot[SLOT(lane, layer, n)] = n"),
        ],
    ),
    "doorbells are never freshened": (
        "INLINE", [(":: next % FRESHEN == 0 ->", ":: false ->")],
    ),
    "a sweep is left in the middle": (
        "INLINE", [("      RETIRED(at); /* cancelled */\n", "")],
    ),
    "a launch fails and the epoch goes on": (
        "BY_DEVICE", [("revoked = true; break /* give_up */", "skip")],
    ),
    # session
    "nobody waits for the tether": (
        "session", [(":: ALL_QUIET -> /* await_quiet */", ":: true ->")],
    ),
    "the tether ends before the worker": (
        "session", [(":: RUNS(i) && HAS_ENDED(session[k]) ->", ":: RUNS(i) ->")],
    ),
    "sockets are closed before threads are gone": (
        "session", [("NOBODY_IN(i, e) (home[e] != i || HAS_ENDED(e))", "NOBODY_IN(i, e) true")],
    ),
    "the pool is written while the peer may be": (
        "session", [("core_epoch == view_epoch && view_quiet &&", "core_epoch == view_epoch &&")],
    ),
    "a loss is not told": (
        "session",
        [(":: core != LOST && core_pool != NONE && view_pool != core_pool ->", ":: false ->")],
    ),
    "a dead engine's session stays": (
        "session",
        [("services_end[session[k]] && !engines_end[session[k]] || !alive ||", "")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_no_state_breaks_the_protocol(name: str, tmp_path: Path) -> None:
    model, defines = MODELS[name]
    found = search(HERE / f"{model}.pml", tmp_path, *defines)
    assert found.errors == 0, found.why
    assert found.states > 1_000


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", LARGER)
def test_no_state_of_larger_ones_does(name: str, tmp_path: Path) -> None:
    model, defines = LARGER[name]
    found = search(HERE / f"{model}.pml", tmp_path, *defines)
    print(f"{name}: {found.states} states")
    assert found.errors == 0, found.why


@pytest.mark.parametrize(
    "mutant",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MUTANTS],
)
def test_each_rule_is_needed(mutant: str, tmp_path: Path) -> None:
    model, changes = MUTANTS[mutant]
    defines = ["LAYERS=1", f"MODE={model}"] if model.isupper() else []
    path = HERE / ("sweeps.pml" if model.isupper() else f"{model}.pml")
    assert search(path, tmp_path, *defines, changes=changes).errors == 1
