"""Who may import whom, in the source and when it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]


def test_contracts_of_import_linter() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed")
    done = subprocess.run([tool], cwd=REPO, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "module",
    [
        "router.app", "router.__main__", "cpu_service.server", "cpu_service.__main__",
        "neo_client.cli", "neo_client.local.launch", "gpu_service.__main__", "kernels.cpu",
    ],
)  # fmt: skip
def test_no_torch_at_run_time(module: str) -> None:
    """Nor transformers, by whatever way: these processes start fast and stay small."""
    code = (
        f"import sys, importlib; importlib.import_module({module!r}); "
        "print(*sorted({'torch', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
