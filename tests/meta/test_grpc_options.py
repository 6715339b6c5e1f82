"""gRPC ignores options that it does not know; none of ours is such a one."""

from __future__ import annotations

import re
from pathlib import Path

from grpc._cython import cygrpc

REPO = Path(__file__).resolve().parents[2]


def test_grpc_knows_the_options_that_we_set() -> None:
    known = Path(cygrpc.__file__).read_bytes()
    named = {
        (name, path.relative_to(REPO))
        for top in ("neo_common", "neo_client", "router", "gpu_service", "cpu_service", "neo_http")
        for path in (REPO / top).rglob("*.py")
        for name in re.findall(r'\(\s*"(grpc\.[\w.]+)",', path.read_text())
    }
    assert len(named) > 15
    unknown = [f"{path}: {name}" for name, path in sorted(named) if name.encode() not in known]
    assert not unknown, "\n".join(unknown)
