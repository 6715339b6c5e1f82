"""Writes docs/configuration.md from the services' configuration classes.

python docs/reference.py            write
python docs/reference.py --check    exit 1 when the file is not current
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cpu_service.config import CpuServiceConfig
from gpu_service.config import GpuServiceConfig
from neo_common.config import ENVIRONMENT_PREFIX, field_docs, ordered_fields
from router.admission.policy import SharedLimits, TenantLimits
from router.config import RouterConfig

TARGET = Path(__file__).with_name("configuration.md")
CLASSES = {
    "gpu_service": GpuServiceConfig,
    "cpu_service": CpuServiceConfig,
    "router": RouterConfig,
}
TENANTS = """
## The tenants file of a router

YAML, named by the setting `tenants`; [operations.md](operations.md#tenants) has an example and says
what is counted. At its top:
"""
EACH = """
Under `default`, for each tenant that is not named, and under `tenants`, by name:
"""
HEAD = """# Configuration

Written by `python docs/reference.py` from the configuration classes; do not edit.

A setting comes from the YAML file given with `--config FILE`, then from the environment
(`NEO_<NAME>` in capitals), then from a flag (`--name-with-dashes VALUE`); the last one wins. Lists
are comma-separated in environment and flags.
Unknown names are errors in files and flags; in the environment those are that look like a slip of
the pen (`NEO_LISTEM`), since others may be somebody else's. `--print-config` prints the effective
settings.
"""


def render() -> str:
    parts = [HEAD]
    for module, cls in CLASSES.items():
        parts += [f"\n## python -m {module}\n", *table(cls)]
    parts += [TENANTS, *table(SharedLimits), EACH, *table(TenantLimits)]
    return "\n".join(parts) + "\n"


def table(cls: type[Any]) -> list[str]:
    """Its fields, with the strings under them."""
    lines = ["| setting | default | meaning |", "| --- | --- | --- |"]
    docs = field_docs(cls)
    for field in ordered_fields(cls):
        assert docs.get(field.name), f"{cls.__name__}.{field.name} has no docstring"
        default = field.default
        shown = ",".join(map(str, default)) if isinstance(default, tuple) else str(default)
        shown = shown.replace(tempfile.gettempdir(), "$TMPDIR")
        lines.append(
            f"| `{field.name}` | {f'`{shown}`' if shown else 'empty'} | {docs[field.name]} |"
        )
    return lines


def main() -> int:
    assert ENVIRONMENT_PREFIX == "NEO_", "HEAD names it"
    if "--check" not in sys.argv[1:]:
        TARGET.write_text(render())
        return 0
    if TARGET.exists() and TARGET.read_text() == render():
        return 0
    print("docs/configuration.md is not current; run python docs/reference.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
