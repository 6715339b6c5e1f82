"""docs/errors.md says what the code does: its reasons, its calls, and who gives which reason."""

from __future__ import annotations

import ast
import importlib.util
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from neo_common.errors import Reason
from tests.meta.test_rpcs import RPCS

REPO = Path(__file__).resolve().parents[2]


def table() -> Any:
    spec = importlib.util.spec_from_file_location("errors_page", REPO / "docs/errors.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look it up while it is being made
    spec.loader.exec_module(module)
    return module


PAGE = table()


def given_in(*folders: str) -> set[Reason]:
    """Reasons that the sources below `folders` name: as `Reason.X`, or in words between the engine
    and its front end."""
    found = set()
    for folder in folders:
        for path in (REPO / folder).rglob("*.py"):
            if path == REPO / "neo_common/errors.py":
                continue
            for node in ast.walk(ast.parse(path.read_text())):
                name: Any = None
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "Reason":
                    name = node.attr
                elif isinstance(node, ast.Constant):
                    name = node.value
                if isinstance(name, str) and name in Reason.__members__:
                    found.add(Reason[name])
    return found


def test_every_reason_is_explained() -> None:
    assert set(PAGE.REASONS) == set(Reason)


def test_every_call_is_there() -> None:
    assert sorted([*PAGE.INFERENCE, *PAGE.OTHERS]) == RPCS


@pytest.mark.parametrize(
    ("folder", "services"),
    [
        (
            "gpu_service",
            ("InferenceService", "VllmEngine", "GRPCInferenceService", "EngineService"),
        ),
        ("cpu_service", ("CpuAttentionService",)),
        ("router", ("InferenceService", "VllmEngine", "GRPCInferenceService", "RouterService")),
    ],
)
def test_a_service_gives_the_reasons_of_its_calls(folder: str, services: tuple[str, ...]) -> None:
    """DRAINING is in the code that all servers share, also where nothing is drained."""
    position = 1 if folder == "router" else 0
    listed = set(PAGE.EVERYWHERE)
    for call, reasons in PAGE.INFERENCE.items():
        if call.partition(".")[0] in services:
            listed |= set(reasons[position])
    for call, more in PAGE.OTHERS.items():
        if call.partition(".")[0] in services:
            listed |= set(more)
    assert listed | {Reason.DRAINING} == given_in(folder, "neo_common/grpc")


def test_what_may_be_retried_has_a_status_that_says_so() -> None:
    """Proxies and clients go by the status alone."""
    may = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED}
    for reason, about in PAGE.REASONS.items():
        assert (about.retry == PAGE.LATER) == (reason.status_code in may), reason
