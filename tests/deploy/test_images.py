"""The images' Dockerfiles and lock files, without Docker: linted, read, and (slow tier) their build
stages run step by step in a scratch folder."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from tests.support.dockerfiles import DOCKER, IMAGES, REPO, Scratch, context, read
from tests.support.manifests import containers, overlay

LOCKS = DOCKER / "locks"
MODULES = {"router": "router", "cpu": "cpu_service", "gpu": "gpu_service"}
WITHOUT_TORCH = ("router", "cpu")
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ ;\\]+)")


def pins(lock: str) -> dict[str, set[str]]:
    """Name -> versions (two where they depend on Python's)."""
    found: dict[str, set[str]] = {}
    for line in (LOCKS / f"{lock}.txt").read_text().splitlines():
        if match := _PIN.match(line):
            found.setdefault(match[1].lower(), set()).add(match[2])
    return found


def project() -> dict[str, list[str]]:
    data = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = data["optional-dependencies"]
    return {"core": [*data["dependencies"], *extras["tracing"]], "engine": extras["engine"]}


@pytest.mark.parametrize("image", IMAGES)
def test_the_linter_is_content(image: str) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run(
        [linter, "--failure-threshold", "warning", DOCKER / f"{image}.Dockerfile"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("image", IMAGES)
def test_the_last_stage_is_small_and_runs_as_nobody(image: str) -> None:
    dockerfile = read(image)
    build, last = dockerfile.stages
    assert {build.base, last.base} == {"${PYTHON_IMAGE}"}
    assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", dockerfile.arguments["PYTHON_IMAGE"])
    assert last.all("USER") == ["10001:10001"]
    assert last.all("COPY") == ["--from=build /opt/neo /opt/neo"]
    assert last.entrypoint == ["python", "-m", MODULES[image]]
    installed = " ".join(last.all("RUN"))
    assert ("gcc" in installed) == (image == "gpu")
    for tool in ("g++", "make", "cmake", "clang", "pip install"):
        assert tool not in installed
    if image == "gpu":
        (volume,) = last.all("VOLUME")
        assert last.environment["TRITON_CACHE_DIR"].startswith(volume)


@pytest.mark.parametrize("image", IMAGES)
def test_every_install_is_by_hash_but_torchs(image: str) -> None:
    build = read(image).stages[0]
    steps = [step for text in build.all("RUN") for step in text.split("&&")]
    loose = [s for s in steps if "pip install" in s and "--require-hashes" not in s]
    ours = [step for step in loose if "--no-deps /wheels/" in step]
    torch = [step for step in loose if "${TORCH}" in step]
    assert len(ours) == 1
    assert len(torch) == (image == "gpu")
    assert len(loose) == len(ours) + len(torch)


@pytest.mark.parametrize("lock", ["build", "core", "demo", "engine"])
def test_every_pin_has_hashes(lock: str) -> None:
    text = (LOCKS / f"{lock}.txt").read_text()
    entries = re.split(r"\n(?=\S)", text.strip())[1:]
    assert entries
    for entry in entries:
        assert _PIN.match(entry), entry
        assert "--hash=sha256:" in entry, entry
    assert not {"torch", "triton", "nvidia"} & {name.partition("-")[0] for name in pins(lock)}
    assert "://" not in text


@pytest.mark.parametrize("lock", ["core", "engine"])
def test_locks_hold_what_the_project_asks_for(lock: str) -> None:
    asked = [Requirement(text) for text in {*project()["core"], *project()[lock]}]
    pinned = pins(lock)
    for requirement in asked:
        if requirement.name != "torch":
            versions = pinned.get(requirement.name.lower())
            assert versions, f"{requirement} is not locked: run deploy/docker/lock.py"
            assert all(requirement.specifier.contains(version) for version in versions)
    tested = dict(
        line.split("==")
        for line in (REPO / "constraints-cpu.txt").read_text().splitlines()
        if "==" in line
    )
    for name in pinned.keys() & tested.keys():
        assert pinned[name] == {tested[name]}, f"{name} is tested in another version"


def test_ports_are_the_manifests() -> None:
    exposed = {
        image: {int(p) for p in read(image).stages[1].all("EXPOSE")[0].split()} for image in IMAGES
    }
    for container in containers(overlay("prod")):
        image = container.spec["image"].partition(":")[0].removeprefix("neo-")
        declared = {port["containerPort"] for port in container.spec.get("ports", ())}
        assert declared <= exposed[image]


def test_the_build_context_is_what_a_build_needs() -> None:
    paths = {str(path) for path in context(".")}
    assert {"pyproject.toml", "CMakeLists.txt", "router/app.py", "neo_client/cli.py"} <= paths
    assert {path for path in paths if path.startswith("kernels/cpu/csrc/")}
    tops = {path.split("/")[0] for path in paths}
    assert not tops & {"tests", "docs", "benchmarks", ".git", "shared"}
    packages = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["scikit-build"]
    assert set(packages["wheel"]["packages"]) <= tops


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("image", WITHOUT_TORCH)
def test_the_build_stage_works_without_torch(image: str, tmp_path: Path) -> None:
    """Every step of it but Debian's packages; then what the image would start starts."""
    dockerfile = read(image)
    build, last = dockerfile.stages
    scratch = Scratch(tmp_path, dockerfile.arguments)
    scratch.build(build)
    environment = {name: scratch.place(value) for name, value in last.environment.items()}
    environment["PATH"] = environment["PATH"].replace("$PATH", "/usr/bin:/bin")
    backends = {"NEO_BACKENDS": "127.0.0.1:7001"} if image == "router" else {}
    printed = scratch.run([*last.entrypoint, "--print-config"], **environment, **backends)
    assert yaml.safe_load(printed)["listen"]
    program = "import importlib.metadata as m; print(*(d.name for d in m.distributions()))"
    listed = scratch.run(["python", "-c", program], **environment).split()
    assert "neo-serving" in listed
    assert not {"torch", "triton", "pip", "setuptools", "cmake"} & set(listed)
    doctor = ["neo", "doctor", "--for=cpu_service", "--host-kv-gib=0.01", "--gpu-kv-gib=0"]
    assert "extension" in scratch.run(doctor, **environment)
