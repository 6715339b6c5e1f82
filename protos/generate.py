"""Generate the committed gRPC stubs of `protos/neo/v1` and `protos/compat`, or check that they are
current.

    python -m protos.generate           # write
    python -m protos.generate --check   # exit 1 when a stub differs from its .proto

Stubs demand at least the generator's grpcio and protobuf, so the generator (`grpcio-tools`, pinned
in `constraints-cpu.txt`) must not be newer than the oldest runtime that we support.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from pathlib import Path

PROTO_ROOT = Path(__file__).parent


def generate(out: Path) -> list[Path]:
    """Write `{neo/v1,compat}/*_pb2*.py[i]` below `out`; returns the files' paths relative to it."""
    import grpc_tools
    from grpc_tools import protoc

    well_known = Path(grpc_tools.__file__).parent / "_proto"
    sources = sorted(str(p) for p in PROTO_ROOT.rglob("*.proto"))
    args = ["protoc", f"-I{PROTO_ROOT}", f"-I{well_known}"]
    args += [f"--python_out={out}", f"--pyi_out={out}", f"--grpc_python_out={out}", *sources]
    if protoc.main(args) != 0:
        raise SystemExit("protoc failed")
    written = sorted(p for p in out.rglob("*_pb2*") if p.suffix in {".py", ".pyi"})
    for path in written:
        # protoc derives import names from the proto path; ours live below the package `protos`.
        text = re.sub(
            r"^from (neo\.v1|compat) import", r"from protos.\1 import", path.read_text(), flags=re.M
        )
        path.write_text(text)
    return [p.relative_to(out) for p in written]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="protos.generate", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    check = parser.parse_args(argv).check
    if not check:
        generate(PROTO_ROOT)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        fresh = generate(Path(scratch))
        committed = {
            p.relative_to(PROTO_ROOT)
            for p in PROTO_ROOT.rglob("*_pb2*")
            if p.suffix in {".py", ".pyi"}
        }
        differing = [
            p
            for p in fresh
            if p not in committed or (PROTO_ROOT / p).read_text() != (Path(scratch) / p).read_text()
        ]
        differing += sorted(committed - set(fresh))
    for path in differing:
        print(
            f"stub differs from its .proto: protos/{path}; run python -m protos.generate",
            file=sys.stderr,
        )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
