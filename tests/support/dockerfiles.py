"""Dockerfiles, read without Docker: instructions by stage, and a stage run in a scratch folder."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DOCKER = REPO / "deploy/docker"
IMAGES = ("router", "cpu", "gpu")


@dataclass(frozen=True)
class Instruction:
    keyword: str
    text: str


@dataclass
class Stage:
    name: str
    base: str
    instructions: list[Instruction] = field(default_factory=list)

    def all(self, keyword: str) -> list[str]:
        return [each.text for each in self.instructions if each.keyword == keyword]

    @property
    def environment(self) -> dict[str, str]:
        pairs = (pair for text in self.all("ENV") for pair in text.split())
        return dict(pair.split("=", 1) for pair in pairs)

    @property
    def entrypoint(self) -> list[str]:
        return [str(word) for word in json.loads(self.all("ENTRYPOINT")[-1])]


@dataclass(frozen=True)
class Dockerfile:
    arguments: dict[str, str]
    """Of the file and of all stages, with their defaults."""
    stages: list[Stage]


def read(image: str) -> Dockerfile:
    text = (DOCKER / f"{image}.Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    arguments: dict[str, str] = {}
    stages: list[Stage] = []
    for line in filter(str.strip, joined.splitlines()):
        keyword, _, rest = line.strip().partition(" ")
        if keyword == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = default.strip('"')
        elif keyword == "FROM":
            base, _, name = rest.partition(" AS ")
            stages.append(Stage(name, base))
        else:
            stages[-1].instructions.append(Instruction(keyword, rest))
    return Dockerfile(arguments, stages)


_SYSTEM = ("apt-get ", "useradd ")
"""Steps that change the system, which a scratch folder is not."""
_PLACES = re.compile(r"(?<![\w./])(/opt|/src|/wheels|/cache)\b")


class Scratch:
    """Runs a build stage below `root` instead of `/`."""

    def __init__(self, root: Path, arguments: Mapping[str, str]) -> None:
        self.root = root
        self._folder = root
        # What a build would have: the tools' path and where packages come from, not our settings.
        kept = {
            k: v for k, v in os.environ.items() if not k.startswith(("NEO_", "PYTHON", "VIRTUAL"))
        }
        self._environment = {**kept, **arguments}
        tools = root / "tools"
        tools.mkdir()
        (tools / "python").symlink_to(Path(sys._base_executable))  # type: ignore[attr-defined]
        self._environment["PATH"] = f"{tools}:{os.environ['PATH']}"

    def place(self, text: str) -> str:
        return _PLACES.sub(lambda match: f"{self.root}{match[1]}", text)

    def build(self, stage: Stage) -> None:
        for step in stage.instructions:
            if step.keyword == "WORKDIR":
                self._folder = Path(self.place(step.text))
                self._folder.mkdir(parents=True, exist_ok=True)
            elif step.keyword == "COPY":
                self._copy(*step.text.split())
            elif step.keyword == "RUN" and not step.text.startswith(_SYSTEM):
                self.run(["bash", "-ec", self.place(step.text)])

    def run(self, command: list[str], **environment: str) -> str:
        """Its standard output."""
        done = subprocess.run(
            command, cwd=self._folder, env={**self._environment, **environment},
            capture_output=True, text=True, timeout=1200, check=False,
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-4000:]}"
        return done.stdout

    def _copy(self, source: str, target: str) -> None:
        """As the build context has it: what .dockerignore lets through."""
        for path in context(source):
            to = self._folder / (path if source == "." else Path(target) / path.relative_to(source))
            to.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPO / path, to)


def context(below: str) -> list[Path]:
    """Tracked or new files under `below` that .dockerignore lets in: it keeps out all but what its
    `!` rules name."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "--", below],
        cwd=REPO, capture_output=True, text=True, check=True,
    )  # fmt: skip
    rules = (REPO / ".dockerignore").read_text().splitlines()
    assert "*" in rules
    let_in = [tuple(rule[1:].split("/")) for rule in rules if rule.startswith("!")]

    def named(path: Path, rule: tuple[str, ...]) -> bool:
        """It, or a folder above it."""
        start = path.parts[: len(rule)]
        return len(start) == len(rule) and all(map(fnmatch.fnmatch, start, rule))

    found = [Path(name) for name in listed.stdout.splitlines() if (REPO / name).exists()]
    return [path for path in found if any(named(path, rule) for rule in let_in)]
