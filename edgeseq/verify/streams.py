"""Checks that do not know who runs: PyTorch, onnxruntime and the C runtime all offer a stream.

A stream consumes tokens and says the logits of the last one: `prefill(ids)` any number, `step(id)` one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from edgeseq.verify.golden import Golden
from edgeseq.verify.report import Array, Stage, compare

SEED = 7
CUT_SETS = 3
AFTER = 3
"""Tokens stepped after a chunk graph: a wrong state shows here though the chunk's own logits are right."""

WHOLE = "PyTorch, whole sequence"


class Stream(Protocol):
    def prefill(self, ids: Sequence[int]) -> Any: ...

    def step(self, token: int) -> Any: ...


def random_cuts(total: int, rng: np.random.Generator) -> list[int]:
    """Lengths that add up to `total`: short and long pieces, none empty."""
    cuts: list[int] = []
    while (left := total - sum(cuts)) > 0:
        cuts.append(int(min(left, rng.choice([1, 2, 3, 5, 8, 9, 17, left]))))
    return cuts


def stepped(stream: Stream, tokens: Sequence[int]) -> Array:
    """Logits [n,V] after each token, one step each."""
    return np.stack([stream.step(int(token)) for token in tokens])


def cut(stream: Stream, tokens: Sequence[int], cuts: Sequence[int]) -> tuple[list[int], Array]:
    """Indices of the last token of each piece, and the logits [pieces,V] after it."""
    ends, rows, at = [], [], 0
    for length in cuts:
        rows.append(stream.prefill([int(t) for t in tokens[at : at + length]]))
        at += length
        ends.append(at - 1)
    return ends, np.stack(rows)


def step_stage(name: str, stage: str, fresh: Callable[[], Stream], golden: Golden) -> Stage:
    """Every token by itself against the whole-sequence form."""
    assert golden.tokens is not None and golden.logits is not None
    rows = stepped(fresh(), golden.tokens.tolist())
    return compare(name, WHOLE, rows, golden.logits, golden.bound(stage, golden.logits))


def cuts_stage(name: str, stage: str, fresh: Callable[[], Stream], golden: Golden) -> Stage:
    """The sequence at once and in random pieces, each time from a fresh state, against the whole-sequence form."""
    assert golden.tokens is not None and golden.logits is not None
    rng = np.random.default_rng(SEED)
    n = len(golden.tokens)
    plans = [[n], *(random_cuts(n, rng) for _ in range(CUT_SETS))]
    ends: list[int] = []
    rows = []
    for plan in plans:
        where, got = cut(fresh(), golden.tokens.tolist(), plan)
        ends += where
        rows.append(got)
    return compare(
        name,
        WHOLE,
        np.concatenate(rows),
        golden.logits[ends],
        golden.bound(stage, golden.logits),
        ends,
        note=f"{len(plans)} ways to cut {n} tokens",
    )


def graph_stages(
    engine: str, stage: str, fresh: Callable[[], Stream], sizes: Sequence[int], golden: Golden, context: int
) -> list[Stage]:
    """Each chunk graph against the next smaller one, on the golden's tokens repeated until the graph is filled.

    The smallest is compared with steps, so that by induction all are compared with steps, whatever their length.
    """
    assert golden.tokens is not None and golden.logits is not None
    stages = []
    known = sorted(set(sizes) | {1})
    for smaller, size in pairwise(known):
        after = min(AFTER, context - size) if context else AFTER
        tokens = np.resize(golden.tokens, size + after).tolist()
        wanted = _filled(fresh(), tokens, size, smaller)
        got = _filled(fresh(), tokens, size, size)
        stages.append(
            compare(
                f"{engine} chunk{size} graph",
                f"{engine} {f'chunk{smaller} graph' if smaller > 1 else 'step'}",
                got,
                wanted,
                golden.bound(stage, wanted),
                range(size - 1, size + after),
            )
        )
    return stages


def _filled(stream: Stream, tokens: Sequence[int], size: int, piece: int) -> Array:
    """Consume `size` tokens in pieces of `piece`, the rest one by one; logits of the last piece and of the rest."""
    _, rows = cut(stream, tokens[:size], [piece] * (size // piece) + [1] * (size % piece))
    rest = [rows[-1:]]
    if len(tokens) > size:
        rest.append(stepped(stream, tokens[size:]))
    return np.concatenate(rest)


NamedRun = Callable[[dict[str, Array], int], dict[str, Array]]
"""Inputs by name and how many steps they hold -> outputs by name, from a fresh state on."""


def named_chunk_stages(name: str, stage: str, run: NamedRun, size: int, golden: Golden) -> list[Stage]:
    """A chunk graph of a model with named inputs, and the steps after it, against the golden's steps.

    Axis 1 of every input and output is the time.
    """
    n = len(next(iter(golden.inputs.values())))
    made: dict[str, list[Array]] = {output: [] for output in golden.outputs}
    whole = max(1, (n - AFTER) // size) * size
    if whole > n:
        return []  # the golden is shorter than the chunk
    at = 0
    while at < n:
        length = size if at < whole else 1
        inputs = {k: np.concatenate(list(v[at : at + length]), axis=1) for k, v in golden.inputs.items()}
        for output, value in run(inputs, length).items():
            made[output] += np.split(value, length, axis=1)
        at += length
    return [
        compare(
            f"{name} chunk{size} graph",
            f"{golden.said_by} step",
            np.stack(made[output]),
            wanted,
            golden.bound(stage, wanted, output),
            axes=("step", f"{output} element"),
        )
        for output, wanted in golden.outputs.items()
    ]
