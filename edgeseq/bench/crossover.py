"""From which depth a model that reads less of a cache is faster than one that reads more: predicted, and measured.

The first may be recurrent, with no cache at all, a window, or a hybrid of which only some layers attend.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

from edgeseq.bench.rows import Row
from edgeseq.bundle.ledger import Ledger, crossover_depth, ledger
from edgeseq.bundle.plan import Plan

Kind = Literal["interpolated", "at most", "not reached"]


@dataclass(frozen=True)
class Measured:
    """depth: None when the recurrent model was not the faster one at the largest depth. kind: how it was found."""

    depth: int | None
    kind: Kind


def measured_crossover(recurrent: dict[int, float], cached: dict[int, float]) -> Measured:
    """Tokens per second by depth, of both. The depth from which the recurrent model stays the faster one, on straight
    lines of time per token between the measured depths."""
    depths = sorted(recurrent.keys() & cached.keys())
    gap = {d: 1 / recurrent[d] - 1 / cached[d] for d in depths}  # seconds per token that the recurrent one loses
    if not depths or gap[depths[-1]] > 0:
        return Measured(None, "not reached")
    for low, high in reversed(list(pairwise(depths))):
        if gap[low] > 0:
            return Measured(round(low + (high - low) * gap[low] / (gap[low] - gap[high])), "interpolated")
    return Measured(depths[0], "at most")


def crossover_rows(rows: Sequence[Row], plans: dict[str, Plan]) -> list[Row]:
    """One row for each two bundles of which one comes to read less cache, per number of threads and tokens."""
    decode = [r for r in rows if r["n_gen"] and r["model_filename"] in plans]
    made = []
    for threads, n in sorted({(r["n_threads"], r["n_gen"]) for r in decode}):
        group = [r for r in decode if (r["n_threads"], r["n_gen"]) == (threads, n)]
        names = list(dict.fromkeys(r["model_filename"] for r in group))
        made += [
            _row(group, name, rival, plans)
            for name in names
            for rival in names
            if _grows_less(plans[name], plans[rival])
        ]
    return [row for row in made if row["depths"]]


def _grows_less(plan: Plan, rival: Plan) -> bool:
    """Whether the cache that one token reads is smaller at the depth where both contexts end, or for ever after."""
    a, b = ledger(plan), ledger(rival)
    ends = [p.manifest.context for p in (plan, rival) if p.manifest.context]
    return a.kv_bytes_read(min(ends) - 1) < b.kv_bytes_read(min(ends) - 1) if ends else _slope(a) < _slope(b)


def _slope(entry: Ledger) -> int:
    """Bytes that every further position adds."""
    return sum(per_row for per_row, limit in entry.kv if not limit)


def _row(group: Sequence[Row], name: str, rival: str, plans: dict[str, Plan]) -> Row:
    ours = {r["n_depth"]: r for r in group if r["model_filename"] == name}
    theirs = {r["n_depth"]: r for r in group if r["model_filename"] == rival}
    a, b = ledger(plans[name]), ledger(plans[rival])
    predicted = crossover_depth(a, b, plans[rival].manifest.context)
    measured = measured_crossover(
        {d: r["median_ts"] for d, r in ours.items()}, {d: r["median_ts"] for d, r in theirs.items()}
    )
    first = next(iter(ours.values()))
    bandwidths = [r["read_bw_gbs"] for r in (*ours.values(), *theirs.values()) if r["read_bw_gbs"]]
    bandwidth = sorted(bandwidths)[len(bandwidths) // 2] if bandwidths else None
    known = predicted is not None and bandwidth
    return {
        "test": "crossover",
        "model_filename": name,
        "rival_filename": rival,
        "n_threads": first["n_threads"],
        "n_gen": first["n_gen"],
        "depths": sorted(ours.keys() & theirs.keys()),
        "predicted_depth": predicted,
        "predicted_ts": a.bound_tok_s(bandwidth, predicted) if known and bandwidth and predicted is not None else None,
        "read_bw_gbs": bandwidth,
        "measured_depth": measured.depth,
        "measured_is": measured.kind,
    }
