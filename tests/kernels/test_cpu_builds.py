"""The kernel's tests again on other builds: with checks of addresses, undefined behaviour and data
races, with AMX tiles in plain C++, and for Arm under emulation."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pybind11
import pytest

from kernels import cpu

ROOT = Path(__file__).parents[2]
TESTS = ("tests/kernels/test_cpu_attention.py", "tests/kernels/test_cpu_pool.py")


def _library(name: str) -> str | None:
    """Path of the compiler's own lib`name`; None: not installed."""
    command = ["g++", f"-print-file-name=lib{name}.so"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    path = Path(done.stdout.strip())
    return str(path.resolve()) if path.is_absolute() else None


def _cmake() -> str:
    """Of this environment, which need not be on the path, or else the machine's."""
    own = shutil.which("cmake", path=str(Path(sys.executable).parent))
    found = own or shutil.which("cmake")
    assert found is not None, "the test dependencies bring cmake"
    return found


def _build(folder: Path, option: str) -> None:
    """Copies the sources, so that this build and the tree's own never mix."""
    shutil.copytree(ROOT / "kernels", folder / "kernels", ignore=shutil.ignore_patterns("*.so"))
    shutil.copytree(ROOT / "tests", folder / "tests")
    for name in ("CMakeLists.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, folder / name)
    build = folder / "build"
    subprocess.run(
        [_cmake(), "-S", folder, "-B", build, "-DCMAKE_BUILD_TYPE=None", f"-D{option}",
         f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"],
        check=True,
    )  # fmt: skip
    subprocess.run([_cmake(), "--build", build, "-j2"], check=True)
    for extension in build.glob("_neo_cpu*.so"):
        shutil.copy(extension, folder / "kernels/cpu")


def _run_tests(
    folder: Path, selection: str, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection,
         *TESTS],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1500)
@pytest.mark.parametrize(
    ("sanitizers", "runtime", "selection"),
    [
        ("address;undefined", "asan", ""),
        ("thread", "tsan", "threads or two_pools or small_regions or touch or copy_from"),
    ],
)
def test_sanitizers_find_nothing(
    tmp_path: Path, sanitizers: str, runtime: str, selection: str
) -> None:
    library = _library(runtime)
    if library is None:
        pytest.skip(f"needs g++ with lib{runtime}")
    _build(tmp_path, f"NEO_SANITIZE={sanitizers}")
    log = tmp_path / "report"
    environment = os.environ | {
        # libasan looks for __cxa_throw when it is loaded, and Python itself brings no libstdc++.
        "LD_PRELOAD": f"{library}:{_library('stdc++')}",
        "PYTHONPATH": str(tmp_path),
        "ASAN_OPTIONS": f"detect_leaks=0:log_path={log}",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        # Only what our own extension does: neither Python nor torch is instrumented.
        "TSAN_OPTIONS": f"ignore_noninstrumented_modules=1:log_path={log}",
    }
    done = _run_tests(tmp_path, selection, environment)
    reports = "\n".join(path.read_text() for path in tmp_path.glob("report.*"))
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:] + reports[-4000:]
    assert "_neo_cpu" not in reports, reports[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sessions_under_load_are_clean(tmp_path: Path, sanitizers: str) -> None:
    """Without Python, whose runtime is not instrumented; leaks count. TSan knows no futex and no
    fences of its own: bells.pml has what they order. Scalar loops: vectors are not its matter."""
    sources = ROOT / "kernels/cpu/csrc"
    plain = [path for path in sources.glob("*.cpp") if "bind" not in path.name]
    sets = {
        "avx2": "-mavx2 -mfma -mf16c",
        "avx512": "-mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512cd",
    }
    sets["avx512bf16"] = sets["avx512"] + " -mavx512bf16 -mavx512vnni"
    sets["amx"] = sets["avx512bf16"] + " -mamx-tile -mamx-bf16 -mamx-int8"
    common = ["g++", "-std=c++20", "-O1", "-g", "-w", "-pthread", "-fno-omit-frame-pointer",
              f"-I{sources}", f"-fsanitize={sanitizers}"]  # fmt: skip
    objects = []
    for path in (*plain, ROOT / "tests/kernels/dataplane_stress.cpp"):
        isa = path.stem.rpartition("_")[2]
        if isa == "neon":
            continue
        objects.append(tmp_path / f"{path.stem}.o")
        flags = sets.get(isa, "").split()
        subprocess.run([*common, *flags, "-c", path, "-o", objects[-1]], check=True)
    subprocess.run([*common, *objects, "-o", tmp_path / "stress"], check=True)
    done = subprocess.run(
        [tmp_path / "stress", "30"],
        env=os.environ | {"NEO_CPU_ISA": "scalar", "UBSAN_OPTIONS": "halt_on_error=1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]
    assert "sweeps, 0 wrong" in done.stdout
    assert done.stderr == ""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_loops_over_amx_tiles_are_right(tmp_path: Path) -> None:
    """Tiles are emulated: what they compute is tested here, that they are fast elsewhere."""
    if "avx512bf16" not in cpu.isas():
        pytest.skip("needs a CPU with AVX512-BF16")
    _build(tmp_path, "NEO_EMULATE_AMX=ON")
    done = _run_tests(tmp_path, "amx or tiles", os.environ | {"PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert " passed" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["scalar", "neon"])
def test_arm_computes_the_same(tmp_path: Path, isa: str) -> None:
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs aarch64-linux-gnu-g++ and qemu-aarch64")
    sources = ROOT / "kernels/cpu/csrc"
    names = ("attention", "attention_plan", "isa", "kv_pool", "thread_pool")
    subprocess.run(
        [compiler, "-std=c++20", "-O2", "-Wall", "-Wextra", "-Werror", "-static", "-pthread",
         f"-I{sources}", *(sources / f"{name}.cpp" for name in names),
         sources / "strip_scalar.cpp", sources / "strip_neon.cpp",
         ROOT / "tests/kernels/attention_selftest.cpp", "-o", tmp_path / "selftest"],
        check=True,
    )  # fmt: skip
    done = subprocess.run(
        [emulator, tmp_path / "selftest"],
        env=os.environ | {"NEO_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == f"{isa}: 0 wrong\n", done.stderr
