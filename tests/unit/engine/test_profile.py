"""The profile that predictions start from: measured once, kept, and never a reason not to start."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from gpu_service.engine import profile_cache
from gpu_service.engine.profile_cache import StartProfile, cache_path, load, store
from gpu_service.model.model import load_model
from gpu_service.scheduling.rates import HostRates
from tests.support.engine import config, greedy, local_core, prompt, run
from tests.support.models import tiny_model_dir

PROFILE = StartProfile(
    rates=HostRates(cpu_token_ms=0.001, link_token_ms=2e-3, streamed_token_ms=1e-3),
    decode_ms={1: 5.0, 16: 6.0},
    mixed_ms={64: 7.0},
)


def test_a_profile_is_kept(tmp_path: Path) -> None:
    path = cache_path(str(tmp_path / "new"), {"cpu": "one"})
    assert load(path) is None
    store(path, PROFILE)
    assert load(path) == PROFILE
    assert path is not None
    assert os.listdir(path.parent) == [path.name]


def test_other_hardware_or_another_model_has_its_own(tmp_path: Path) -> None:
    paths = {
        cache_path(str(tmp_path), facts)
        for facts in ({"cpu": "one"}, {"cpu": "two"}, {"cpu": "one", "model": "x"})
    }
    assert len(paths) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"rates": {"cpu_token_ms": -1}}',
        b'{"rates": {"cpu_token_ms": 1}, "mixed_ms": {"4": 0}}',
        b'{"rates": {"cpu_token_ms": 1}, "mixed_ms": {"4": 1}}',
        b'{"rates": {"cpu_token_ms": 1, "old": 2}}',
        b"\xff\x00",
    ],
)
def test_what_cannot_be_read_is_measured_again(
    content: bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "profile.json"
    path.write_bytes(content)
    assert load(path) is None
    assert "measured again" in caplog.text


def test_a_folder_that_cannot_be_written_is_no_reason_to_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    store(tmp_path / "file" / "profile.json", PROFILE)
    assert "cannot be kept" in caplog.text


def test_none_keeps_nothing() -> None:
    path = cache_path(profile_cache.NOWHERE, {})
    store(path, PROFILE)
    assert load(path) is None


def test_an_engine_measures_once_and_starts_from_it(tmp_path: Path) -> None:
    directory = tiny_model_dir(tmp_path / "model", "llama", head_dim=16)
    model = load_model(directory, dtype="float32")
    folder = tmp_path / "profiles"
    made = config(
        "tiny", offload="auto", offload_mode="auto", profile_dir=str(folder), gpu_kv_blocks=12,
        cpu_services=("local",),
    )  # fmt: skip
    core = local_core(made, model, host_blocks=64)
    (path,) = folder.iterdir()
    profile = load(path)
    assert profile is not None
    assert profile.rates.inline_ms > 0
    predictor = core.scheduler.steering.predictor
    assert predictor is not None
    assert predictor.rates == profile.rates
    kept = path.read_bytes()
    again = local_core(made, model, host_blocks=64)
    assert path.read_bytes() == kept, "measured again"
    path.write_bytes(b"spoiled")
    local_core(made, model, host_blocks=64)
    assert load(path) is not None
    answers = run(again, [greedy(f"r{i}", prompt(20 + i, i), 12) for i in range(12)])
    assert all(len(tokens) == 12 for tokens in answers.tokens.values())
    accounts = again.scheduler.steering.accounts
    assert sum(accounts.iterations.values()) > 12
    assert accounts.actual_ms > 0


@pytest.mark.parametrize("blocks", [0, 8])
def test_what_streams_costs_a_migrations_token_at_most(tmp_path: Path, blocks: int) -> None:
    """Reading is measured where there is staging to read into."""
    model = load_model(tiny_model_dir(tmp_path, "llama", head_dim=16), dtype="float32")
    made = config(
        "tiny", offload="auto", offload_mode="auto", gpu_kv_blocks=24, cpu_services=("local",),
        streamed_kv_blocks=blocks,
    )  # fmt: skip
    predictor = local_core(made, model, host_blocks=64).scheduler.steering.predictor
    assert predictor is not None
    rates = predictor.rates
    assert (0 < rates.streamed_token_ms <= rates.link_token_ms) or rates.link_token_ms == 0
    if not blocks:
        assert rates.streamed_token_ms == rates.link_token_ms
