"""What the documents tell people to type and to open is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from neo_client.cli import parser

REPO = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([REPO / "README.md", *(REPO / "docs").rglob("*.md")])


def commands(document: Path, program: str) -> list[list[str]]:
    """Lines of fenced blocks, and inline code, that start with `program`; comments cut off."""
    text = document.read_text()
    fenced = re.findall(r"^```\n(.*?)^```", text, flags=re.S | re.M)
    lines = [line for block in fenced for line in block.splitlines()]
    lines += re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.S | re.M))
    return [
        shlex.split(line, comments=True)
        for line in lines
        if re.match(re.escape(program) + r"(\s|$)", line)
    ]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_links(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        if not target.startswith(("http://", "https://")):
            assert (document.parent / target).exists(), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda p: str(p.relative_to(REPO)))
def test_named_files_exist(document: Path) -> None:
    """Inline code that looks like a path of ours."""
    tops = {path.name for path in REPO.iterdir() if path.is_dir() and path.name[0] != "."}
    for name in re.findall(r"`([\w.-]+(?:/[\w.-]+)+)/?`", document.read_text()):
        if name.split("/")[0] in tops - {"build"}:
            assert (REPO / name).exists(), f"{document.name} names {name}"


def test_make_targets() -> None:
    makefile = (REPO / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, flags=re.M))
    named = {
        word
        for document in DOCUMENTS
        for command in commands(document, "make")
        for word in command[1:]
        if "=" not in word and not word.startswith("-")
    }
    assert {"demo", "test"} <= named
    assert named <= targets


def test_neo_commands_of_the_readme_parse() -> None:
    found = commands(REPO / "README.md", "neo")
    assert {"serve", "generate", "load", "drain", "doctor"} <= {c[1] for c in found if len(c) > 1}
    for command in found:
        if command[1:] == ["serve"] or len(command) == 1:
            continue  # a mention, not a command
        parser().parse_args(command[1:])  # SystemExit when it does not


def test_services_of_the_readme_take_their_flags(tmp_path: Path) -> None:
    seen = set()
    for command in commands(REPO / "README.md", "python"):
        assert command[1] == "-m"
        seen.add(command[2])
        done = subprocess.run(
            [sys.executable, *command[1:], "--print-config"],
            cwd=REPO, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert seen == {"router", "gpu_service", "cpu_service"}


def test_python_examples_of_the_readme_compile() -> None:
    blocks = re.findall(
        r"^```python\n(.*?)^```", (REPO / "README.md").read_text(), flags=re.S | re.M
    )
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")


def test_help_is_complete() -> None:
    """Every command and every flag says what it does."""
    subparsers = next(a for a in parser()._actions if hasattr(a, "choices") and a.choices)
    for name, sub in dict(subparsers.choices).items():  # type: ignore[arg-type]
        assert sub.description, name
        for action in sub._actions:
            assert action.help, f"neo {name} {action.option_strings or action.dest}"
