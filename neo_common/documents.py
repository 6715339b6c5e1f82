"""JSON and YAML that somebody else wrote: whatever is wrong with it is a ValueError."""

from __future__ import annotations

import json
from typing import Any

import yaml


def from_json(text: str | bytes) -> Any:
    """Raises ValueError saying what is wrong, also where the parser itself gives up."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def from_yaml(text: str | bytes) -> Any:
    """Raises ValueError saying what is wrong, also where the parser itself gives up."""
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    # Values that are not of the type they claim (`!!int ''`, `!!timestamp x`, `!!bool x`).
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"it holds a value that cannot be read: {error}") from None
