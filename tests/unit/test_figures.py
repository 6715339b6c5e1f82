"""The paper's figures as data and plots, by the simulator and by a real engine on a tiny model."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from benchmarks import figures


def rows_of(folder: Path, name: str) -> list[dict[str, str]]:
    told = json.loads((folder / f"{name}.json").read_text())
    with (folder / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [{k: str(v) for k, v in row.items()} for row in told["rows"]] == rows
    return rows


def test_both_figures_in_simulation(tmp_path: Path) -> None:
    options = "--simulate h100-16c.json --requests 24 --rate 2,9 --outputs 20 --threads 4,14"
    figures.main([*options.split(), "--output", str(tmp_path)])
    load = rows_of(tmp_path, "load_latency")
    assert [(row["rate"], row["offload"]) for row in load] == [
        ("2.0", "never"), ("2.0", "auto"), ("9.0", "never"), ("9.0", "auto")
    ]  # fmt: skip
    calm, _, crowded, _ = (float(row["mean_latency_seconds_per_token"]) for row in load)
    assert crowded > calm
    assert [row["threads"] for row in rows_of(tmp_path, "gain")] == ["4", "14"]
    for name in ("load_latency", "gain"):
        assert "simulated, h100-16c" in (tmp_path / f"{name}.svg").read_text()


@pytest.mark.slow
def test_both_figures_on_this_machine(tmp_path: Path) -> None:
    options = "--load-model tiny --gain-model tiny --load-gpu-kv-blocks 64 --gain-gpu-kv-blocks 200"
    options += " --requests 4 --rate 50 --outputs 3 --threads 1 --host-kv-gib 0.02 --device cpu"
    figures.main([*options.split(), "--output", str(tmp_path)])
    assert len(rows_of(tmp_path, "load_latency")) == 2
    (row,) = rows_of(tmp_path, "gain")
    assert float(row["gain"]) > 0
    assert json.loads((tmp_path / "gain.json").read_text())["machine"]
    assert "simulated" not in (tmp_path / "gain.svg").read_text()


def test_what_a_rate_has_to_keep() -> None:
    assert figures.sustained([0.4] * 40)
    assert not figures.sustained([0.6] * 40)
    assert not figures.sustained([0.01] * 30 + [0.03] * 10), "the queue grows"


@pytest.mark.parametrize("options", ["--simulate nowhere.json", "--simulate h100-16c"])
def test_mistakes_are_told_in_a_sentence(
    options: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        figures.main([*options.split(), "--output", str(tmp_path)])
    told = capsys.readouterr().err.splitlines()[-1]
    assert "profile" in told
