"""Plots of `benchmarks.figures`. matplotlib is a tool of developers, not needed to measure."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

Rows = Sequence[dict[str, Any]]


def plot_load(rows: Rows, path: Path, title: str) -> bool:
    """False without matplotlib."""
    figure, axes = _axes(title or "load against latency")
    if axes is None:
        return False
    for offload, style in (("never", "o--"), ("auto", "o-")):
        mine = [row for row in rows if row["offload"] == offload]
        axes.plot(
            [row["rate"] for row in mine],
            [row["mean_latency_seconds_per_token"] for row in mine],
            style,
            label=f"offload {offload}",
        )
    axes.axhline(0.5, color="0.7", linewidth=0.8)
    axes.set_yscale("log")
    axes.set_xlabel("requests a second")
    axes.set_ylabel("mean latency for each output token, s")
    return _save(figure, axes, path)


def plot_gain(rows: Rows, path: Path, title: str) -> bool:
    """False without matplotlib."""
    figure, axes = _axes(title or "throughput with a host tier")
    if axes is None:
        return False
    for threads in sorted({row["threads"] for row in rows}):
        mine = [row for row in rows if row["threads"] == threads]
        axes.plot(
            [row["output_tokens"] for row in mine],
            [row["gain"] for row in mine],
            "o-",
            label=f"{threads} threads",
        )
    axes.axhline(1.0, color="0.7", linewidth=0.8)
    axes.set_xlabel("output tokens (1,000 in)")
    axes.set_ylabel("throughput, GPU alone = 1")
    return _save(figure, axes, path)


def _axes(title: str) -> tuple[Any, Any]:
    try:
        import matplotlib
    except ImportError:
        return None, None
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.fonttype"] = "none"  # text, not outlines: a tenth of the size
    matplotlib.rcParams["svg.hashsalt"] = "neo"  # the same picture of the same figures
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.6))
    axes.set_title(title, fontsize=10)
    return figure, axes


def _save(figure: Any, axes: Any, path: Path) -> bool:
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    return True
