"""The report's figures, as SVG to stand in a page."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from edgeseq.bench.rows import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0b6e8a", "#c2571a", "#5b7f2b", "#7a4d9c", "#a33a4f", "#555555")
PARTS = (
    ("weight_bytes", "weights", "#0b6e8a"),
    ("state_bytes_rw", "state, read and written", "#e0a526"),
    ("kv_bytes_read", "cache read", "#c2571a"),
    ("activation_bytes", "activations", "#9aa5ad"),
)
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a949b",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e5e9ec",
    "axes.axisbelow": True,
    "svg.fonttype": "none",
    "legend.frameon": False,
}


def by_depth(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Tokens per second of generation against depth: medians with the middle half of the repetitions, and the bound
    that the measured bandwidth sets. `labels[i]` names the contender of rows[i]."""
    figure, axes = _figure("depth", 4.2)
    lowest = min((r["n_depth"] for r in rows if r["n_depth"]), default=1)
    for colour, label in zip(COLOURS * len(labels), dict.fromkeys(labels)):
        mine = sorted((r for r, l in zip(rows, labels) if l == label), key=lambda r: r["n_depth"])
        depths = [r["n_depth"] for r in mine]
        rates = [r["median_ts"] for r in mine]
        quarters = [np.percentile(r["samples_ts"], (25, 75)) for r in mine]
        spread = [
            [m - low for m, (low, _) in zip(rates, quarters)],
            [high - m for m, (_, high) in zip(rates, quarters)],
        ]
        axes.errorbar(depths, rates, yerr=spread, color=colour, marker="o", markersize=4, capsize=2, label=label)
        bounds = [(r["n_depth"], r["bound_ts"]) for r in mine if r["bound_ts"]]
        if bounds:
            axes.plot(*zip(*bounds), color=colour, linestyle="--", linewidth=1, label=f"{label}: bound by bandwidth")
    axes.set_xscale("symlog", base=2, linthresh=lowest)
    axes.set_xticks(sorted({r["n_depth"] for r in rows}), minor=False)
    axes.xaxis.set_major_formatter(lambda value, _: _depth(value))
    axes.xaxis.set_minor_locator(_no_ticks())
    axes.set_yscale("log")
    axes.set_xlabel("tokens before")
    axes.set_ylabel("tokens per second")
    _legend(axes)
    return _svg(figure)


def ledger_bars(rows: Sequence[Row], labels: Sequence[str]) -> str:
    """Bytes per token of each row, by what they are."""
    figure, axes = _figure("ledger", 0.7 + 0.36 * len(rows))
    left = [0.0] * len(rows)
    scale, unit = _unit(max(r["bytes_per_token"] for r in rows))
    for key, name, colour in PARTS:
        widths = [r[key] / scale for r in rows]
        axes.barh(range(len(rows)), widths, left=left, color=colour, label=name, height=0.62)
        left = [a + b for a, b in zip(left, widths)]
    axes.set_yticks(range(len(rows)), labels)
    axes.invert_yaxis()
    axes.grid(axis="x")
    axes.grid(visible=False, axis="y")
    axes.set_xlabel(f"{unit} per token")
    _legend(axes)
    return _svg(figure)


def _figure(salt: str, height: float) -> tuple[Figure, Axes]:
    import matplotlib as mpl
    from matplotlib.figure import Figure

    mpl.rcParams.update(STYLE | {"svg.hashsalt": f"edgeseq-{salt}"})
    figure = Figure(figsize=(8.6, height), layout="constrained")
    return figure, figure.subplots()


def _legend(axes: Axes) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, fontsize=9)


def _no_ticks() -> Any:
    from matplotlib.ticker import NullLocator

    return NullLocator()


def _depth(value: float) -> str:
    number = round(value)
    return f"{number >> 10}k" if number and number % 1024 == 0 else str(number)


def _unit(largest: float) -> tuple[float, str]:
    for scale, unit in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if largest >= scale:
            return scale, unit
    return 1.0, "bytes"


def _svg(figure: Figure) -> str:
    """The figure from `<svg` on, the same bytes for the same numbers."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    return text[text.index("<svg") :]
