"""This distribution's version."""

from __future__ import annotations

from importlib import metadata

DISTRIBUTION = "neo-serving"


def version() -> str:
    """Such as "2026.11.0"; "unknown" when the packages run from a tree that is not installed."""
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "unknown"
