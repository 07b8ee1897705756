"""The ledger: bytes one token moves, counted from the plan, and what follows from them at a given bandwidth.

Decode at batch 1 is bound by memory, so   seconds per token >= bytes(depth) / bandwidth   with
    bytes(depth) = weights + state + kv * min(depth, kv_rows) + activations.
A recurrent model has kv = 0: its line is flat. Where two lines meet is the depth from which one model is the faster.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from edgeseq.bundle.plan import Plan, PlanArg, PlanGraph, PlanLaunch, align
from edgeseq.spec import StateSlot

CACHE_UPDATES = ("append", "ring")


@dataclass(frozen=True)
class Ledger:
    """Bytes that one call of a graph moves. `kv` is a tuple of (bytes per cached position, largest position count).

    weight_bytes:     weights read
    state_bytes_rw:   state read plus written, independent of depth (a new cache row included)
    activation_bytes: arena and io read plus written
    kv:               caches: (bytes read per cached position, rows at which it stops growing; 0 = never)
    """

    weight_bytes: int
    state_bytes_rw: int
    activation_bytes: int
    kv: tuple[tuple[int, int], ...] = ()

    def kv_bytes_read(self, depth: int) -> int:
        """Bytes of cache read by the token at position `depth` (which attends to itself and `depth` others)."""
        rows = depth + 1
        return sum(per_row * (min(rows, limit) if limit else rows) for per_row, limit in self.kv)

    def bytes_per_token(self, depth: int = 0) -> int:
        """All bytes moved by the token at position `depth`."""
        return self.weight_bytes + self.state_bytes_rw + self.activation_bytes + self.kv_bytes_read(depth)

    def bound_tok_s(self, bandwidth_gbs: float, depth: int = 0) -> float:
        """Upper bound of tokens per second at `bandwidth_gbs` (1e9 bytes per second); a bound, not a measurement."""
        return bandwidth_gbs * 1e9 / self.bytes_per_token(depth)


def ledger(plan: Plan, graph: PlanGraph | None = None) -> Ledger:
    """Sum the launches of `graph` (the step graph if None)."""
    graph = graph or plan.step
    moved = [launch_traffic(plan, graph, launch) for launch in graph.launches]
    caches: dict[int, int] = {}
    for entry in moved:
        if entry["kv"]:
            caches[entry["kv_rows"]] = caches.get(entry["kv_rows"], 0) + entry["kv"]
    return Ledger(
        sum(entry["weights"] for entry in moved),
        sum(entry["state"] for entry in moved),
        sum(entry["activations"] for entry in moved),
        tuple((per_row, limit) for limit, per_row in sorted(caches.items())),
    )


def launch_traffic(plan: Plan, graph: PlanGraph, launch: PlanLaunch) -> dict[str, int]:
    """Bytes of one execution, every key of `PlanLaunch.traffic` present.

    What the launch does not state follows from its arguments: an argument moves its bytes once per direction, except
    that a cache (append or ring slot) is written one row per token and read one row per cached position (a ring at
    most as many as it has).
    """
    total = {"weights": 0, "state": 0, "kv": 0, "kv_rows": 0, "activations": 0}
    for arg in launch.args:
        directions = len(arg.access)
        if arg.space == "weights":
            total["weights"] += arg.nbytes
        elif arg.space != "state":
            total["activations"] += arg.nbytes * directions
        else:
            for slot, share in _slots(plan, arg):
                if slot.update in CACHE_UPDATES:
                    _add_cache(total, slot, share, arg, graph.tokens)
                else:
                    total["state"] += share * directions
    return total | launch.traffic


def _add_cache(total: dict[str, int], slot: StateSlot, share: int, arg: PlanArg, tokens: int) -> None:
    rows = slot.shape[slot.axis or 0]
    per_row = share // rows
    if "w" in arg.access:
        total["state"] += per_row * min(tokens, rows)
    if "r" in arg.access:
        total["kv"] += per_row
        if slot.update == "ring":
            total["kv_rows"] = max(total["kv_rows"], rows)


def _slots(plan: Plan, arg: PlanArg) -> Iterable[tuple[StateSlot, int]]:
    """The slots an argument covers, with the bytes covered of each."""
    for slot, offset in plan.state:
        share = min(arg.offset + arg.nbytes, offset + slot.nbytes) - max(arg.offset, offset)
        if share > 0:
            yield slot, share


def crossover_depth(a: Ledger, b: Ledger, context: int = 0) -> int | None:
    """The smallest depth from which `a` moves no more bytes per token than `b`; None if there is none.

    Both run at one bandwidth, so the ratio of their bytes is the ratio of their speeds and the bandwidth drops out.
    context: largest depth to consider; 0 = none, which gives up where no cache grows any more.
    """
    corners = [limit - 1 for entry in (a, b) for _, limit in entry.kv if limit]
    end = context or max([*corners, 0])
    unbounded = not context and any(not limit for entry in (a, b) for _, limit in entry.kv)
    knots = sorted({0, *(c for c in corners if c < end), end})
    for low, high in pairwise(knots):
        found = _crossing(a, b, low, high)
        if found is not None:
            return found
    if _difference(a, b, end) <= 0:
        return end
    slope = _difference(a, b, end + 1) - _difference(a, b, end)
    return end + ceil(_difference(a, b, end) / -slope) if unbounded and slope < 0 else None


def _difference(a: Ledger, b: Ledger, depth: int) -> int:
    return a.bytes_per_token(depth) - b.bytes_per_token(depth)


def _crossing(a: Ledger, b: Ledger, low: int, high: int) -> int | None:
    """First depth in [low, high] where a <= b; both are straight lines between them."""
    first, last = _difference(a, b, low), _difference(a, b, high)
    if first <= 0:
        return low
    if last > 0:
        return None
    return low + ceil(first * (high - low) / (first - last))


def memory_need(plan: Plan) -> dict[str, int]:
    """Bytes one stream needs: weights (mapped), state, io, and the largest arena. `session` is what a stream adds."""
    weights = sum(align(t.nbytes) for t in plan.tensors)
    arena = max(g.arena_bytes for g in plan.graphs)
    return {
        "weights": weights,
        "state": plan.state_bytes,
        "io": plan.io_bytes,
        "arena": arena,
        "session": plan.state_bytes + plan.io_bytes + arena,
    }


def state_bytes_at(plan: Plan, context: int) -> int:
    """State bytes if the caches that grow with the context held `context` positions; other slots keep their size."""
    total = 0
    for slot, _ in plan.state:
        rows = slot.shape[slot.axis or 0]
        grows = slot.update == "append"
        total += align(slot.nbytes // rows * context if grows else slot.nbytes)
    return total
