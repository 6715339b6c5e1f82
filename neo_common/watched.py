"""Files that may change while they are in use: certificates, keys."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")

_log = logging.getLogger(__name__)
_Signature = tuple[tuple[int, int, int], ...]


class Watched(Generic[T]):
    """What `load()` made of some files, made again when one of them has changed.

    `load` raises ValueError for files that do not fit; after the first time, that leaves the old
    value in use, with a warning in the log: half of a rotation must stop nobody. Looking costs one
    stat per file. Thread-safe.
    """

    def __init__(self, paths: Sequence[str], load: Callable[[], T]) -> None:
        """Raises ValueError when the files cannot be loaded."""
        self._paths = [Path(path) for path in paths]
        self._load = load
        self._lock = threading.Lock()
        self._seen = self._signature()
        self._value = load()

    def get(self) -> T:
        with self._lock:
            seen = self._signature()
            if seen != self._seen:
                # Noted before the files are read: a change while they are is then seen next time.
                self._seen = seen
                self._reload()
            return self._value

    def _reload(self) -> None:
        try:
            self._value = self._load()
            _log.info("reloaded %s", ", ".join(map(str, self._paths)))
        except ValueError as error:
            _log.warning("kept what was loaded before: %s", error)

    def _signature(self) -> _Signature:
        """Follows links, since Kubernetes swaps a link to update a mounted secret."""
        found = []
        for path in self._paths:
            try:
                stat = path.stat()
                found.append((stat.st_mtime_ns, stat.st_ino, stat.st_size))
            except OSError:
                found.append((0, 0, 0))
        return tuple(found)


def read(path: str, what: str) -> bytes:
    """The file's content. Raises ValueError naming `what`, the setting that it comes from."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{what}: cannot read {path}: {error.strerror}") from error
