"""The comparison's picture: for every case, how many times as fast as each peer ours is."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from dlrm_rs.bench.measurement import Measurement
from dlrm_rs.bench.record import Record, comparisons
from dlrm_rs.bench.sides import PEERS, TRAINING_PEERS

# Colours that the colour-blind can tell apart (Okabe and Ito), one for every peer.
_COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#F0E442", "#0072B2", "#999999")


def save_plot(record: Record, path: Path) -> None:
    """Draw a bar for every case and peer into a PNG.

    Args:
        record: What was measured.
        path: Of the PNG.
    """
    of_run = list(comparisons(record.measurements))
    names = sorted({versus.peer.side for comparison in of_run for versus in comparison.peers}, key=_place)
    bars = sum(1 + len(comparison.peers) for comparison in of_run)
    # A Figure of its own and no pyplot: there is no display to ask for, and no global state to leave behind.
    figure = Figure(figsize=(9, max(3.0, 0.16 * bars)), layout="constrained")
    axes = figure.subplots()
    at, ticks = 0.0, {}
    for comparison in of_run:
        first = at
        for versus in comparison.peers:
            colour = _COLOURS[names.index(versus.peer.side) % len(_COLOURS)]
            # From 1 to the left where ours is the slower.
            bar = axes.barh(at, versus.ratio - 1, left=1, color=colour)
            axes.bar_label(bar, [f"{versus.ratio:.2f}"], fontsize=6, padding=2)
            at += 1
        ticks[(first + at - 1) / 2] = _label(comparison.ours)
        at += 1
    for name in names:  # an empty bar, for the legend alone
        axes.barh(0, 0, color=_COLOURS[names.index(name) % len(_COLOURS)], label=name)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(list(ticks), list(ticks.values()), fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("")
    axes.margins(y=0.01, x=0.08)
    machine = record.machine
    axes.set(xlabel="time of the peer at its best, over that of dlrm_rs (right of 1: dlrm_rs is faster)")
    axes.set_title(f"{machine['processor']}, {machine['cores']} cores, dlrm_rs {machine['dlrm_rs']}", fontsize=9)
    if names:  # with nothing measured there is nothing to explain
        axes.legend(fontsize=7)
    figure.savefig(path, dpi=150)


def _place(side: str) -> tuple[int, str]:
    """Peers in their order; what only quantizes comes after."""
    known = list(dict.fromkeys(peer.name for peer in (*PEERS, *TRAINING_PEERS)))
    return (known.index(side) if side in known else len(known), side)


def _label(ours: Measurement) -> str:
    case = f"B {ours.batch_size}, {ours.ids}" if ours.batch_size else "quantize"
    what = f"{ours.shape} {ours.row_format} {ours.optimizer}".rstrip()
    return f"{what}, {case}, {ours.threads}T"
