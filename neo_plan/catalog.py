"""Models that are known by name: shapes without weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODELS = Path(__file__).parent / "models"


@contextmanager
def model_folder(name: str) -> Iterator[str]:
    """A folder with the config of a model of this package, or the path that was given."""
    known = MODELS / f"{name}.json"
    if not known.exists():
        yield name
        return
    with tempfile.TemporaryDirectory(prefix="neo-model-") as folder:
        shutil.copy(known, Path(folder) / "config.json")
        yield folder
