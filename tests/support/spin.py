"""Models in Promela, searched by spin for a state that breaks an assertion or in which all wait."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.prometheus import binary

DEPTH = 3_000_000
"""Steps from the first state that a search goes: 54 bytes of memory each."""


@dataclass(frozen=True)
class Search:
    errors: int
    states: int
    why: str
    """What spin says of the first error; "" without one."""


def search(
    model: Path, folder: Path, *defines: str, changes: Iterable[tuple[str, str]] = ()
) -> Search:
    """All states of `model`, or those up to the first error. `changes`: pieces of its text and what
    stands there instead, for mutants."""
    text = model.read_text()
    for old, new in changes:
        if old not in text:  # not an assertion: a mutant is expected to fail one
            raise LookupError(f"the mutant no longer applies: {old!r}")
        text = text.replace(old, new)
    (folder / "model.pml").write_text(text)
    options = [f"-D{define}" for define in defines]
    _run(folder, binary("spin"), *options, "-a", "model.pml")
    compiler = shutil.which("cc")
    assert compiler, "needs a C compiler"
    # Mutants fail soon: there the compiler takes longest.
    _run(folder, compiler, "-O0" if changes else "-O1", "-w", "-DSAFETY", "-o", "pan", "pan.c")
    said = _run(folder, str(folder / "pan"), f"-m{DEPTH}", "-w22")
    assert "max search depth too small" not in said, said
    errors, states = re.search(r"errors: (\d+)", said), re.search(r"(\d+) states, stored", said)
    assert errors, said
    assert states, said
    why = re.search(r"^pan:\d+: (.*)$", said, re.MULTILINE)
    return Search(int(errors[1]), int(states[1]), why[1] if why else "")


def _run(folder: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout
