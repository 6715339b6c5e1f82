"""Copies of a module with one piece of its source changed, to prove that a test can fail."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


def mutated(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """`module` with every `old` in its source replaced by `new`, as a file in `folder`: Triton
    compiles kernels from their files."""
    source = Path(str(module.__file__)).read_text()
    if old not in source:  # not an assertion: those are what a mutant is expected to raise
        raise LookupError(f"the mutant no longer applies: {old!r}")
    path = folder / f"mutated_{module.__name__.rpartition('.')[2]}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    # A dataclass looks its module up while it is being defined.
    sys.modules[spec.name] = copy
    try:
        spec.loader.exec_module(copy)
    finally:
        del sys.modules[spec.name]
    return copy
