"""Fuzzers in C++: the data plane's two ends, built with clang's libFuzzer, AddressSanitizer and
UndefinedBehaviorSanitizer from the extension's own sources."""

from __future__ import annotations

import os
import random
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path

NAMES = ("worker", "channel")
_ROOT = Path(__file__).resolve().parents[3]
_SOURCES = _ROOT / "kernels" / "cpu" / "csrc"
_FLAGS = (
    *("-std=c++20", "-O1", "-g", "-fno-omit-frame-pointer", "-fsanitize=fuzzer,address,undefined"),
    *("-fno-sanitize-recover=undefined", "-pthread", f"-I{_SOURCES}"),
    # Plain loops only: sanitizers see through those, and clang 14 does not know all features.
    "-D__builtin_cpu_supports(name)=false",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512cd")
_BF16 = (*_AVX512, "-mavx512bf16", "-mavx512vnni")
_SETS = {
    "avx2": _AVX2,
    "avx512": _AVX512,
    "avx512bf16": _BF16,
    "amx": (*_BF16, "-mamx-tile", "-mamx-bf16", "-mamx-int8"),
}
"""As in CMakeLists.txt."""


def build(name: str, folder: Path) -> Path:
    """The fuzzer's program, its objects beside it. Raises FileNotFoundError without clang."""
    clang = shutil.which("clang++")
    if clang is None:
        raise FileNotFoundError("clang++ is not installed")
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(path.stat().st_mtime for path in _SOURCES.iterdir())
    objects = []
    for source in [*sorted(_SOURCES.glob("*.cpp")), Path(__file__).parent / f"{name}.cpp"]:
        kind = source.stem.rpartition("_")[2]
        if kind in ("bind", "bindings", "neon"):
            continue
        made = folder / f"{source.parent.name}-{source.stem}.o"
        objects.append(str(made))
        if made.exists() and made.stat().st_mtime > max(newest, source.stat().st_mtime):
            continue
        flags = [*_FLAGS, *_SETS.get(kind, ())]
        subprocess.run([clang, *flags, "-c", str(source), "-o", str(made)], check=True)
    program = folder / name
    subprocess.run([clang, *_FLAGS, *objects, "-o", str(program)], check=True)
    return program


def seeds() -> list[bytes]:
    """Modes, lengths, and places of words that mean something."""
    dice = random.Random(7)
    places = (32, 33, 34, 48, *range(64, 400))
    found = []
    for number in range(64):
        words = b"".join(
            struct.pack("<HBI", dice.choice(places), dice.randint(0, 255), 1) for _ in range(8)
        )
        found.append(bytes([number, dice.randint(0, 63), dice.randint(0, 63)]) + words)
    return found


def run(name: str, seconds: float, kept: Path, single: Path | None, extra: Sequence[str]) -> int:
    folder = kept / name
    program = build(name, kept / "objects")
    corpus = folder / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    arguments = [str(single)] if single else [str(corpus), f"-max_total_time={seconds:.0f}"]
    arguments += [
        f"-artifact_prefix={folder}/",
        "-print_final_stats=1",
        "-timeout=30",
        "-max_len=600",
    ]
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "NEO_CPU_ISA": "scalar"}
    return subprocess.run(
        [str(program), *arguments, *extra], env=environment, check=False
    ).returncode
