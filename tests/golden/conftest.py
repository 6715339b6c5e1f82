"""What tests in Triton's interpreter share; those of other devices have fixtures of their own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.models import FAMILIES, tiny_model_dir
from tests.support.offload import cpu_service
from tests.support.stack import Service


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A cpu_service."""
    with cpu_service(tmp_path_factory.mktemp("cpu")) as running:
        yield running


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Family -> its tiny model."""
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_model_dir(root / name, name, head_dim=16) for name in FAMILIES}
