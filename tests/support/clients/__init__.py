"""Other projects' clients, run as processes: their stubs register the same symbols as ours."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from tests.support.stack import REPO


def run_client(name: str, address: str) -> dict[str, Any]:
    """What `tests.support.clients.<name>` found out, scenario by scenario."""
    done = subprocess.run(
        [sys.executable, "-m", f"tests.support.clients.{name}", address],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
