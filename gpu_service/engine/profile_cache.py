"""Profiles of this machine on disk, so that only the first start takes the time to measure one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Mapping
from pathlib import Path

import msgspec

from gpu_service.scheduling.rates import HostRates

_LOG = logging.getLogger(__name__)
_VERSION = 2
"""Of what is measured, and how: profiles of other versions are measured again."""
NOWHERE = "none"


class StartProfile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What predictions start from."""

    rates: HostRates
    decode_ms: dict[int, float] = {}
    """Rows -> milliseconds of a sweep of decode rows; as in `SweepCosts`. Empty where the device
    times its sweeps at every start anyway."""
    mixed_ms: dict[int, float] = {}
    """Rows -> milliseconds of a sweep with a chunk of a prompt."""
    context_ms: float = 0.0

    def validate(self) -> None:
        """ValueError where a number cannot be."""
        self.rates.validate()
        times = [*self.decode_ms.values(), *self.mixed_ms.values()]
        if any(not 0 < time < float("inf") for time in times) or not self.context_ms >= 0:
            raise ValueError("a sweep takes more than no time")
        if bool(self.decode_ms) != bool(self.mixed_ms):
            raise ValueError("sweeps with and without prompts belong together")


def hardware() -> dict[str, str]:
    """What identifies the processor, as far as it bears on speed."""
    name = platform.processor()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                name = line.partition(":")[2].strip()
                break
    except OSError:
        pass  # not Linux
    return {"cpu": name, "cores": str(len(os.sched_getaffinity(0)))}


def cache_path(folder: str, facts: Mapping[str, str]) -> Path | None:
    """Where the profile of a machine and model with these `facts` is kept. `folder`: "" means the
    user's cache folder, "none" nowhere."""
    if folder == NOWHERE:
        return None
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neo-serving"
    text = json.dumps({**facts, "version": str(_VERSION)}, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return (Path(folder) if folder else base) / f"profile-{digest}.json"


def load(path: Path | None) -> StartProfile | None:
    """None where there is none that can be used: it is measured then."""
    if path is None:
        return None
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=StartProfile)
        profile.validate()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:  # msgspec's errors are ValueErrors
        _LOG.warning("the profile %s cannot be used and is measured again: %s", path, error)
        return None
    return profile


def store(path: Path | None, profile: StartProfile) -> None:
    """Another process sees the old file or the new one. A folder that cannot be written is told,
    and no reason to stop."""
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(msgspec.json.format(msgspec.json.encode(profile)))
        Path(file.name).replace(path)
    except OSError as error:
        _LOG.warning("the profile cannot be kept in %s: %s", path.parent, error)
