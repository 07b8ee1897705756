"""Bytes that one token of a test moves, from the plan: what the measured rate is divided by."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from edgeseq.bench.cases import Case
from edgeseq.bundle.ledger import ledger
from edgeseq.bundle.plan import Plan, PlanGraph


@dataclass(frozen=True)
class Traffic:
    """Mean bytes per token over the tokens of a test."""

    weight_bytes: int
    state_bytes_rw: int
    kv_bytes_read: int
    activation_bytes: int

    @property
    def bytes_per_token(self) -> int:
        return self.weight_bytes + self.state_bytes_rw + self.kv_bytes_read + self.activation_bytes


def traffic(plan: Plan, case: Case) -> Traffic:
    """The calls of a test, each counted at its own depth, over its tokens.

    A prompt reads the weights once per call, which is why it is faster per token.
    """
    sums = [0, 0, 0, 0]
    for graph, position in _calls(plan, case):
        counted = ledger(plan, graph)
        last = position + graph.tokens - 1
        moved = (counted.weight_bytes, counted.state_bytes_rw, counted.kv_bytes_read(last), counted.activation_bytes)
        sums = [total + part for total, part in zip(sums, moved, strict=True)]
    return Traffic(*(round(total / case.tokens) for total in sums))


def _calls(plan: Plan, case: Case) -> Iterator[tuple[PlanGraph, int]]:
    """The graphs that run, with the position of the first token of each."""
    if case.n_gen:
        yield from ((plan.step, case.n_depth + i) for i in range(case.n_gen))
        return
    at, end = case.n_depth, case.n_depth + case.n_prompt
    for graph in sorted(plan.graphs, key=lambda g: -g.tokens):
        silent = replace(graph, launches=tuple(launch for launch in graph.launches if not launch.outputs_only))
        while end - at >= graph.tokens:
            last = at + graph.tokens == end  # only the last call's logits are wanted
            yield (graph if last else silent), at
            at += graph.tokens


def working_set(plan: Plan, case: Case) -> int:
    """Bytes that one step touches at the test's depth: what fits a cache stays there from token to token."""
    counted = ledger(plan)
    return counted.weight_bytes + counted.state_bytes_rw // 2 + counted.kv_bytes_read(case.n_depth + case.tokens - 1)
